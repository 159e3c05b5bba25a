"""Labelled text: loading, checking, splitting, tokenising; and the embedded model and data."""

from ulmfit_tools.data.demo_model import load_model_and_tokenizer, resolve_model
from ulmfit_tools.data.loading import (
    TextClassificationData,
    load_for_evaluation,
    load_text_classification,
    read_texts,
)
from ulmfit_tools.data.splitting import stratified_split
from ulmfit_tools.data.stdlib_docs import load_stdlib_docs, tfidf_baseline
from ulmfit_tools.data.tokenizing import ensure_padding, text_length_limit, tokenize

__all__ = [
    "TextClassificationData",
    "ensure_padding",
    "load_for_evaluation",
    "load_model_and_tokenizer",
    "load_stdlib_docs",
    "load_text_classification",
    "read_texts",
    "resolve_model",
    "stratified_split",
    "text_length_limit",
    "tfidf_baseline",
    "tokenize",
]
