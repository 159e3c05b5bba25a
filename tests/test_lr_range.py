"""The range test goes through the trainer's own steps, says what it should, and leaves nothing behind."""

import copy
import json
import math
import random
from types import MethodType
from typing import ClassVar

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from tiny import pad_rows, ragged_rows, tiny_bert, token_rows
from tiny_text import tiny_tokenizer
from torch import nn
from transformers import (
    Adafactor,
    BertForMaskedLM,
    BertForMultipleChoice,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ulmfit_tools import lr_range, rehearsal
from ulmfit_tools.data.augmentation import Augmentation, augmented
from ulmfit_tools.errors import InputError
from ulmfit_tools.freezing import freeze_to
from ulmfit_tools.layers import layer_groups
from ulmfit_tools.lr_curve import LRCurve
from ulmfit_tools.lr_range import find_learning_rate, lr_range_test, set_learning_rate, sweep_rates
from ulmfit_tools.param_groups import discriminative_optimizer
from ulmfit_tools.trainer import ULMFiTTrainer, ULMFiTTrainingArguments

SETTINGS = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
}
KINDS = [(Trainer, TrainingArguments), (ULMFiTTrainer, ULMFiTTrainingArguments)]
SHORT = {"num_steps": 24, "start_lr": 1e-5, "end_lr": 1e-1}


def make_trainer(folder, kind=Trainer, model=None, trainer=None, **settings):
    """A trainer over ragged rows and a model with dropout; the same call gives the same trainer."""
    arguments = ULMFiTTrainingArguments if issubclass(kind, ULMFiTTrainer) else TrainingArguments
    trainer = dict(trainer or {})
    set_seed(0)
    model = tiny_bert() if model is None and "model_init" not in trainer else model
    args = arguments(output_dir=str(folder), **SETTINGS | settings)
    data = {"train_dataset": ragged_rows(64), "eval_dataset": ragged_rows(20, seed=5), "data_collator": pad_rows}
    return kind(model=model, args=args, **data | trainer)


def end_of_training(trainer):
    """All that a training comes to: weights, optimizer, log without times, random numbers."""
    trainer.train()
    log = [
        {k: v for k, v in entry.items() if "runtime" not in k and "second" not in k}
        for entry in trainer.state.log_history
    ]
    state = trainer.optimizer.state_dict()
    moments = [value for values in state["state"].values() for value in values.values()]
    return {
        "weights": [tensor.clone() for tensor in trainer.model.state_dict().values()],
        "moments": moments,
        "rates": [group["lr"] for group in state["param_groups"]],
        "log": log,
        "python": random.random(),
        "numpy": np.random.rand(),  # noqa: NPY002
        "torch": [torch.get_rng_state()],
    }


def assert_same(one, other):
    for key, value in one.items():
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            assert len(value) == len(other[key])
            assert all(torch.equal(a, b) for a, b in zip(value, other[key], strict=True)), key
        else:
            assert value == other[key], key


# ---- Training after a range test equals training without one -------------------------------------------------------

