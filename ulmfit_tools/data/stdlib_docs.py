"""`stdlib-docs`: the docstrings of Python's own standard library, labelled by what their module is about.

Real, imbalanced English texts that every Python has, so that a first run needs no download. The files are read with
`ast` and never imported. Other versions of Python have somewhat other texts; the split of each is always the same.
"""

import ast
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from ulmfit_tools.data.splitting import normalised, stratified_split
from ulmfit_tools.errors import InputError

# Topic -> modules, after the sections of the library reference, the smallest sections merged with their neighbours.
TOPICS: dict[str, str] = {
    "concurrency": "asyncio concurrent contextvars multiprocessing queue sched selectors subprocess threading "
    "_threading_local",
    "data types": "_collections_abc _strptime bisect calendar collections copy copyreg datetime _pydatetime enum "
    "graphlib heapq pprint reprlib types weakref _weakrefset zoneinfo",
    "development": "bdb cProfile code codeop cmd doctest pdb profile pstats pyclbr pydoc timeit trace traceback "
    "tracemalloc unittest",
    "file formats": "configparser csv html _markupbase json netrc plistlib tomllib xdrlib xml",
    "files": "_compression bz2 compression dbm filecmp fileinput fnmatch genericpath glob gzip linecache lzma ntpath "
    "pathlib pickle posixpath shelve shutil stat tarfile tempfile zipfile",
    "graphics": "colorsys tkinter turtle",
    "imports": "distutils ensurepip imp importlib modulefinder pkgutil py_compile compileall runpy site _sitebuiltins "
    "sysconfig venv zipapp zipimport",
    "language": "_py_abc abc annotationlib ast contextlib dataclasses dis functools inspect keyword opcode operator "
    "pickletools symtable tabnanny token tokenize typing",
    "mail": "base64 email imaplib mailbox mailcap mimetypes poplib quopri smtpd smtplib uu",
    "networking": "asynchat asyncore cgi cgitb ftplib http ipaddress nntplib socket socketserver ssl telnetlib urllib "
    "uuid webbrowser wsgiref xmlrpc",
    "numbers": "_pydecimal decimal fractions hashlib hmac numbers random secrets statistics",
    "system": "_pyio argparse ctypes curses getopt getpass io logging optparse os platform pty signal tty",
    "text": "codecs difflib encodings gettext locale re rlcompleter shlex string stringprep textwrap",
}
MIN_WORDS = 4
NEAR_DUPLICATE = 0.5  # share of common word triples from which two texts count as one
HELD_OUT = 0.1  # of all rows, for each of validation and test


def load_stdlib_docs() -> DatasetDict:
    """Reads the docstrings of the running interpreter's standard library.

    Returns:
        Splits `train`, `validation` and `test` (80, 10 and 10 %, stratified), in memory, with `text` and `label` (the
        topic). Texts that are the same or nearly so, as an overridden method's often are, lie in one split.

    Raises:
        InputError: The interpreter came without the sources of its standard library.
    """
    topics = sorted(TOPICS)
    rows = sorted((text, topics.index(topic)) for text, topic in _labelled_docstrings())
    labels = np.array([label for _, label in rows])
    if len(np.unique(labels)) < len(topics):
        raise InputError(
            "This Python came without the sources of its standard library, so there is no stdlib-docs. Give a file."
        )
    groups = near_duplicate_groups([text for text, _ in rows])
    rest, test = stratified_split(labels, HELD_OUT, 0, groups, label_names=topics)
    kept, held_out = stratified_split(labels[rest], HELD_OUT / (1 - HELD_OUT), 0, groups[rest], label_names=topics)
    features = Features({"text": Value("string"), "label": ClassLabel(names=topics)})
    return DatasetDict(
        {
            name: Dataset.from_dict(
                {"text": [rows[index][0] for index in indices], "label": labels[indices]}, features=features
            )
            for name, indices in {"train": rest[kept], "validation": rest[held_out], "test": test}.items()
        }
    )


def near_duplicate_groups(texts: Sequence[str]) -> np.ndarray:
    """Numbers texts so that those which share at least half of their word triples have the same number.

    The measure is Jaccard's: common triples over all triples of both. It is exact, over all pairs, by one sparse
    product; nearness is passed on, so that a chain of near-duplicates is one group.

    Args:
        texts: A few thousand texts; the product grows with the pairs that share a triple.

    Returns:
        The number of each text's group, shape (texts,).
    """
    # The edges are marked, so that texts of one or two words have triples too.
    vectorizer = CountVectorizer(
        preprocessor=lambda text: f"^ {normalised(text)} $", token_pattern=r"\S+", ngram_range=(3, 3), binary=True
    )
    triples = vectorizer.fit_transform(texts).astype(np.int32)
    sizes = triples.getnnz(axis=1)
    common = (triples @ triples.T).tocoo()
    near = common.data >= NEAR_DUPLICATE * (sizes[common.row] + sizes[common.col] - common.data)
    common.data = near.astype(np.int32)
    common.eliminate_zeros()
    return connected_components(common, directed=False)[1]


def tfidf_baseline(splits: DatasetDict, *, text_column: str = "text", label_column: str = "labels") -> float:
    """The test accuracy of TF-IDF and logistic regression: what a fine-tuned model must beat to be worth its while.

    Words and word pairs with logarithmic counts; the strength of regularisation is the best of three on `validation`.

    Args:
        splits: `train`, `validation` and `test`.
        text_column: The column of texts.
        label_column: The column of class indices.
    """
    texts = {name: list(split[text_column]) for name, split in splits.items()}
    labels = {name: np.array(split[label_column]) for name, split in splits.items()}
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    train = vectorizer.fit_transform(texts["train"])
    validation = vectorizer.transform(texts["validation"])
    models = [LogisticRegression(C=strength, max_iter=1000).fit(train, labels["train"]) for strength in (10, 30, 100)]
    best = max(models, key=lambda model: model.score(validation, labels["validation"]))
    return float(best.score(vectorizer.transform(texts["test"]), labels["test"]))


def _labelled_docstrings() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for topic, modules in TOPICS.items():
        for module in modules.split():
            folder = root / module
            files = [root / f"{module}.py", *(folder.rglob("*.py") if folder.is_dir() else [])]
            for file in files:
                inside = file.relative_to(root).parts
                if file.is_file() and not {"test", "tests", "site-packages"} & set(inside):
                    yield from ((text, topic) for text in _docstrings(file))


def _docstrings(file: Path) -> Iterator[str]:
    """The docstrings of a module and all that is in it, with enough words to say what it is about."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text.split()) >= MIN_WORDS:
                yield text
