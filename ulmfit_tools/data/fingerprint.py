"""A hash of data that depends on nothing but the data."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import pyarrow.compute as pc
from datasets import Dataset


def content_fingerprint(splits: Mapping[str, Dataset], text_columns: Sequence[str], header: Sequence[object]) -> str:
    """A SHA-256 of rows and their meaning that depends on nothing but them: no path, no cache, no batch size.

    Args:
        splits: The splits, with the text columns and `labels`; read in batches.
        text_columns: The columns that are hashed beside `labels`.
        header: What else the data means, such as the label names; JSON values.

    Returns:
        64 hexadecimal digits.
    """
    total = hashlib.sha256(json.dumps([*header, {name: len(split) for name, split in splits.items()}]).encode())
    for split in splits.values():
        hashes = [hashlib.sha256() for _ in range(2 * len(text_columns) + 1)]
        for table in split.with_format("arrow").iter(batch_size=1_000):
            for place, name in enumerate(text_columns):
                texts = table.column(name)
                # Lengths beside the joined bytes: "ab", "c" and "a", "bc" must differ.
                hashes[2 * place].update(pc.binary_length(texts).to_numpy().astype("<i8").tobytes())
                hashes[2 * place + 1].update("".join(texts.to_pylist()).encode())
            hashes[-1].update(table.column("labels").to_numpy().astype("<i8").tobytes())
        for part in hashes:
            total.update(part.digest())
    return total.hexdigest()