CASES = {
    "plain": ({}, {}),
    "accumulation": ({"gradient_accumulation_steps": 3}, {}),
    "bf16": ({"bf16": True}, {}),
    "grouped": ({"train_sampling_strategy": "group_by_length"}, {}),
    "linear": ({}, {"mode": "linear"}),
    "evaluation": ({}, {"eval_batches": 2}),
    "confirmed": ({}, {"confirm": True}),
    "three sweeps": ({}, {"num_sweeps": 3}),
    "on disk": ({}, {"on disk": True}),
    "workers": ({"dataloader_num_workers": 1}, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", [Trainer, ULMFiTTrainer])
def test_training_after_it_is_training_without_it(kind, case, tmp_path):
    settings, test = CASES[case]
    settings = {"train_sampling_strategy": "random", **settings}
    if test.get("on disk"):
        test = {"offload_folder": tmp_path}
    without = end_of_training(make_trainer(tmp_path / "a", kind, **settings))
    trainer = make_trainer(tmp_path / "a", kind, **settings)
    curve = lr_range_test(trainer, **SHORT, **test)
    assert len(curve.rates) > 5
    assert_same(without, end_of_training(trainer))


@pytest.mark.parametrize("kind", [Trainer, ULMFiTTrainer])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_same_after_an_error_in_the_middle(kind, error, tmp_path, monkeypatch):
    without = end_of_training(make_trainer(tmp_path, kind))
    trainer = make_trainer(tmp_path, kind)
    calls = []

    def raising(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 12:
            raise error
        return compute_loss(self, *args, **kwargs)

    compute_loss = kind.compute_loss
    monkeypatch.setattr(kind, "compute_loss", raising)
    with pytest.raises(error):
        lr_range_test(trainer, **SHORT)
    monkeypatch.undo()
    assert_same(without, end_of_training(trainer))


@pytest.mark.parametrize("kind", [Trainer, ULMFiTTrainer])
def test_between_two_trainings(kind, tmp_path):
    """The second training goes on with the optimizer and its state; the test in between is not seen."""
    ends = []
    for tested in (False, True):
        trainer = make_trainer(tmp_path, kind)
        trainer.train()
        if tested:
            lr_range_test(trainer, **SHORT)
        ends.append(end_of_training(trainer))
    assert_same(*ends)


def test_with_an_optimizer_and_schedule_that_were_passed(tmp_path):
    ends = []
    for tested in (False, True):
        set_seed(0)
        model = tiny_bert()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        trainer = make_trainer(tmp_path, model=model, trainer={"optimizers": (optimizer, schedule)})
        if tested:
            rates, step = [group["lr"] for group in optimizer.param_groups], optimizer.step
            curve = lr_range_test(trainer, **SHORT)
            assert [group["lr"] for group in optimizer.param_groups] == rates
            assert optimizer.step == step
            assert curve.rates[0] == 1e-5
        ends.append(end_of_training(trainer))
    assert_same(*ends)


def groups_as_lists(model):
    return [
        {"params": [*model.bert.parameters()], "lr": 1e-5},
        {"params": [*model.classifier.parameters()]},  # at the rate of all
    ]


def groups_as_iterators(model):
    return (
        group for group in ({"params": model.bert.parameters(), "lr": 1e-5}, {"params": model.classifier.parameters()})
    )


@pytest.mark.parametrize("kind", [Trainer, ULMFiTTrainer])
@pytest.mark.parametrize("make", [groups_as_lists, groups_as_iterators])
def test_with_parameter_groups_that_were_passed(make, kind, tmp_path):
    ends = []
    for tested in (False, True):
        set_seed(0)
        model = tiny_bert()
        given = (torch.optim.AdamW, {"params": make(model), "lr": 1e-3})
        settings = {"lr_scheduler_type": "constant"}
        trainer = make_trainer(tmp_path, kind, model, {"optimizer_cls_and_kwargs": given}, **settings)
        if tested:
            curve = lr_range_test(trainer, confirm=True, **SHORT)
            assert curve.rate_norm == pytest.approx((5 * 0.01**2 + 1) ** 0.5)  # of 6 layer groups
        ends.append(end_of_training(trainer))
        assert ends[-1]["rates"] == [1e-5, 1e-3]
    assert_same(*ends)


class Remembering(Trainer):
    """Draws from a generator of its own, and keeps count in attributes and in an object."""

    def __init__(self, *args, **kwargs):
        self.gen, self.seen, self.calls = torch.Generator().manual_seed(0), [], 0
        super().__init__(*args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.calls += 1
        self.seen.append(loss.item() if isinstance(loss, torch.Tensor) else None)
        return loss * torch.rand((), generator=self.gen) if isinstance(loss, torch.Tensor) else loss


class CountingLoss:
    """A loss with a state."""

    def __init__(self):
        self.calls = []

    def __call__(self, outputs, labels, num_items_in_batch=None):
        self.calls.append(len(labels))
        return torch.nn.functional.cross_entropy(outputs.logits, labels) * (1 + len(self.calls) / 100)


class NoisyCollator:
    """Leaves a random part of each text out."""

    def __init__(self):
        self.generator, self.calls = np.random.default_rng(0), []

    def __call__(self, rows):
        self.calls.append(len(rows))
        kept = self.generator.integers(2, 5)
        cut = [{k: v if k == "labels" else v[:kept] for k, v in row.items()} for row in rows]
        return pad_rows(cut)


def remembering_trainer(folder):
    set_seed(0)
    args = TrainingArguments(output_dir=str(folder), **SETTINGS)
    loss, collator = CountingLoss(), NoisyCollator()
    data = {"train_dataset": ragged_rows(64), "data_collator": collator}
    return Remembering(model=tiny_bert(), args=args, compute_loss_func=loss, **data), loss, collator


def test_the_objects_of_the_trainer_stay_as_they_were(tmp_path):
    without = end_of_training(remembering_trainer(tmp_path)[0])
    trainer, loss, collator = remembering_trainer(tmp_path)
    seen, calls = trainer.seen, loss.calls
    with augmented(trainer, Augmentation(drop=0.1), tiny_tokenizer()):  # its collator holds the trainer's
        lr_range_test(trainer, confirm=True, **SHORT)
    lr_range_test(trainer, **SHORT)
    assert trainer.seen is seen
    assert loss.calls is calls
    assert (seen, calls, trainer.calls, collator.calls) == ([], [], 0, [])
    assert_same(without, end_of_training(trainer))


def test_with_a_model_that_the_trainer_makes(tmp_path):
    ends = []
    for tested in (False, True):
        trainer = make_trainer(tmp_path, trainer={"model_init": lambda: tiny_bert()})
        model = trainer.model
        if tested:
            lr_range_test(trainer, **SHORT)
        assert trainer.model is model
        ends.append(end_of_training(trainer))
    assert_same(*ends)


def test_the_trainer_itself_stays_as_it_was(tmp_path):
    trainer = make_trainer(tmp_path, ULMFiTTrainer)
    before = dict(vars(trainer))
    state, control = copy.deepcopy(trainer.state), copy.deepcopy(trainer.control)
    args, callbacks = trainer.args.to_dict(), list(trainer.callback_handler.callbacks)
    lr_range_test(trainer, confirm=True, eval_batches=1, **SHORT)
    assert vars(trainer) == before
    assert trainer.state == state
    assert trainer.control == control
    assert trainer.args.to_dict() == args
    assert trainer.callback_handler.callbacks == callbacks
    assert not list(tmp_path.iterdir())
    assert "forward" not in vars(trainer.model)


class Loud(TrainerCallback):
    """Fails at every event of a training."""

    def on_train_begin(self, *_, **__):
        raise AssertionError

    on_step_begin = on_step_end = on_log = on_evaluate = on_save = on_train_end = on_epoch_end = on_train_begin


def test_no_callback_log_evaluation_or_checkpoint(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"load_best_model_at_end": True, "eval_on_start": True, "logging_first_step": True}
    trainer = make_trainer(tmp_path, trainer={"callbacks": [Loud()]}, **settings)
    lr_range_test(trainer, **SHORT)
    assert trainer.state.log_history == []
    assert not list(tmp_path.iterdir())


# ---- What is swept --------------------------------------------------------------------------------------------------


def test_rates_of_the_steps_by_hand():
    assert sweep_rates(1e-4, 1e-2, 21, "exponential")[::10] == pytest.approx([1e-4, 1e-3, 1e-2])
    assert sweep_rates(0.1, 0.3, 21, "linear")[::10] == pytest.approx([0.1, 0.2, 0.3])


class Watching(Trainer):
    """Notes the rates of all optimizer groups, and counts batches; in its class, as its attributes are put back."""

    seen: ClassVar = []

    def training_step(self, *args, **kwargs):
        self.seen.append([group["lr"] for group in self.optimizer.param_groups])
        return super().training_step(*args, **kwargs)


def watching(folder, **settings):
    args = TrainingArguments(output_dir=str(folder), **SETTINGS | settings)
    Watching.seen = []
    set_seed(0)
    return Watching(
        model=tiny_bert(),
        args=args,
        train_dataset=token_rows(64),
        optimizer_cls_and_kwargs=discriminative_optimizer(args, factor=2.0),
    )


def test_one_multiplier_over_all_groups(tmp_path):
    trainer = watching(tmp_path)
    curve = lr_range_test(trainer, **SHORT)
    seen = np.array(trainer.seen)
    groups = len(layer_groups(trainer.model))
    ratios = 2.0 ** -np.arange(groups)[::-1]
    assert seen.shape == (len(curve.rates) + 1, groups)
    assert seen / seen[:, -1:] == pytest.approx(np.tile(ratios, (len(seen), 1)))
    assert seen[:-1, -1] == pytest.approx(curve.rates)
    assert curve.rate_norm == pytest.approx(sum(4.0**-n for n in range(groups)) ** 0.5)


def test_the_share_of_the_rates_counts_the_groups_that_train(tmp_path):
    assert lr_range_test(make_trainer(tmp_path), **SHORT).rate_norm == pytest.approx(
        6**0.5
    )  # one rate for all of 6 layer groups
    trainer = watching(tmp_path)
    freeze_to(trainer.model, -2)
    assert lr_range_test(trainer, **SHORT).rate_norm == pytest.approx((1 + 1 / 4) ** 0.5)


def test_the_width_counts_where_adam_trains_whole_layers(tmp_path):
    """Of adapters, a head alone and other optimizers nobody knows a usual limit."""
    assert lr_range_test(make_trainer(tmp_path), **SHORT).width == 16
    assert lr_range_test(make_trainer(tmp_path, optim="sgd"), **SHORT).width is None
    head = watching(tmp_path)
    freeze_to(head.model, -1)
    assert lr_range_test(head, **SHORT).width is None
    biases = make_trainer(tmp_path)
    for name, parameter in biases.model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    assert lr_range_test(biases, **SHORT).width is None
    fixed_positions = make_trainer(tmp_path)
    fixed_positions.model.bert.embeddings.position_embeddings.requires_grad_(False)
    assert lr_range_test(fixed_positions, **SHORT).width == 16


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1}])
def test_the_entropy_of_the_labels_it_meets(settings, tmp_path):
    """24 updates of 8 or 16 rows are three or six times all 64, of which 48, 12 and 4 have labels 0, 1 and 2.

    -3/4 ln(3/4) - 3/16 ln(3/16) - 1/16 ln(1/16) = 0.2158 + 0.3139 + 0.1733. Evaluations count no rows again.
    """
    rows = [row | {"labels": (index % 16 > 11) + (index % 16 > 14)} for index, row in enumerate(ragged_rows(64))]
    trainer = make_trainer(tmp_path, trainer={"train_dataset": rows}, **settings)
    curve = lr_range_test(trainer, num_steps=24, start_lr=1e-9, end_lr=1e-6, eval_batches=1)
    assert curve.label_entropy == pytest.approx(0.7030, abs=1e-4)


def test_the_entropy_counts_where_each_row_has_one_label(tmp_path):
    """Nor is a usual limit known of labels that are numbers, or several for each row."""
    assert 0.9 < lr_range_test(make_trainer(tmp_path), **SHORT).label_entropy <= math.log(3)
    for labels, of_row in ((1, lambda row: float(row["labels"])), (3, lambda row: [float(row["labels"] > 0)] * 3)):
        rows = [row | {"labels": of_row(row)} for row in ragged_rows(64)]
        trainer = make_trainer(tmp_path, model=tiny_bert(num_labels=labels), trainer={"train_dataset": rows})
        assert lr_range_test(trainer, **SHORT).label_entropy is None


def test_labels_are_classes_by_the_logits_whatever_the_configuration_says(tmp_path):
    """A head of one's own, answers to choose from, and a loss of one's own for several labels a row."""

    class OwnHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = tiny_bert().bert
            self.config = self.bert.config
            self.head = nn.Linear(16, 20)

        def forward(self, input_ids=None, attention_mask=None, labels=None):
            logits = self.head(self.bert(input_ids, attention_mask).pooler_output)
            return nn.functional.cross_entropy(logits, labels), logits

    class OwnLoss(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            return nn.functional.binary_cross_entropy_with_logits(model(**inputs).logits, labels)

    of_three = lr_range_test(make_trainer(tmp_path), **SHORT).label_entropy
    assert lr_range_test(make_trainer(tmp_path, model=OwnHead()), **SHORT).label_entropy == pytest.approx(of_three)
    choices = [{"input_ids": [row["input_ids"]] * 5, "labels": row["labels"]} for row in token_rows(64)]
    given = {"train_dataset": choices, "data_collator": None}
    trainer = make_trainer(tmp_path, model=BertForMultipleChoice(tiny_bert().config), trainer=given)
    assert lr_range_test(trainer, **SHORT).label_entropy == pytest.approx(of_three, abs=0.1)
    rows = [row | {"labels": [float(row["labels"] > 0)] * 3} for row in ragged_rows(64)]
    several = make_trainer(tmp_path, OwnLoss, trainer={"train_dataset": rows})
    assert lr_range_test(several, **SHORT).label_entropy is None


def test_accumulation_counts_optimizer_steps(tmp_path):
    trainer = watching(tmp_path, gradient_accumulation_steps=2)
    curve = lr_range_test(trainer, **SHORT)
    assert curve.steps == len(curve.rates) + 1
    assert curve.batch_size == 2 * trainer.args.per_device_train_batch_size
    assert len(trainer.seen) == 2 * curve.steps
    assert [row[-1] for row in trainer.seen[:-2:2]] == pytest.approx(curve.rates)


@pytest.mark.parametrize("kind", [Trainer, ULMFiTTrainer])
def test_the_loss_of_an_update_is_the_mean_over_its_batches(kind, tmp_path):
    """80 rows make updates of 4, 4 and 2 batches; Trainer adds up the losses of a model that says it counts items."""
    trainer = make_trainer(
        tmp_path, kind, trainer={"train_dataset": ragged_rows(80)}, gradient_accumulation_steps=4, num_train_epochs=20
    )
    one = float(trainer.evaluate()["eval_loss"])  # of a head that knows nothing yet
    curve = lr_range_test(trainer, num_steps=24, start_lr=1e-9, end_lr=1e-8)
    assert curve.losses == pytest.approx([one] * 23, rel=0.1)


class Counting(Trainer):
    """A loss that is divided by the items of the update, as it may be told."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        loss = nn.functional.cross_entropy(model(**inputs).logits, labels, reduction="sum")
        return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class Averaging(Counting):
    """A loss that takes the number and is a mean over the batch all the same."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs)


@pytest.mark.parametrize(
    ("kind", "scaled"), [(Counting, None), (Counting, True), (Averaging, None), (Averaging, False)]
)
def test_the_loss_of_an_update_where_the_loss_is_ones_own(kind, scaled, tmp_path):
    """Whether it counts the items or not, and whether Trainer was told or not; 80 rows make updates of 4, 4 and 2."""
    kind = type("Own", (kind,), {"loss_is_scaled_for_ga": scaled})
    trainer = make_trainer(
        tmp_path, kind, trainer={"train_dataset": ragged_rows(80)}, gradient_accumulation_steps=4, num_train_epochs=20
    )
    curve = lr_range_test(trainer, num_steps=24, start_lr=1e-9, end_lr=1e-8)
    assert curve.losses == pytest.approx([math.log(3)] * 23, rel=0.15)  # of a head that knows nothing yet


def test_smoothed_labels_over_accumulated_batches(tmp_path):
    trainer = make_trainer(
        tmp_path,
        Trainer,
        trainer={"train_dataset": ragged_rows(80)},
        gradient_accumulation_steps=4,
        num_train_epochs=20,
        label_smoothing_factor=0.1,
    )
    curve = lr_range_test(trainer, num_steps=24, start_lr=1e-9, end_lr=1e-8)
    assert curve.losses == pytest.approx([math.log(3)] * 23, rel=0.15)


@pytest.mark.parametrize("kind", [Trainer, ULMFiTTrainer])
def test_a_method_put_onto_the_trainer(kind, tmp_path):
    """It is bound to the trainer, and the steps are those of a copy."""
    of_whom = []

    def training_step(self, *given):
        of_whom.append(self)
        return type(self).training_step(self, *given)

    trainer = make_trainer(tmp_path, kind)
    trainer.training_step = MethodType(training_step, trainer)
    expected = lr_range_test(make_trainer(tmp_path, kind), **SHORT)
    assert lr_range_test(trainer, **SHORT).losses == expected.losses
    assert trainer not in of_whom
    assert trainer.training_step.__self__ is trainer


def test_a_language_models_words_are_no_classes(tmp_path):
    model = BertForMaskedLM(tiny_bert().config)
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in token_rows(64)]
    trainer = make_trainer(tmp_path, Trainer, model=model, trainer={"train_dataset": rows, "data_collator": None})
    assert lr_range_test(trainer, **SHORT).label_entropy is None


def test_settings_of_accelerate_that_trainer_has_changed(tmp_path):
    """Trainer moves `num_steps` to its own setting, leaves a 1 there, and refuses both together."""
    settings = {"gradient_accumulation_kwargs": {"sync_each_batch": True, "num_steps": 2}}
    trainer = make_trainer(tmp_path, accelerator_config=settings)
    assert lr_range_test(trainer, **SHORT).training_steps == 8
    assert trainer.args.accelerator_config.gradient_accumulation_kwargs["num_steps"] == 1


def test_a_loader_of_the_trainers_own(tmp_path):
    class WithLoader(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(ragged_rows(64), batch_size=8, collate_fn=pad_rows)

    trainer = make_trainer(tmp_path, trainer={"train_dataset": None}, kind=Trainer)
    trainer.__class__ = WithLoader
    assert lr_range_test(trainer, **SHORT).training_steps == 16


def test_the_batch_size_is_that_of_the_loader(tmp_path):
    """Batches of 4 though the arguments say 32, of which there are no 32 rows; and 16 accumulated ones of 24 rows."""

    class WithLoader(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(ragged_rows(24), batch_size=4, collate_fn=pad_rows)

    few = {"train_dataset": ragged_rows(24)}
    trainer = make_trainer(tmp_path, WithLoader, trainer=few, per_device_train_batch_size=32)
    assert lr_range_test(trainer, **SHORT).batch_size == 4
    trainer = make_trainer(tmp_path, trainer=few, gradient_accumulation_steps=16)
    assert lr_range_test(trainer, **SHORT).batch_size == 24


def test_an_optimizer_around_another_one_takes_the_steps(tmp_path):
    taken = []

    class Lookahead(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer
            super().__init__(optimizer.param_groups, optimizer.defaults)
            self.param_groups = optimizer.param_groups

        def step(self, closure=None):
            taken.append(self.optimizer.step(closure))

    model = tiny_bert()
    wrapper = Lookahead(torch.optim.AdamW(model.parameters(), lr=1e-3))
    curve = lr_range_test(make_trainer(tmp_path, model=model, trainer={"optimizers": (wrapper, None)}), **SHORT)
    assert len(taken) == curve.steps


class Parabola(torch.nn.Module):
    """The loss is a parabola of one weight, so each step can be calculated by hand."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([4.0]))

    def forward(self, x, labels=None):
        return {"loss": (0.5 * self.weight**2).sum() + 0 * x.sum(), "logits": x}


def parabola_trainer(folder, **settings):
    model = Parabola()
    rows = [{"x": torch.ones(1), "labels": torch.zeros(1)} for _ in range(16)]
    args = TrainingArguments(output_dir=str(folder), max_grad_norm=0.0, **{**SETTINGS, "max_steps": 500, **settings})
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    return Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, optimizers=(sgd, None))


@pytest.mark.parametrize("eval_batches", [0, 1])
def test_losses_belong_to_the_rate_before_them(eval_batches, tmp_path):
    """w <- w - r w, loss w^2 / 2: after the rates r_0 ... r_i it is 8 * prod (1 - r_j)^2, until it diverges."""
    curve = lr_range_test(
        parabola_trainer(tmp_path), start_lr=0.01, end_lr=4.0, num_steps=60, eval_batches=eval_batches
    )
    rates = sweep_rates(0.01, 4.0, 60, "exponential")
    losses = 8 * np.cumprod((1 - np.array(rates)) ** 2)
    assert curve.start_loss == 8.0
    assert curve.rates == pytest.approx(rates[: len(curve.rates)])
    assert curve.losses == pytest.approx(losses[: len(curve.losses)].tolist(), rel=1e-4)
    assert curve.training_steps == 500
    assert curve.loss_on == ("evaluation" if eval_batches else "training")


def test_it_ends_where_the_loss_has_diverged(tmp_path):
    """From r = 2 on each step makes the parabola's loss larger."""
    curve = lr_range_test(parabola_trainer(tmp_path), start_lr=0.01, end_lr=100.0, num_steps=100)
    assert curve.stopped == "diverged"
    assert 2 < curve.rates[-1] < 20
    assert curve.steps < 100


class NotANumber(Trainer):
    """The loss is nan from a given step on."""

    first, calls = 0, 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        type(self).calls += 1
        bad = type(self).calls > type(self).first
        return (loss[0] * math.nan, loss[1]) if isinstance(loss, tuple) else loss * (math.nan if bad else 1.0)


def test_it_ends_at_nan(tmp_path, monkeypatch):
    monkeypatch.setattr(NotANumber, "first", 12)
    monkeypatch.setattr(NotANumber, "calls", 0)
    args = TrainingArguments(output_dir=str(tmp_path), **SETTINGS)
    trainer = NotANumber(model=tiny_bert(), args=args, train_dataset=token_rows(64))
    curve = lr_range_test(trainer, **SHORT)
    assert curve.stopped == "nan"
    assert len(curve.losses) == 11
    assert all(map(math.isfinite, curve.losses))


def test_frozen_layers_stay_frozen(tmp_path):
    model = tiny_bert()
    model.bert.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(tmp_path, ULMFiTTrainer, model=model)
    lr_range_test(trainer, **SHORT)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.bert.parameters())


class Thawing(ULMFiTTrainer):
    """Thaws a block in the middle, by hand."""

    def training_step(self, model, *args, **kwargs):
        if self.state.global_step == 3:
            model.bert.encoder.layer[3].requires_grad_(True)
        return super().training_step(model, *args, **kwargs)


def test_layers_that_the_trainer_thaws_by_itself_are_put_back(tmp_path):
    model = tiny_bert()
    freeze_to(model, -1)
    before, flags = copy.deepcopy(model.state_dict()), [parameter.requires_grad for parameter in model.parameters()]
    args = ULMFiTTrainingArguments(str(tmp_path), **SETTINGS)
    lr_range_test(Thawing(model, args, train_dataset=token_rows(64)), **SHORT)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_the_evaluation_loss_is_the_trainers(tmp_path):
    """All 20 evaluation rows in one batch: the loss before any update is that of `evaluate`."""
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=20)
    curve = lr_range_test(trainer, eval_batches=1, **SHORT)
    assert curve.start_loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    assert len(curve.rates) == curve.steps


def test_a_schedule_free_optimizer_is_evaluated_at_its_averages(tmp_path):
    """It holds other weights in training than in evaluation, and is told which, as by Trainer."""

    class Averaging(torch.optim.SGD):
        modes: ClassVar = []

        def train(self):
            self.modes.append("train")

        def eval(self):
            self.modes.append("eval")

    model = tiny_bert()
    optimizer = Averaging(model.parameters(), lr=1e-3)
    lr_range_test(make_trainer(tmp_path, model=model, trainer={"optimizers": (optimizer, None)}), eval_batches=1)
    assert Averaging.modes[:5] == ["eval", "train", "eval", "train", "eval"]


def test_evaluation_workers_that_stay_are_not_asked(tmp_path):
    """Trainer keeps the loader of the last `evaluate`, and private to it: this fails when it is kept elsewhere."""
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=4, **workers)
    trainer.evaluate()
    loaders = dict(trainer._eval_dataloaders)
    asked = []
    step = trainer.prediction_step
    trainer.prediction_step = lambda *args, **kwargs: asked.append(1) or step(*args, **kwargs)
    curve = lr_range_test(trainer, eval_batches=1, **SHORT)
    assert len(asked) == curve.steps + 1 + (
        curve.stopped == "nan"
    )  # one batch before the first update, then after each
    assert trainer._eval_dataloaders == loaders


def test_progress_is_shown_where_the_trainer_shows_its_own(tmp_path, capsys):
    lr_range_test(make_trainer(tmp_path), confirm=True, **SHORT)
    assert capsys.readouterr().err.strip() == ""
    lr_range_test(make_trainer(tmp_path, disable_tqdm=False), confirm=True, **SHORT)
    shown = capsys.readouterr().err
    assert "Range test: " in shown
    assert "/24 [" in shown
    assert shown.count("Probe of") >= 3


# ---- Several sweeps -------------------------------------------------------------------------------------------------


class FirstSteps(Trainer):
    """Keeps the batch and the weights of each step; in its class, as its attributes are put back."""

    steps: ClassVar = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        weights = torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])
        self.steps.append((inputs["input_ids"].tolist(), weights))
        return super().training_step(model, inputs, num_items_in_batch)


