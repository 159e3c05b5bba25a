"""What a range test of 100 steps costs beside 100 plain training steps and torch-lr-finder, in one run, alternating.

    python recipes/benchmarks/lr_range_cost.py --dataset ../shared/data/trec --label_column coarse_label

Needs the `benchmark` extra. All three train the same model with the same optimizer on batches of one length, over
rates at which nothing diverges, so that all take all their steps; each puts the weights back at the end, but for the
plain training. The order changes from round to round. torch-lr-finder has its own loop, in which gradients are not
clipped; `--max_grad_norm 0` takes clipping out of the others, too.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from torch import nn
from torch_lr_finder import LRFinder, TrainDataLoaderIter
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from ulmfit_tools import load_text_classification, lr_range_test
from ulmfit_tools.data import load_model_and_tokenizer, tokenize

MODEL = "minilm"
BATCH_SIZE, TOKENS = 16, 24
STEPS, ROUNDS = 100, 5
START_LR, END_LR = 1e-7, 1e-5


class LogitsOnly(nn.Module):
    """The model as torch-lr-finder calls it: a dictionary in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return self.model(**inputs).logits


class Batches(TrainDataLoaderIter):
    """Batches as torch-lr-finder takes them: inputs and labels."""

    def inputs_labels_from_batch(self, batch_data):
        inputs = dict(batch_data)
        return inputs, inputs.pop("labels")


def make_trainer(model: nn.Module, rows, collator, folder: str, steps: int, max_grad_norm: float) -> Trainer:
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=END_LR,
        max_steps=steps,
        max_grad_norm=max_grad_norm,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
    )
    return Trainer(model=model, args=args, train_dataset=rows, data_collator=collator)


def contestants(make: Callable[[], Trainer]) -> dict[str, Callable[[], object]]:
    def plain() -> None:
        make().train()

    def ours() -> None:
        trainer = make()
        curve = lr_range_test(trainer, start_lr=START_LR, end_lr=END_LR, num_steps=trainer.args.max_steps)
        assert curve.steps == trainer.args.max_steps, curve.stopped

    def peer() -> None:
        trainer = make()
        finder = LRFinder(LogitsOnly(trainer.model), trainer.create_optimizer(), nn.CrossEntropyLoss())
        batches = Batches(trainer.get_train_dataloader())
        finder.range_test(batches, start_lr=START_LR, end_lr=END_LR, num_iter=trainer.args.max_steps)
        assert len(finder.history["lr"]) == trainer.args.max_steps
        finder.reset()

    return {"plain training": plain, "lr_range_test": ours, "torch-lr-finder": peer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--label_column")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="0: nobody clips, as torch-lr-finder")
    flags = parser.parse_args()
    data = load_text_classification(flags.dataset, label_column=flags.label_column)
    model, tokenizer = load_model_and_tokenizer(flags.model, label_names=data.label_names)
    rows = tokenize(data, tokenizer, max_length=TOKENS)["train"]
    collator = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=TOKENS)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make = functools.partial(make_trainer, model, rows, collator, folder, flags.steps, flags.max_grad_norm)
        runs = list(contestants(make).items())
        runs[0][1]()  # the first training of a process allocates and is not counted
        for number in range(flags.rounds):
            shift = number % len(runs)
            for name, run in [*runs[shift:], *runs[:shift]]:
                start = time.perf_counter()
                run()
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    print_table(seconds, flags.steps)


def print_table(seconds: dict[str, list[float]], steps: int) -> None:
    table = Table(title=f"{steps} steps, batches of {BATCH_SIZE} x {TOKENS} tokens")
    for column in ("", "median", "from", "to", "median of the rounds' ratios to plain"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in seconds.items():
        ratios = [value / plain for value, plain in zip(values, seconds["plain training"], strict=True)]
        table.add_row(
            name,
            f"{statistics.median(values):.2f} s",
            f"{min(values):.2f}",
            f"{max(values):.2f}",
            f"{statistics.median(ratios):.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
