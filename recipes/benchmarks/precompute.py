"""What precomputed activations save: rows a second against plain `Trainer` with the same layers frozen, in one run.

    python recipes/benchmarks/precompute.py --dataset ../shared/data/trec --label_column coarse_label

Both sides are plain `Trainer`s with the same batches; in each round they take turns. The limit is what the arithmetic
of the blocks allows: a block costs 1 forwards and 2 backwards, a frozen one 1, a precomputed one nothing. A pass over
the frozen layers pays after `seconds to build / (seconds of a plain epoch - seconds of an epoch from activations)`
epochs.
"""

import argparse
import statistics
import tempfile
import time

from rich.console import Console
from rich.table import Table
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from ulmfit_tools import Phase, layer_groups, load_text_classification
from ulmfit_tools.data import load_model_and_tokenizer, tokenize
from ulmfit_tools.feature_cache import precomputed
from ulmfit_tools.freezing import set_trainable

MODEL = "minilm"
TRAIN = ["head", "top_half"]
BATCH_SIZE, ROUNDS = 32, 3
PLAIN_STEPS, CACHED_STEPS = 30, 150
WARMUP = 5  # steps of each training that are not counted: the first ones allocate


class Stopwatch(TrainerCallback):
    """Seconds from the end of step WARMUP to the end of the last step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARMUP:
            self.start = time.perf_counter()
        self.seconds = time.perf_counter() - getattr(self, "start", time.perf_counter())


def make_trainer(model, rows, collator, folder: str, steps: int, bf16: bool) -> Trainer:
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=steps + WARMUP,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        bf16=bf16,
    )
    return Trainer(model=model, args=args, train_dataset=rows, data_collator=collator, callbacks=[Stopwatch()])


def seconds_a_step(trainer: Trainer) -> float:
    trainer.train()
    watch = next(one for one in trainer.callback_handler.callbacks if isinstance(one, Stopwatch))
    return watch.seconds / (trainer.args.max_steps - WARMUP)


def compare(train: str, model, rows, collator, flags: argparse.Namespace) -> list[str]:
    groups = layer_groups(model)
    trained = Phase(name=train, train=train).groups_to_train(groups.names)
    set_trainable(model, groups, trained)
    plain, ours, builds = [], [], []
    for _ in range(flags.rounds):
        with tempfile.TemporaryDirectory() as folder:
            plain.append(seconds_a_step(make_trainer(model, rows, collator, folder, flags.plain_steps, flags.bf16)))
            trainer = make_trainer(model, rows, collator, folder, flags.cached_steps, flags.bf16)
            with precomputed(trainer, cache_dir=f"{folder}/cache") as report:
                builds.append(report.seconds)
                ours.append(seconds_a_step(trainer))
    steps = len(rows) / BATCH_SIZE
    times = [statistics.median(values) for values in (plain, ours, builds)]
    blocks = len(groups) - 2  # between the embeddings and the head
    on_top = min(len(trained) - 1, blocks)
    limit = (blocks + 2 * on_top) / (3 * on_top) if on_top else float("inf")
    return [
        train,
        f"{BATCH_SIZE / times[0]:.0f}",
        f"{BATCH_SIZE / times[1]:.0f}",
        f"{times[0] / times[1]:.2f} ({min(a / b for a, b in zip(plain, ours, strict=True)):.2f} to "
        f"{max(a / b for a, b in zip(plain, ours, strict=True)):.2f})",
        f"{limit:.2f}",
        f"{times[2]:.1f} s",
        f"{times[2] / (steps * (times[0] - times[1])):.2f}",
        f"{report.nbytes / 2**20:.1f} MiB ({report.form})",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--label_column")
    parser.add_argument("--max_length", type=int)
    parser.add_argument("--train_rows", type=int, help="the pass takes so many rows; default: all")
    parser.add_argument("--train", nargs="+", default=TRAIN)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--plain_steps", type=int, default=PLAIN_STEPS)
    parser.add_argument("--cached_steps", type=int, default=CACHED_STEPS)
    parser.add_argument("--bf16", action="store_true")
    flags = parser.parse_args()
    data = load_text_classification(flags.dataset, label_column=flags.label_column)
    model, tokenizer = load_model_and_tokenizer(flags.model, label_names=data.label_names)
    rows = tokenize(data, tokenizer, max_length=flags.max_length)["train"]
    if flags.train_rows is not None:
        rows = rows.shuffle(seed=0).select(range(flags.train_rows))
    table = Table(title=f"{flags.dataset}, {len(rows)} rows, batches of {BATCH_SIZE}")
    for column in ("trains", "rows/s plain", "rows/s precomputed", "ratio (from, to)", "limit", "build", "pays after"):
        table.add_column(column, justify="left" if column == "trains" else "right")
    table.add_column("on disk", justify="right")
    for train in flags.train:
        table.add_row(*compare(train, model, rows, DataCollatorWithPadding(tokenizer), flags))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