class FirstGroupedSteps(FirstSteps, ULMFiTTrainer):
    """The same with batches of like length."""


@pytest.mark.parametrize(("kind", "strategy"), [(FirstSteps, "random"), (FirstGroupedSteps, "group_by_length")])
def test_each_sweep_has_the_same_start_and_other_batches(kind, strategy, tmp_path):
    plain = make_trainer(tmp_path, ULMFiTTrainer, train_sampling_strategy=strategy)
    trainer = kind(
        model=plain.model, args=plain.args, train_dataset=plain.train_dataset, data_collator=plain.data_collator
    )
    FirstSteps.steps = []
    curve = lr_range_test(trainer, num_sweeps=3, **SHORT)
    assert curve.steps == len(FirstSteps.steps) == 72
    batches, weights = zip(*FirstSteps.steps[::24], strict=True)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], FirstSteps.steps[1][1])
    assert batches[0] != batches[1] != batches[2] != batches[0]
    alone = lr_range_test(trainer, **SHORT)
    assert (curve.rates, curve.losses) == (alone.rates, alone.losses), "the first is that of a single sweep"


def test_sweeps_of_a_shuffled_stream_have_other_batches(tmp_path):
    stream = Dataset.from_list(ragged_rows(64)).to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=16)
    trainer = make_trainer(tmp_path, trainer={"train_dataset": stream}, max_steps=16)
    first, second = lr_range_test(trainer, num_sweeps=2, **SHORT).sweeps
    assert first.losses != second.losses


