"""Starts of training for `lr_suggestions.py`: which rows, model and head, and the trainers that begin there."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets
from transformers import DataCollatorWithPadding, PrinterCallback, set_seed

from ulmfit_tools import freeze_to
from ulmfit_tools.data import load_model_and_tokenizer, load_text_classification, tokenize
from ulmfit_tools.trainer import ULMFiTTrainer, ULMFiTTrainingArguments

MODEL, LAYERS = "minilm", 6
TASKS: dict[str, dict[str, Any]] = {
    "trec": {"source": "trec", "text_columns": "text", "label_column": "coarse_label"},
    "sst2": {"source": "sst2", "text_columns": "sentence", "label_column": "label"},
    "clinc150": {"source": "clinc150", "text_columns": "text", "label_column": "intent"},
    "stdlib-docs": {"source": "stdlib-docs"},
    "trec-fine": {"source": "trec", "text_columns": "text", "label_column": "fine_label"},
    "reviews": {"source": "movie_reviews_long", "text_columns": "text", "label_column": "label"},  # their beginnings
    "clinc20": {"source": "clinc150", "text_columns": "text", "label_column": "intent", "every": 7, "classes": 20},
}
TRAIN_ROWS, MAX_LENGTH = 1000, 64
EPOCHS, BATCH_SIZE = 3, 16
HEAD_RATE = 1e-3
# Of starts drawn at random: rows, epochs and batch size; layers of the model; whether the head is trained.
SIZES = [(1000, 3, 16), (1000, 3, 16), (300, 5, 16), (500, 3, 8), (1500, 2, 32), (1000, 6, 16), (1000, 3, 32)]
DEPTHS = [6, 6, 3, 6, 2, 6, 4]
TRAINED = [False, False, True, False, True, False, False]


@dataclass(frozen=True)
class Case:
    """One start of training: what is trained on what, but not at which rate."""

    task: str
    seed: int
    discriminative: bool
    trained_head: bool = False
    layers: int = LAYERS
    train_rows: int = TRAIN_ROWS
    epochs: int = EPOCHS
    batch_size: int = BATCH_SIZE
    model: str = MODEL

    def key(self, kind: str, **more: Any) -> dict[str, Any]:
        """What names a result of this case."""
        return {"kind": kind, **asdict(self), **more}

    def __str__(self) -> str:
        text = f"{self.task}, seed {self.seed}" + ", discriminative" * self.discriminative
        text += f", {self.layers} layers" * (self.layers != LAYERS) + ", trained head" * self.trained_head
        size = (self.train_rows, self.epochs, self.batch_size)
        text += f", {size}" * (size != (TRAIN_ROWS, EPOCHS, BATCH_SIZE))
        return text + f", {self.model}" * (self.model != MODEL)


class Tasks:
    """The tokenised rows of each task, read once, and what trains on them."""

    def __init__(self, data_folder: Path, bf16: bool, held_out_rows: int, model: str = MODEL) -> None:
        self.data_folder = data_folder
        self.model = model
        self.bf16 = bf16
        self.held_out_rows = held_out_rows
        self.tokenizer = load_model_and_tokenizer(model, label_names=["no", "yes"])[1]
        self.trained_heads: dict[Case, dict[str, torch.Tensor]] = {}
        self._loaded: dict[str, Any] = {}

    def load(self, case: Case) -> tuple[Any, Any, list[str]]:
        """Training rows (drawn by the case's seed), held-out ones (of all the others), the names of the classes."""
        if case.task not in self._loaded:
            settings = dict(TASKS.get(case.task, {"source": case.task}))
            source, every, classes = settings.pop("source"), settings.pop("every", 1), settings.pop("classes", None)
            local = source if source == "stdlib-docs" else str(self.data_folder / source)
            data = load_text_classification(local, **settings)
            names = data.label_names[::every][:classes]
            numbers = {data.label_names.index(name): number for number, name in enumerate(names)}
            rows = tokenize(data, self.tokenizer, max_length=MAX_LENGTH)
            if len(names) < len(data.label_names):
                rows = rows.filter(lambda row: row["labels"] in numbers)
                rows = rows.map(lambda row: {"labels": numbers[row["labels"]]})
            others = [rows[name] for name in ("validation", "test") if name in rows]
            self._loaded[case.task] = rows["train"], concatenate_datasets(others), names
        train, others, label_names = self._loaded[case.task]
        chosen = stratified_rows(train["labels"][:], case.train_rows, case.seed)
        left = concatenate_datasets([train.select(sorted(set(range(len(train))) - set(chosen))), others])
        lengths = [len(ids) for ids in left["input_ids"][:]]
        held_out = sorted(stratified_rows(left["labels"][:], self.held_out_rows, seed=0), key=lengths.__getitem__)
        return train.select(chosen), left.select(held_out), label_names


def stratified_rows(labels: list[int], rows: int, seed: int) -> list[int]:
    """So many rows (all, where there are fewer), each class in its share."""
    generator = np.random.default_rng(seed)
    classes = np.asarray(labels)
    place = np.empty(len(classes))
    for label in np.unique(classes):
        members = generator.permutation(np.flatnonzero(classes == label))
        place[members] = (np.arange(len(members)) + generator.random()) / len(members)
    return sorted(np.argsort(place, kind="stable")[:rows].tolist())


def make_trainer(case: Case, tasks: Tasks, folder: str, rate: float = 1e-4) -> ULMFiTTrainer:
    """A trainer at the start of its run: the head is drawn from the seed, or trained alone from there."""
    if case.trained_head and case not in tasks.trained_heads:
        head_trainer = new_trainer(case, tasks, folder, HEAD_RATE, epochs=1)
        freeze_to(head_trainer.model, -1)
        head_trainer.train()
        tasks.trained_heads[case] = head_trainer.model.state_dict()
    trainer = new_trainer(case, tasks, folder, rate, epochs=case.epochs)
    if case.trained_head:
        trainer.model.load_state_dict(tasks.trained_heads[case])
    return trainer


def new_trainer(case: Case, tasks: Tasks, folder: str, rate: float, epochs: int) -> ULMFiTTrainer:
    """A trainer of the pretrained model that saves and logs nothing."""
    _, _, label_names = tasks.load(case)
    set_seed(case.seed)
    model, _ = load_model_and_tokenizer(tasks.model, label_names=label_names)
    encoder: Any = model.base_model.encoder
    encoder.layer = encoder.layer[: case.layers]
    return trainer_of(model, case, tasks, folder, rate, epochs)


def trainer_of(model: Any, case: Case, tasks: Tasks, folder: str, rate: float, epochs: int) -> ULMFiTTrainer:
    """A trainer of any model on the rows of a case."""
    train, held_out, _ = tasks.load(case)
    args = ULMFiTTrainingArguments(
        output_dir=folder,
        learning_rate=rate,
        discriminative_factor=None if case.discriminative else 1.0,
        num_train_epochs=epochs,
        per_device_train_batch_size=case.batch_size,
        per_device_eval_batch_size=64,
        seed=case.seed,
        bf16=tasks.bf16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = ULMFiTTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tasks.tokenizer,
        data_collator=DataCollatorWithPadding(tasks.tokenizer),
        compute_metrics=lambda scored: {"accuracy": float((scored[0].argmax(-1) == scored[1]).mean())},
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def mixed_cases() -> Iterator[Case]:
    """Starts drawn at random, without end; in each seven every task, size, depth and kind of head has its turn."""
    draw = random.Random(7)
    for seed in itertools.count(10):
        tasks, sizes, rates = list(TASKS), SIZES[:], [False, True] * 4
        for choices in (tasks, sizes):
            draw.shuffle(choices)
        heads, depths = TRAINED[:], DEPTHS[:]
        for choices in (rates, heads, depths):
            draw.shuffle(choices)
        for task, size, discriminative, head, depth in zip(tasks, sizes, rates, heads, depths, strict=False):
            yield Case(task, seed, discriminative, head, depth, *size)
