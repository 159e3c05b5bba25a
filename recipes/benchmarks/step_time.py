"""What discriminative rates and length grouping cost or save against plain `Trainer`, in one run, alternating.

    python recipes/benchmarks/step_time.py --dataset ../shared/data/trec --label_column coarse_label

Each round trains the same number of steps (rates) or one epoch (batches) with either; the median of the rounds' ratios
is printed, and the ratio of the medians beside it.
"""

import argparse
import statistics
import tempfile
import time

from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from ulmfit_tools import ULMFiTTrainer, ULMFiTTrainingArguments, discriminative_optimizer, load_text_classification
from ulmfit_tools.data import load_model_and_tokenizer, tokenize

MODEL = "minilm"
ROUNDS = 5
STEPS = 40
WARMUP = 5  # steps of each training that are not counted: the first ones allocate


class Stopwatch(TrainerCallback):
    """Seconds from the end of step WARMUP to the end of the last step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARMUP:
            self.start = time.perf_counter()
        self.seconds = time.perf_counter() - getattr(self, "start", time.perf_counter())


def measure(trainer_class, arguments_class, model, rows, collator, optimizer=None, **settings) -> float:
    with tempfile.TemporaryDirectory() as folder:
        common = {"per_device_train_batch_size": 32, "save_strategy": "no", "disable_tqdm": True, "report_to": "none"}
        pin = {"dataloader_pin_memory": False}
        args = arguments_class(folder, **common, **pin, **settings)
        more = {"optimizer_cls_and_kwargs": optimizer(args)} if optimizer else {}
        watch = Stopwatch()
        trainer_class(
            model=model, args=args, train_dataset=rows, data_collator=collator, callbacks=[watch], **more
        ).train()
        return watch.seconds


def compare(name: str, plain, ours, rounds: int) -> None:
    pairs = []
    for number in range(rounds):
        order = [plain, ours] if number % 2 == 0 else [ours, plain]
        seconds = {run: run() for run in order}
        pairs.append((seconds[plain], seconds[ours]))
    ratios = [b / a for a, b in pairs]
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    print(
        f"{name}: median of {rounds} paired ratios {statistics.median(ratios):.3f} "
        f"(from {min(ratios):.3f} to {max(ratios):.3f}); medians {medians[0]:.2f} s plain, {medians[1]:.2f} s ours, "
        f"ratio {medians[1] / medians[0]:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--label_column")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    flags = parser.parse_args()
    data = load_text_classification(flags.dataset, label_column=flags.label_column)
    model, tokenizer = load_model_and_tokenizer(flags.model, label_names=data.label_names)
    rows = tokenize(data, tokenizer)["train"]
    collator = DataCollatorWithPadding(tokenizer)
    common = (model, rows, collator)
    steps = {"max_steps": flags.steps + WARMUP, "learning_rate": 1e-5}
    compare(
        "a step with a rate for each layer group",
        lambda: measure(Trainer, TrainingArguments, *common, **steps),
        lambda: measure(Trainer, TrainingArguments, *common, **steps, optimizer=discriminative_optimizer),
        flags.rounds,
    )
    epoch = {"num_train_epochs": 1, "learning_rate": 1e-5}
    compare(
        "an epoch in batches of like length",
        lambda: measure(Trainer, TrainingArguments, *common, **epoch),
        lambda: measure(ULMFiTTrainer, ULMFiTTrainingArguments, *common, **epoch),
        max(1, flags.rounds // 2),
    )


if __name__ == "__main__":
    main()