def test_sweeps_over_the_same_batches_count_once(tmp_path, caplog):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(ragged_rows(64))

    trainer = make_trainer(tmp_path, trainer={"train_dataset": Stream()}, max_steps=16)
    curve = lr_range_test(trainer, num_sweeps=3, **SHORT)
    assert curve.repeats == ()
    assert curve.steps == 2 * 24, "the third is not made"
    assert "only the first one counts" in caplog.text


# ---- Confirmation ---------------------------------------------------------------------------------------------------


def test_confirmation_says_its_cost_first_and_takes_it(tmp_path, caplog):
    trainer = watching(tmp_path)
    curve = lr_range_test(trainer, confirm=True, **SHORT)
    assert "3 probes of 8 optimizer steps, 24 more" in caplog.text  # the training has 16 steps
    assert curve.steps == len(trainer.seen)
    assert [probe.rate for probe in curve.probes] == pytest.approx(
        [factor * curve.probes[1].rate for factor in (0.25, 1, 4)]
    )
    assert curve.suggestion == min(curve.probes, key=lambda probe: probe.loss + 2 * probe.error).rate


def test_probes_stand_for_a_longer_training(tmp_path):
    trainer = watching(tmp_path, max_steps=800)
    curve = lr_range_test(trainer, confirm=True, **SHORT)
    sweep = curve.steps - 3 * 100
    peaks = [max(row[-1] for row in trainer.seen[sweep + 100 * i : sweep + 100 * (i + 1)]) for i in range(3)]
    twice = [2 * probe.rate for probe in curve.probes]  # 8 ** (1 / 3)
    assert [probe.peak for probe in curve.probes] == pytest.approx(twice)
    assert peaks == pytest.approx([probe.peak for probe in curve.probes], rel=0.06)


