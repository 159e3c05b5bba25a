"""Which columns hold the text and the label: taken from the user, or guessed where one choice is sensible."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ulmfit_tools.errors import InputError, nearest

# Names in order of how surely they mean the text: the first tier with exactly one match decides.
TEXT_NAMES: tuple[frozenset[str], ...] = (
    frozenset({"text"}),
    frozenset({"sentence", "content", "document", "review", "question", "query", "utterance", "texts"}),
    frozenset(
        {"body", "comment", "tweet", "message", "description", "abstract", "post", "input", "title", "headline"}
    ),
)
LABEL_NAMES: tuple[frozenset[str], ...] = (
    frozenset({"label", "labels"}),
    frozenset({"class", "category", "intent", "topic", "sentiment", "emotion", "target", "tag", "y", "classes"}),
    frozenset({"stars", "rating", "score", "label_text", "label_name", "class_name", "output", "type"}),
)
TEXT_PAIRS: tuple[tuple[str, str], ...] = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question", "sentence"),
    ("question", "passage"),
)
MAX_CLASS_SHARE = 0.2  # a guessed label column repeats each of its values at least five times in the sample


@dataclass(frozen=True)
class Columns:
    """The columns to use, and what was guessed about them.

    Attributes:
        text: One column, or two for text pairs.
        label: The label column; `None` where only texts are wanted.
        notes: What was guessed, one line each, to be said aloud.
    """

    text: tuple[str, ...]
    label: str | None
    notes: tuple[str, ...] = field(default=())


def parse_text_columns(text_columns: str | Sequence[str] | None, available: Sequence[str]) -> tuple[str, ...] | None:
    """Reads what the user gave: a name, two names with a comma between them, or a list of one or two names.

    Raises:
        InputError: More than two columns, or a name twice.
    """
    if text_columns is None:
        return None
    if isinstance(text_columns, str):
        # A column may itself have a comma in its name.
        names = [text_columns] if text_columns in available else [name.strip() for name in text_columns.split(",")]
    else:
        names = list(text_columns)
    if not 1 <= len(names) <= 2 or len(set(names)) < len(names):
        raise InputError(f"Give one text column, or two different ones for text pairs. Received: {', '.join(names)}")
    return tuple(names)


def choose_columns(
    sample: Mapping[str, Sequence[Any]],
    *,
    where: str,
    text_columns: str | Sequence[str] | None = None,
    trained_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    trained_label: str | None = None,
    with_label: bool = True,
) -> Columns:
    """Chooses the text and label columns from a sample of rows.

    Args:
        sample: The first rows as column name -> values.
        where: What to call the data in messages, such as `train.csv`.
        text_columns: The user's choice, if any.
        trained_columns: Those that the model was trained on: taken where no choice is given and the data has them.
        label_column: The user's choice, if any.
        trained_label: The one that the model was trained on: as `trained_columns`.
        with_label: Whether a label column is wanted at all.

    Raises:
        InputError: A named column is missing, or a guess has no single sensible answer; the candidates are listed.
    """
    available = list(sample)
    given = parse_text_columns(text_columns, available)
    if given is None and trained_columns is not None and set(trained_columns) <= set(available):
        given = tuple(trained_columns)
    if label_column is None and trained_label in available and trained_label not in (given or ()):
        label_column = trained_label
    for name in [*(given or ()), *([label_column] if with_label and label_column is not None else [])]:
        require_column(name, available, where)
    notes = []
    label = label_column if with_label else None
    if label is not None and given is not None and label in given:
        raise InputError(f'Column "{label}" of {where} cannot be both text and label. Columns: {_listed(available)}')
    if with_label and label is None:
        label = _guess_label(sample, taken=given or (), where=where)
        notes.append(f'Label column: "{label}" (guessed; --label_column says otherwise).')
    if given is None:
        given = _guess_text(sample, taken=label, where=where)
        quoted = " and ".join(f'"{name}"' for name in given)
        notes.insert(
            0, f"Text column{'s' if len(given) > 1 else ''}: {quoted} (guessed; --text_column says otherwise)."
        )
    if "labels" in given and label != "labels":
        raise InputError(f'A text column of {where} is called "labels", the name of the classes later on. Rename it.')
    return Columns(text=given, label=label, notes=tuple(notes))


def require_column(name: str, available: Sequence[str], where: str) -> None:
    """Raises an `InputError` that lists the columns there are, unless `name` is one of them."""
    if name not in available:
        raise InputError(f'{where} has no column "{name}". Columns: {_listed(available)}.{nearest(name, available)}')


def _guess_text(sample: Mapping[str, Sequence[Any]], *, taken: str | None, where: str) -> tuple[str, ...]:
    strings = [name for name in sample if name != taken and _is_text(sample[name])]
    found = _first_tier(strings, TEXT_NAMES[:1])
    for pair in () if found else TEXT_PAIRS:
        both = sorted((name for name in strings if name.lower() in pair), key=lambda name: pair.index(name.lower()))
        if tuple(map(str.lower, both)) == pair:
            return tuple(both)
    found = found or _first_tier(strings, TEXT_NAMES[1:])
    if not found:
        # By type: the only column of strings, or the only one whose values look like sentences.
        found = strings if len(strings) == 1 else [name for name in strings if _looks_like_sentences(sample[name])]
    if len(found) == 1:
        return (found[0],)
    flag = "Name one with --text_column (text_columns=...), or two with a comma between them for text pairs"
    if found:
        raise InputError(f"{where} has several columns that could be the text: {_listed(found)}. {flag}.")
    raise InputError(f"No column of {where} is surely the text. Columns: {_listed(list(sample))}. {flag}.")


def _guess_label(sample: Mapping[str, Sequence[Any]], *, taken: Sequence[str], where: str) -> str:
    names = [name for name in sample if name not in taken and _is_scalar(sample[name])]
    found = _first_tier(names, LABEL_NAMES)
    if not found:
        found = [name for name in names if {"label", "class", "category"} & set(name.lower().split("_"))]
    if not found:
        surely_text = TEXT_NAMES[0] | TEXT_NAMES[1]
        found = [name for name in names if name.lower() not in surely_text and _has_few_values(sample[name])]
    if len(found) == 1:
        return found[0]
    flag = "Name one with --label_column (label_column=...)"
    if found:
        raise InputError(f"{where} has several columns that could be the label: {_listed(found)}. {flag}.")
    if where.endswith(".txt"):
        raise InputError(f'{where} has texts without labels. Write each line as "__label__NAME text".')
    others = [name for name in sample if not _is_scalar(sample[name])]
    unfit = f" Not one text or number a row, but lists, objects or dates: {_listed(others)}." if others else ""
    raise InputError(f"No column of {where} is surely the label. Columns: {_listed(list(sample))}.{unfit} {flag}.")


def _first_tier(names: Sequence[str], tiers: Sequence[frozenset[str]]) -> list[str]:
    for tier in tiers:
        found = [name for name in names if name.lower() in tier]
        if found:
            return found
    return []


def _present(values: Sequence[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def _is_text(values: Sequence[Any]) -> bool:
    # Mostly is enough: the reader names the row that is no text, which says more than "no text column".
    present = _present(values)
    return bool(present) and sum(isinstance(value, str) for value in present) >= len(present) / 2


def _is_scalar(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (str, int, float)) for value in _present(values))


def _looks_like_sentences(values: Sequence[Any]) -> bool:
    present = _present(values)
    return sum(isinstance(value, str) and " " in value.strip() for value in present) > len(present) / 2


def _has_few_values(values: Sequence[Any]) -> bool:
    present = _present(values)
    if not present or (_is_text(values) and _looks_like_sentences(values)):
        return False
    return len(set(present)) <= max(2, MAX_CLASS_SHARE * len(present))


def _listed(names: Sequence[str], limit: int = 20) -> str:
    shown = [name if len(name) <= 40 else name[:37] + "..." for name in names[:limit]]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
