"""Datasets with a rare class, from the ones at hand, as CSV files: a new head first learns how rare it is.

    python recipes/benchmarks/unequal_tasks.py runs/unequal_tasks
    python recipes/benchmarks/lr_suggestions.py curves --data runs/unequal_tasks --tasks sst2-90.csv

Whether a question of TREC asks for a human being (two in nine do); SST-2 with one row in ten of one of its classes;
and whether a text of CLINC150 has one of ten of its 150 intents (one in fifteen).
"""

import argparse
import os
from pathlib import Path

import numpy as np
import pandas as pd
from lr_starts import TASKS

from ulmfit_tools.data import load_text_classification


def read(folder: Path, task: str) -> pd.DataFrame:
    """All rows of a task, of whatever split, with the names of their labels."""
    settings = dict(TASKS[task])
    data = load_text_classification(str(folder / settings.pop("source")), **settings)
    rows = pd.concat([split.to_pandas() for split in data.splits.values()])
    text = next(name for name in rows.columns if name != "labels")
    labels = [data.label_names[label] for label in rows["labels"]]
    return pd.DataFrame({"text": rows[text], "label": labels}).drop_duplicates("text")


def one_in_ten(rows: pd.DataFrame) -> pd.DataFrame:
    """The commoner of two classes, and a ninth as many rows of the other."""
    common, rare = rows["label"].value_counts().index
    most = rows[rows["label"] == common]
    return pd.concat([most, rows[rows["label"] == rare].sample(len(most) // 9, random_state=0)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the CSV files go")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ULMFIT_TOOLS_DATA", "../shared/data")))
    options = parser.parse_args()
    questions, texts = read(options.data, "trec"), read(options.data, "clinc150")
    intents = sorted(set(texts["label"]) - {"oos"})[::15]
    tasks = {
        "trec-hum": questions.assign(label=np.where(questions["label"].str.startswith("HUM"), "yes", "no")),
        "sst2-90": one_in_ten(read(options.data, "sst2")),
        "clinc-rare": texts.assign(label=np.where(texts["label"].isin(intents), "yes", "no")),
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tasks.items():
        rows.sample(frac=1, random_state=0).to_csv(options.folder / f"{name}.csv", index=False)
        shares = rows["label"].value_counts(normalize=True)
        print(f"{name}: {len(rows):,} rows, shares {', '.join(f'{share:.3f}' for share in shares)}")


if __name__ == "__main__":
    main()