def rehearsals(monkeypatch):
    """The notes of each sweep and probe from here on."""
    notes = []
    rehearse = lr_range.rehearse
    monkeypatch.setattr(lr_range, "rehearse", lambda *args: notes.append(rehearse(*args)) or notes[-1])
    return notes


def test_all_probes_see_the_same_batches_from_the_same_start(tmp_path, monkeypatch):
    notes = rehearsals(monkeypatch)
    lr_range_test(make_trainer(tmp_path), confirm=True, **SHORT)
    assert len({note.losses[0] for note in notes}) == 1, "with dropout on"


def test_probes_differ_by_a_standard_error_batch_by_batch(tmp_path, monkeypatch):
    """Of 8 steps the last quarter are two: differences of a and b have the standard error |a - b| / 2."""
    notes = rehearsals(monkeypatch)
    curve = lr_range_test(make_trainer(tmp_path), confirm=True, **SHORT)
    ends = [note.losses[-2:] for note in notes[1:]]
    differences = [(end[0] - ends[1][0], end[1] - ends[1][1]) for end in ends]
    assert [probe.error for probe in curve.probes] == pytest.approx([abs(a - b) / 2 for a, b in differences])
    assert [probe.loss for probe in curve.probes] == pytest.approx([sum(end) / 2 for end in ends])


