"""Texts as token ids, in batches and memory-mapped, with the length of each row for grouping."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import DatasetDict
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ulmfit_tools.data.files import few_progress_bars
from ulmfit_tools.data.loading import TextClassificationData
from ulmfit_tools.errors import InputError

UNSET_LENGTH = 1_000_000  # a tokenizer without a limit of its own says 1e30
DEFAULT_LENGTH = 512
LENGTH_COLUMN = "length"  # TrainingArguments.length_column_name
_CUT_COLUMN = "__cut__"

logger = logging.getLogger(__name__)


def tokenize(
    data: TextClassificationData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    config: PreTrainedConfig | None = None,
    num_proc: int | None = None,
) -> DatasetDict:
    """Turns the texts of all splits into token ids; text pairs are joined as the tokenizer joins them.

    The result lies in the cache of `datasets`, so that rows do not cost memory and the next run finds it. In a run of
    several processes, let the main one go first (`TrainingArguments.main_process_first`).

    Args:
        data: Loaded data. How many rows were cut is said in the log, and added to its notes.
        tokenizer: The model's tokenizer.
        max_length: Tokens a row, special ones counted; longer rows are cut at the end, of a pair the longer text
            first. `None` is as many as the model reads.
        config: The model's configuration: the number of its positions is a limit too.
        num_proc: Processes to tokenise with; `None` is this one alone.

    Returns:
        Splits with `input_ids`, `attention_mask`, whatever else the tokenizer makes for its model (`token_type_ids`),
        `labels`, and `length`, the number of tokens. No row is padded: pad each batch with
        `transformers.DataCollatorWithPadding(tokenizer)`.

    Raises:
        InputError: `max_length` leaves no room for a text.
    """
    limit = text_length_limit(tokenizer, config, max_length)
    size = sum(split.data.nbytes for split in data.splits.values())
    columns = [*data.text_columns]
    with few_progress_bars(size):
        tokenised = data.splits.map(
            _tokenize_batch,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer, "text_columns": columns, "max_length": limit},
            remove_columns=columns,
            num_proc=num_proc,
            desc="Tokenising",
        )
    for name, split in tokenised.items():
        cut = sum(map(sum, (batch[_CUT_COLUMN] for batch in split.select_columns([_CUT_COLUMN]).iter(1_000))))
        note = f"{cut:,} of {len(split):,} {name} texts are longer than {limit} tokens and are cut."
        if cut and note not in data.notes:
            data.notes.append(note)
            logger.warning(note)
    return tokenised.remove_columns(_CUT_COLUMN)


def text_length_limit(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig | None = None, max_length: int | None = None
) -> int:
    """The number of tokens a row may have: the least of what is asked for, what the tokenizer and the model say.

    Raises:
        InputError: `max_length` leaves no room for a text beside the special tokens.
    """
    special = tokenizer.num_special_tokens_to_add(pair=False)
    if max_length is not None and max_length <= special:
        raise InputError(
            f"--max_length must be more than the {special} special tokens of a text. Received: {max_length}"
        )
    positions = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [max_length] if max_length is not None else []
    if tokenizer.model_max_length < UNSET_LENGTH:
        limits.append(tokenizer.model_max_length)
    elif positions is None and max_length is None:
        limits.append(DEFAULT_LENGTH)
    if positions is not None:
        # Roberta and its like have 514 positions for 512 tokens, as they count from the padding index on.
        limits.append(max(positions - positions % 8, special + 1))
    return min(limits)


def ensure_padding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> str | None:
    """Gives a tokenizer without a padding token one, and tells the model; both are changed in place.

    Models like GPT-2 were never padded, yet a batch of texts needs it, and their classifiers read the last token that
    is not padding. The end-of-text token serves, as usual.

    Returns:
        What was done, in one line, or `None` where nothing was needed.

    Raises:
        InputError: The tokenizer has no token that could serve.
    """
    note = None
    if tokenizer.pad_token is None:
        token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
        if token is None:
            raise InputError("The tokenizer has no padding token, and no special token that could serve as one.")
        tokenizer.pad_token = token
        note = f'The tokenizer has no padding token; "{token}" serves as one.'
    for config in (model.config, model.config.get_text_config()):
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
    return note


def _tokenize_batch(
    batch: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerBase, text_columns: Sequence[str], max_length: int
) -> dict[str, Any]:
    texts = [list(batch[name]) for name in text_columns]
    encoded = tokenizer(*texts, truncation="longest_first", max_length=max_length)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    if encoded.encodings is not None:
        cut = [bool(encoding.overflowing) for encoding in encoded.encodings]
    else:  # tokenizers in Python do not say what they cut; a row that fills the limit to the last token likely was
        cut = [length == max_length for length in lengths]
    return {**encoded, LENGTH_COLUMN: lengths, _CUT_COLUMN: cut}