def test_a_probe_without_numbers_differs_by_none():
    assert lr_range._error_of_mean(np.array([math.nan])) == 0
    assert lr_range._error_of_mean(np.array([0.1, math.nan])) == 0
    assert lr_range._error_of_mean(np.array([1.0, 2.0, 3.0])) == pytest.approx(1 / math.sqrt(3))


@pytest.mark.parametrize("clipped", [True, False])
def test_nothing_is_worked_out_for_a_log(tmp_path, monkeypatch, clipped):
    """Trainer measures gradients for its log where it does not clip them, and counts operations in every step."""
    trainer = make_trainer(tmp_path, max_grad_norm=1.0 if clipped else 0.0)
    measured = []
    norm = Accelerator.clip_grad_norm_
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *args: measured.append(args) or norm(*args))
    monkeypatch.setattr(Trainer, "floating_point_ops", lambda *args: pytest.fail("operations are counted"))
    curve = lr_range_test(trainer, **SHORT)
    assert len(measured) == (curve.steps if clipped else 0)


# ---- For plans ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("training_steps", "sweeps"), [(399, 1), (400, 2)])
def test_a_plan_sweeps_twice_where_the_training_is_as_long(training_steps, sweeps, tmp_path):
    trainer = make_trainer(tmp_path, ULMFiTTrainer, max_steps=training_steps)
    curve = find_learning_rate(trainer, tmp_path / "lr_range.json", start_lr=1e-9, end_lr=1e-6)
    assert [len(sweep.rates) for sweep in curve.sweeps] == [199] * sweeps, "all, but for the loss after the last"
    assert curve.steps == 200 * sweeps
    assert trainer.args.learning_rate == 1e-3, "as it was: no rate was too high"
    assert json.loads((tmp_path / "lr_range.json").read_text())["read"]["taken"] == 1e-3


def test_a_rate_in_the_record_stands_whatever_the_rule_says_now(tmp_path):
    record = tmp_path / "lr_range.json"
    find_learning_rate(make_trainer(tmp_path, ULMFiTTrainer), record, **SHORT)
    kept = json.loads(record.read_text())
    kept["read"]["taken"] = 0.0123
    record.write_text(json.dumps(kept))
    trainer = make_trainer(tmp_path, ULMFiTTrainer)
    find_learning_rate(trainer, record)
    assert trainer.args.learning_rate == 0.0123


@pytest.mark.parametrize(("end_lr", "limited"), [(10, True), (1e-6, False)])
def test_the_curve_of_another_test_will_do_as_the_record(end_lr, limited, tmp_path):
    record = tmp_path / "lr_range.json"
    curve = lr_range_test(make_trainer(tmp_path), **SHORT | {"start_lr": 1e-9, "end_lr": end_lr})
    assert curve.has_limit == limited
    record.write_text(curve.to_json())
    trainer = make_trainer(tmp_path, ULMFiTTrainer)
    assert find_learning_rate(trainer, record) == curve
    assert trainer.args.learning_rate == (curve.suggestion if limited else 1e-3), "no rate was too high: as it was"


def test_a_found_rate_is_kept_and_not_looked_for_again(tmp_path, monkeypatch):
    record = tmp_path / "lr_range.json"
    trainer = make_trainer(tmp_path, ULMFiTTrainer)
    curve = find_learning_rate(trainer, record, **SHORT | {"end_lr": 10})
    assert trainer.args.learning_rate == curve.suggestion != 1e-3
    assert json.loads(record.read_text())["read"]["taken"] == curve.suggestion
    monkeypatch.setattr(lr_range, "lr_range_test", None)
    again = make_trainer(tmp_path, ULMFiTTrainer)
    assert find_learning_rate(again, record) == curve
    assert again.args.learning_rate == curve.suggestion
    trainer.create_optimizer()
    assert trainer.optimizer.param_groups[-1]["lr"] == curve.suggestion


@pytest.mark.parametrize(
    ("given", "name", "found"),
    [
        ({"learning_rate_low": 1e-4}, "learning_rate_low", 2e-4),
        ({"group_learning_rates": [1e-4, 5e-4, 1e-3]}, "group_learning_rates", [2e-4, 1e-3, 2e-3]),
        ({"discriminative_factor": 3.0}, "discriminative_factor", 3.0),
    ],
)
def test_rates_of_the_other_groups_keep_their_ratio(given, name, found, tmp_path):
    args = ULMFiTTrainingArguments(str(tmp_path), learning_rate=1e-3, **given)
    set_learning_rate(args, 2e-3)
    assert args.learning_rate == 2e-3
    assert getattr(args, name) == pytest.approx(found)


# ---- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"start_lr": 1.0, "end_lr": 1.0}, "start_lr < end_lr"),
        ({"start_lr": 0.0}, "start_lr < end_lr"),
        ({"end_lr": math.inf}, "start_lr < end_lr"),
        ({"start_lr": "1e-5"}, "start_lr < end_lr. Received: start_lr='1e-5'"),
        ({"end_lr": None}, "start_lr < end_lr.*end_lr=None"),
        ({"num_steps": 19}, "at least 20 steps"),
        ({"num_steps": 50.0}, "whole number.*Received: num_steps=50.0"),
        ({"num_steps": "100"}, "whole number.*Received: num_steps='100'"),
        ({"num_sweeps": 0}, "num_sweeps is a whole number from 1. Received: num_sweeps=0"),
        ({"num_sweeps": 2.0}, "num_sweeps is a whole number from 1"),
        ({"mode": "exponent"}, 'Did you mean "exponential"'),
        ({"eval_batches": -1}, "eval_batches"),
        ({"eval_batches": 2.0}, "whole number.*Received: eval_batches=2.0"),
        ({"offload_folder": "no/such/folder"}, "offload_folder.*Received: offload_folder='no/such/folder'"),
    ],
)
def test_settings_out_of_range(settings, words, tmp_path):
    with pytest.raises(InputError, match=words) as error:
        lr_range_test(make_trainer(tmp_path), **settings)
    assert "\n" not in str(error.value)


def frozen(folder):
    return make_trainer(folder, model=tiny_bert().requires_grad_(False))


def too_small(folder):
    return make_trainer(folder, trainer={"train_dataset": ragged_rows(7)})


def without_epochs(folder):
    return make_trainer(folder, num_train_epochs=0)


def without_rows(folder):
    return make_trainer(folder, trainer={"train_dataset": None})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (frozen, "no trainable parameters"),
        (too_small, "batch of 8.*Received: 7 rows"),
        (without_rows, "requires a train_dataset"),
        (without_epochs, "no steps: raise num_train_epochs.*Received: num_train_epochs=0"),
    ],
)
def test_trainers_that_cannot_train(make, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        lr_range_test(make(tmp_path))


@pytest.mark.parametrize("dataset", [None, [], {"one": token_rows(8)}])
def test_evaluation_rows_that_are_missing(dataset, tmp_path):
    with pytest.raises(InputError, match="eval_dataset"):
        lr_range_test(make_trainer(tmp_path, trainer={"eval_dataset": dataset}), eval_batches=2)


def test_evaluation_rows_without_labels(tmp_path):
    rows = [{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]} for row in token_rows(8)]
    trainer = make_trainer(
        tmp_path, trainer={"eval_dataset": rows, "train_dataset": token_rows(64), "data_collator": None}
    )
    with pytest.raises(InputError, match="no labels"):
        lr_range_test(trainer, eval_batches=1)


def test_evaluation_rows_that_make_no_whole_batch(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=64, dataloader_drop_last=True)
    with pytest.raises(InputError, match="not one whole batch of 64"):
        lr_range_test(trainer, eval_batches=1, **SHORT)


def test_numbers_of_numpy_are_numbers(tmp_path):
    curve = lr_range_test(make_trainer(tmp_path), eval_batches=np.int64(1), num_steps=np.int64(24))
    assert LRCurve.from_json(curve.to_json()) == curve
    assert {type(rate) for rate in sweep_rates(np.float32(1e-5), np.float32(0.1), 20, "linear")} == {float}


def test_an_optimizer_for_other_layers(tmp_path):
    """Made while the head alone was trainable; plain Trainer goes on with it, and nothing trains."""
    model = tiny_bert()
    freeze_to(model, -1)
    trainer = make_trainer(tmp_path, model=model)
    trainer.create_optimizer()
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
    with pytest.raises(InputError, match="holds no parameter of the model that is trainable.*Received: 69 trainable"):
        lr_range_test(trainer, **SHORT)


def test_an_optimizer_that_sets_its_own_rates(tmp_path):
    model = tiny_bert()
    own = Adafactor(model.parameters(), lr=None, relative_step=True)
    with pytest.raises(InputError, match="sets its own rates"):
        lr_range_test(make_trainer(tmp_path, model=model, trainer={"optimizers": (own, None)}), **SHORT)


def test_a_loss_that_is_nan_from_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(NotANumber, "first", 0)
    args = TrainingArguments(output_dir=str(tmp_path), **SETTINGS)
    model = tiny_bert()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="before the first update"):
        lr_range_test(NotANumber(model=model, args=args, train_dataset=token_rows(64)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_base_rate_of_zero(tmp_path):
    with pytest.raises(InputError, match="must not be 0"):
        lr_range_test(make_trainer(tmp_path, learning_rate=0.0))


def test_divergence_in_the_first_steps_is_told(tmp_path):
    with pytest.raises(InputError, match="Begin lower"):
        lr_range_test(parabola_trainer(tmp_path), start_lr=1e9, end_lr=1e30, num_steps=20)


def test_head_rate_of_a_phase_without_the_head(tmp_path):
    """Only the first block trains: what is found is still named as the head's rate, as `learning_rate` would be."""
    model = tiny_bert().requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(True)
    args = ULMFiTTrainingArguments(str(tmp_path), **SETTINGS)
    trainer = ULMFiTTrainer(
        model=model,
        args=args,
        train_dataset=ragged_rows(64),
        data_collator=pad_rows,
        optimizer_cls_and_kwargs=discriminative_optimizer(args, factor=2.0, trainable_only=True),
    )
    optimizer = trainer.create_optimizer()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3 / 2**4])
    assert rehearsal.head_rate(trainer, optimizer) == 1e-3


def test_the_result_is_a_curve_that_can_be_kept(tmp_path):
    curve = lr_range_test(make_trainer(tmp_path), **SHORT)
    assert LRCurve.from_json(curve.to_json()) == curve
    assert curve.training_steps == 16
    assert curve.seconds > 0
