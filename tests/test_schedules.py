"""Schedules against hand-written arrays, closed forms and torch's own schedulers."""

import io
import math
import pickle
import random
import warnings
from functools import partial
from itertools import pairwise

import pytest
import torch
from tiny import tiny_bert, token_rows
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, CyclicLR, OneCycleLR
from transformers import Adafactor, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from ulmfit_tools.errors import InputError
from ulmfit_tools.schedules import (
    SCHEDULES,
    check_schedule,
    get_cyclical_schedule,
    get_one_cycle_schedule,
    get_schedule,
    get_sgdr_schedule,
    get_slanted_triangular_schedule,
    schedule_settings,
    simulate,
)

RATES = [1.0, 2.0, 8.0]  # three groups, input to output


def assert_groups(build, expected, **options):
    actual = simulate(build, RATES, len(expected[0]), **options)
    assert len(actual) == 3
    for group, (values, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert values == pytest.approx(wanted, rel=1e-6), f"group {group}"


def shares(build, num_steps):
    """What share of its rate a group has at each step."""
    return simulate(build, [1.0], num_steps)[0]


def three_groups(optimizer=torch.optim.AdamW, rates=RATES, **settings):
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates]
    return optimizer(groups, lr=1.0, **settings)


# Hand-written arrays: three groups of different rates.


def test_slanted_triangular_array():
    build = partial(get_slanted_triangular_schedule, num_training_steps=10, cut_frac=0.2, ratio=4)
    expected = [
        [0.25, 0.625, 1.0, 0.90625, 0.8125, 0.71875, 0.625, 0.53125, 0.4375, 0.34375, 0.25, 0.25],
        [0.5, 1.25, 2.0, 1.8125, 1.625, 1.4375, 1.25, 1.0625, 0.875, 0.6875, 0.5, 0.5],
        [2.0, 5.0, 8.0, 7.25, 6.5, 5.75, 5.0, 4.25, 3.5, 2.75, 2.0, 2.0],
    ]
    assert_groups(build, expected)


def test_triangular_array():
    build = partial(get_cyclical_schedule, step_size=2, ratio=2)
    expected = [
        [0.5, 0.75, 1.0, 0.75, 0.5, 0.75, 1.0, 0.75, 0.5],
        [1.0, 1.5, 2.0, 1.5, 1.0, 1.5, 2.0, 1.5, 1.0],
        [4.0, 6.0, 8.0, 6.0, 4.0, 6.0, 8.0, 6.0, 4.0],
    ]
    assert_groups(build, expected)


def test_triangular2_array():
    build = partial(get_cyclical_schedule, step_size=2, ratio=2, mode="triangular2")
    expected = [
        [0.5, 0.75, 1.0, 0.75, 0.5, 0.625, 0.75, 0.625, 0.5, 0.5625, 0.625, 0.5625],
        [1.0, 1.5, 2.0, 1.5, 1.0, 1.25, 1.5, 1.25, 1.0, 1.125, 1.25, 1.125],
        [4.0, 6.0, 8.0, 6.0, 4.0, 5.0, 6.0, 5.0, 4.0, 4.5, 5.0, 4.5],
    ]
    assert_groups(build, expected)


def test_exp_range_array():
    build = partial(get_cyclical_schedule, step_size=2, ratio=2, mode="exp_range", gamma=0.5)
    expected = [
        [0.5, 0.625, 0.625, 0.53125, 0.5, 0.5078125],
        [1.0, 1.25, 1.25, 1.0625, 1.0, 1.015625],
        [4.0, 5.0, 5.0, 4.25, 4.0, 4.0625],
    ]
    assert_groups(build, expected)


def test_sgdr_array():
    build = partial(get_sgdr_schedule, cycle_len=2, cycle_mult=2)
    high, low = 0.8535533906, 0.1464466094  # (1 +- cos(pi / 4)) / 2
    expected = [
        [1.0, 0.5, 1.0, high, 0.5, low, 1.0],
        [2.0, 1.0, 2.0, 2 * high, 1.0, 2 * low, 2.0],
        [8.0, 4.0, 8.0, 8 * high, 4.0, 8 * low, 8.0],
    ]
    assert_groups(build, expected)


def test_sgdr_warms_up_once():
    build = partial(get_sgdr_schedule, cycle_len=1, steps_per_epoch=2, warmup_len=1.5)  # three steps of two cycles
    assert shares(build, 6) == pytest.approx([1 / 3, 0.5 * 2 / 3, 1.0, 0.5, 1.0, 0.5])


def test_one_cycle_array():
    build = partial(
        get_one_cycle_schedule,
        num_training_steps=6,
        pct_start=0.5,
        div_factor=4,
        final_div_factor=2,
        anneal_strategy="linear",
    )
    expected = [
        [0.25, 0.625, 1.0, 0.708333333, 0.416666667, 0.125, 0.125],
        [0.5, 1.25, 2.0, 1.416666667, 0.833333333, 0.25, 0.25],
        [2.0, 5.0, 8.0, 5.666666667, 3.333333333, 1.0, 1.0],
    ]
    assert_groups(build, expected)
    assert_groups(build, [[0.95, 0.9, 0.85, 0.883333333, 0.916666667, 0.95, 0.95]] * 3, quantity="momentum")


def test_one_cycle_array_of_three_phases():
    build = partial(
        get_one_cycle_schedule,
        num_training_steps=8,
        pct_start=0.375,
        div_factor=4,
        final_div_factor=2,
        three_phase=True,
        anneal_strategy="linear",
    )
    expected = [
        [0.25, 0.625, 1.0, 0.625, 0.25, 0.208333333, 0.166666667, 0.125, 0.125],
        [0.5, 1.25, 2.0, 1.25, 0.5, 0.416666667, 0.333333333, 0.25, 0.25],
        [2.0, 5.0, 8.0, 5.0, 2.0, 1.666666667, 1.333333333, 1.0, 1.0],
    ]
    assert_groups(build, expected)
    assert_groups(build, [[0.95, 0.9, 0.85, 0.9, 0.95, 0.95, 0.95, 0.95, 0.95]] * 3, quantity="momentum")


# Closed forms and references.


def test_slanted_triangular_is_the_formula_of_the_paper_where_the_cut_is_whole():
    for num_steps, cut_frac, ratio in [(1000, 0.1, 32), (40, 0.25, 10), (200, 0.5, 2), (1600, 0.125, 32)]:
        cut = math.floor(num_steps * cut_frac)
        paper = []
        for t in range(num_steps + 1):
            p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
            paper.append((1 + p * (ratio - 1)) / ratio)
        build = partial(get_slanted_triangular_schedule, num_training_steps=num_steps, cut_frac=cut_frac, ratio=ratio)
        assert shares(build, num_steps + 1) == pytest.approx(paper, rel=1e-9)


@pytest.mark.parametrize("cut_frac", [0.05, 0.1, 0.3, 1.0])
def test_slanted_triangular_stays_within_its_bounds_at_any_length(cut_frac):
    for num_steps in range(1, 120):
        values = shares(
            partial(get_slanted_triangular_schedule, num_training_steps=num_steps, cut_frac=cut_frac), num_steps + 3
        )
        cut = math.floor(num_steps * cut_frac)
        assert values[cut] == max(values) == 1
        assert min(values) >= 1 / 32
        assert all(left < right for left, right in pairwise(values[: cut + 1]))
        assert all(left > right for left, right in pairwise(values[cut : num_steps + 1]))
        assert values[num_steps] == values[-1] == (1 if cut == num_steps else pytest.approx(1 / 32))


def test_slanted_triangular_without_room_for_a_rise_starts_at_the_full_rate():
    build = partial(get_slanted_triangular_schedule, num_training_steps=4, cut_frac=0.1, ratio=5)
    assert shares(build, 5) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def torch_shares(make, num_steps):
    """As `shares`, with a torch scheduler that takes the optimizer and the highest rate."""
    optimizer = three_groups(torch.optim.SGD, rates=[1.0], momentum=0.9)
    scheduler = make(optimizer)
    rates, momenta = [], []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        scheduler.step()
    return rates, momenta


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
def test_cyclical_equals_torch(mode):
    generator = random.Random(0)
    for _ in range(20):
        step_size, ratio = generator.randint(1, 30), generator.uniform(1, 50)
        gamma = generator.uniform(0.9, 1) if mode == "exp_range" else None
        build = partial(get_cyclical_schedule, step_size=step_size, mode=mode, ratio=ratio, gamma=gamma)

        def make(optimizer, low=1 / ratio, step_size=step_size, gamma=gamma or 1.0):
            return CyclicLR(optimizer, low, 1.0, step_size, mode=mode, gamma=gamma, cycle_momentum=False)

        assert shares(build, 150) == pytest.approx(torch_shares(make, 150)[0], rel=1e-9)


def test_triangular2_of_very_many_cycles_ends_at_its_base():
    # Two steps a cycle, more than 1024 cycles: 2.0 ** cycle would overflow.
    values = shares(partial(get_cyclical_schedule, step_size=1, mode="triangular2", ratio=4), 2100)
    assert values[-1] == 0.25


def test_sgdr_equals_torch():
    generator = random.Random(0)
    for _ in range(20):
        cycle_len, cycle_mult = generator.randint(1, 30), generator.randint(1, 4)
        min_ratio = generator.choice([0.0, generator.random()])
        build = partial(get_sgdr_schedule, cycle_len=cycle_len, cycle_mult=cycle_mult, min_ratio=min_ratio)
        make = partial(CosineAnnealingWarmRestarts, T_0=cycle_len, T_mult=cycle_mult, eta_min=min_ratio)
        assert shares(build, 200) == pytest.approx(torch_shares(make, 200)[0], rel=1e-9, abs=1e-12)


def test_sgdr_of_fractional_lengths():
    """A slow reference: the restarts are listed first, then each step is placed between two of them."""
    generator = random.Random(0)
    for _ in range(20):
        cycle_len, cycle_mult = generator.uniform(1, 20), generator.uniform(1, 2.5)
        restarts = [0.0]
        while restarts[-1] <= 200:
            restarts.append(restarts[-1] + cycle_len * cycle_mult ** (len(restarts) - 1))
        expected = []
        for step in range(200):
            start, end = next((left, right) for left, right in pairwise(restarts) if left <= step < right)
            expected.append(0.5 * (1 + math.cos(math.pi * (step - start) / (end - start))))
        build = partial(get_sgdr_schedule, cycle_len=cycle_len, cycle_mult=cycle_mult)
        assert shares(build, 200) == pytest.approx(expected, abs=1e-9)


def test_sgdr_restarts_in_epochs_after_1_3_and_7():
    values = shares(partial(get_sgdr_schedule, cycle_len=1, cycle_mult=2, steps_per_epoch=50), 400)
    assert [step for step, value in enumerate(values) if value == 1.0] == [0, 50, 150, 350]


def test_sgdr_of_less_than_a_step_is_one_step():
    build = partial(get_sgdr_schedule, cycle_mult=2)
    assert shares(partial(build, cycle_len=0.25), 20) == shares(partial(build, cycle_len=1), 20)


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_one_cycle_equals_torch(strategy, three_phase):
    generator = random.Random(0)
    for _ in range(20):
        num_steps, pct_start = generator.randint(20, 200), generator.uniform(0.2, 0.45)
        settings = {
            "pct_start": pct_start,
            "div_factor": generator.uniform(1, 50),
            "final_div_factor": generator.uniform(1, 1e4),
            "anneal_strategy": strategy,
            "three_phase": three_phase,
            "base_momentum": 0.8,
            "max_momentum": 0.9,
        }
        build = partial(get_one_cycle_schedule, num_training_steps=num_steps, **settings)
        rates, momenta = torch_shares(partial(OneCycleLR, max_lr=1.0, total_steps=num_steps, **settings), num_steps)
        assert shares(build, num_steps) == pytest.approx(rates, rel=1e-9, abs=1e-12)
        assert simulate(build, [1.0], num_steps, quantity="momentum")[0] == pytest.approx(momenta, rel=1e-9)


def test_one_cycle_defaults_are_those_of_torch():
    rates, momenta = torch_shares(partial(OneCycleLR, max_lr=1.0, total_steps=77), 77)
    build = partial(get_one_cycle_schedule, num_training_steps=77)
    assert shares(build, 77) == pytest.approx(rates, rel=1e-9)
    assert simulate(build, [1.0], 77, quantity="momentum")[0] == pytest.approx(momenta, rel=1e-9)


@pytest.mark.parametrize(
    ("num_steps", "pct_start", "peak"),
    [(1, 0.3, 0), (2, 0.5, 0), (3, 0.3, 0), (10, 0.1, 0), (10, 0.0, 0), (5, 1.0, 4)],
)
def test_one_cycle_of_extreme_lengths_reaches_its_peak_and_then_falls(num_steps, pct_start, peak):
    for three_phase in (False, True):
        if three_phase and pct_start > 0.5:
            continue
        build = partial(get_one_cycle_schedule, pct_start=pct_start, three_phase=three_phase)
        values = shares(partial(build, num_training_steps=num_steps), num_steps)
        assert values.index(max(values)) == peak
        assert values[peak] == 1


@pytest.mark.parametrize("name", ["slanted_triangular", "one_cycle"])
def test_past_the_end_the_last_value_stays(name):
    build = partial(get_schedule, name, num_training_steps=20, steps_per_epoch=5)
    values = shares(build, 60)
    assert values[20:] == [values[20]] * 40
    assert 0 < values[20] == min(values)


# Groups, optimizers and checkpoints.


@pytest.mark.parametrize("name", SCHEDULES)
def test_groups_keep_their_ratios_and_their_own_rate(name):
    optimizer = three_groups()
    scheduler = get_schedule(name, optimizer, num_training_steps=30, steps_per_epoch=10)
    for _ in range(30):
        low, middle, high = (group["lr"] for group in optimizer.param_groups)
        assert (middle, high) == pytest.approx((2 * low, 8 * low))
        optimizer.step()
        scheduler.step()
    assert [group["initial_lr"] for group in optimizer.param_groups] == RATES


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_warning_in_ordinary_use(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate(partial(get_schedule, name, num_training_steps=10, steps_per_epoch=5), RATES, 12)


def train(optimizer, scheduler, num_steps, first_step=0):
    """Steps on a known gradient; every group's rate, momentum and weights after each of them."""
    seen = []
    for step in range(first_step, first_step + num_steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.sin(parameter.detach() * 3 + step)
        optimizer.step()
        scheduler.step()
        seen.append(
            [
                (float(group["lr"]), group.get("betas"), group.get("momentum"), group["params"][0].tolist())
                for group in optimizer.param_groups
            ]
        )
    return seen


def through_a_file(state):
    """As `Trainer` saves and loads its states."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_resumed_in_mid_cycle_is_the_same_to_the_bit(name, optimizer):
    settings = {"cycle_mult": 2} if name == "sgdr" else {}

    def start():
        made = three_groups(optimizer, rates=[1e-3, 1e-2, 1e-1])
        return made, get_schedule(name, made, num_training_steps=40, steps_per_epoch=13, **settings)

    whole = train(*start(), 45)
    for stop in (1, 7, 14, 33):
        before, its_schedule = start()
        train(before, its_schedule, stop)
        saved = through_a_file({"optimizer": before.state_dict(), "schedule": its_schedule.state_dict()})
        weights = [group["params"][0].detach().clone() for group in before.param_groups]

        after, schedule = start()
        for group, weight in zip(after.param_groups, weights, strict=True):
            group["params"][0].data.copy_(weight)
        after.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        assert train(after, schedule, 45 - stop, first_step=stop) == whole[stop:]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_state_can_be_loaded_twice_and_a_schedule_pickled(name):
    optimizer = three_groups()
    scheduler = get_schedule(name, optimizer, num_training_steps=40, steps_per_epoch=13)
    train(optimizer, scheduler, 5)
    state = scheduler.state_dict()
    for _ in range(2):
        scheduler.load_state_dict(state)
    copy = pickle.loads(pickle.dumps(scheduler))
    assert train(copy.optimizer, copy, 20, first_step=5) == train(optimizer, scheduler, 20, first_step=5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_that_are_tensors_are_changed_in_place(name):
    rates = [torch.tensor(rate) for rate in (1e-3, 1e-2, 1e-1)]
    optimizer = three_groups(rates=rates, fused=True)
    with_floats = three_groups(rates=[float(rate) for rate in rates], fused=True)
    tensors = [group["lr"] for group in optimizer.param_groups]
    run = {"num_training_steps": 20, "steps_per_epoch": 10}
    actual = train(optimizer, get_schedule(name, optimizer, **run), 20)
    expected = train(with_floats, get_schedule(name, with_floats, **run), 20)
    assert all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, tensors, strict=True))
    for step, (groups, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert [group[0] for group in groups] == pytest.approx([group[0] for group in wanted], rel=1e-5), step


def momentum_after(optimizer, **settings):
    """Momentum, or the betas, of each group after the peak of a one-cycle run and at its start."""
    key = "momentum" if "momentum" in optimizer.param_groups[0] else "betas"
    scheduler = get_one_cycle_schedule(optimizer, 11, pct_start=0.5454545, anneal_strategy="linear", **settings)
    at_start = [group.get(key) for group in optimizer.param_groups]
    train(optimizer, scheduler, 5)
    return at_start, [group.get(key) for group in optimizer.param_groups]


def test_one_cycle_cycles_the_first_beta_and_leaves_the_second():
    at_start, at_peak = momentum_after(three_groups(betas=(0.9, 0.98)))
    assert at_start == [(0.95, 0.98)] * 3
    assert at_peak == [(pytest.approx(0.85), 0.98)] * 3


def test_one_cycle_cycles_momentum_per_group_and_leaves_groups_without_it():
    optimizer = three_groups(torch.optim.SGD, momentum=0.9)
    optimizer.param_groups[1]["momentum"] = 0
    at_start, at_peak = momentum_after(optimizer, base_momentum=0.8, max_momentum=0.9)
    assert at_start == [0.9, 0, 0.9]
    assert at_peak == [pytest.approx(0.8), 0, pytest.approx(0.8)]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.RMSprop])
def test_one_cycle_does_not_switch_momentum_on(optimizer):
    assert momentum_after(three_groups(optimizer)) == ([0, 0, 0], [0, 0, 0])


def test_one_cycle_leaves_a_first_beta_of_zero():
    assert momentum_after(three_groups(betas=(0.0, 0.98))) == ([(0.0, 0.98)] * 3, [(0.0, 0.98)] * 3)


def test_one_cycle_leaves_momentum_when_told_to():
    assert momentum_after(three_groups(), cycle_momentum=False) == ([(0.9, 0.999)] * 3, [(0.9, 0.999)] * 3)


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.Adagrad, torch.optim.Adafactor, partial(Adafactor, scale_parameter=False, relative_step=False)],
)
def test_one_cycle_of_an_optimizer_without_momentum_changes_the_rate_alone(optimizer):
    made = three_groups(optimizer)
    untouched = [{key: value for key, value in group.items() if key != "lr"} for group in made.param_groups]
    scheduler = get_one_cycle_schedule(made, 10)
    train(made, scheduler, 4)
    for group, before in zip(made.param_groups, untouched, strict=True):
        assert {key: value for key, value in group.items() if key not in ("lr", "initial_lr")} == before


class OneCycleTrainer(Trainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = get_one_cycle_schedule(optimizer or self.optimizer, num_training_steps)
        return self.lr_scheduler


class Watch(TrainerCallback):
    def __init__(self):
        self.seen = {}

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.seen[state.global_step] = [(group["lr"], group["betas"]) for group in optimizer.param_groups]


def test_in_a_trainer_resumed_in_mid_cycle(tmp_path):
    """Through Accelerate's wrapper, which gives the optimizer new group dictionaries."""

    def run(folder, checkpoint=None):
        args = TrainingArguments(
            output_dir=tmp_path / folder,
            max_steps=9,
            per_device_train_batch_size=4,
            save_steps=4,
            learning_rate=1e-2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        watch = Watch()
        trainer = OneCycleTrainer(
            model=tiny_bert(num_hidden_layers=1),
            args=args,
            train_dataset=token_rows(16),
            data_collator=default_data_collator,
            callbacks=[watch],
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return watch.seen, trainer.model.state_dict()

    seen, weights = run("whole")
    rates = simulate(partial(get_one_cycle_schedule, num_training_steps=9), [1e-2], 9)[0]
    assert [groups[0][0] for groups in seen.values()] == pytest.approx(rates)
    assert seen[2][0][1] == (pytest.approx(0.85, abs=0.01), 0.999)
    again, same_weights = run("again", checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert again == {step: groups for step, groups in seen.items() if step >= 4}
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)


# By name.


def by_name(name, num_steps=60, steps_per_epoch=10, **settings):
    return shares(
        partial(get_schedule, name, num_training_steps=num_steps, steps_per_epoch=steps_per_epoch, **settings),
        num_steps,
    )


@pytest.mark.parametrize("mode", ["triangular", "triangular2"])
def test_cyclical_by_name_counts_in_steps_or_epochs(mode):
    half_an_epoch = shares(partial(get_cyclical_schedule, mode=mode, step_size=5), 60)
    assert by_name(mode) == half_an_epoch
    assert by_name(mode, step_epochs=0.5) == half_an_epoch
    assert by_name(mode, step_size=5) == half_an_epoch
    assert by_name(mode, step_epochs=2, ratio=8) == shares(
        partial(get_cyclical_schedule, mode=mode, step_size=20, ratio=8), 60
    )


def test_cycles_stay_in_step_with_epochs_of_an_odd_number_of_steps():
    values = by_name("triangular", num_steps=55, steps_per_epoch=11, ratio=10)
    assert [values[epoch * 11] for epoch in range(5)] == pytest.approx([0.1] * 5)


def test_exp_range_by_name_leaves_a_tenth_of_the_height_unless_told():
    values = by_name("exp_range", num_steps=101, step_size=10, ratio=2)
    assert values[90] - 0.5 == pytest.approx(0.5 * 0.1 ** (90 / 101))
    assert by_name("exp_range", step_size=10, gamma=0.9) == shares(
        partial(get_cyclical_schedule, mode="exp_range", step_size=10, gamma=0.9), 60
    )


def test_sgdr_by_name_counts_in_epochs_or_steps():
    assert by_name("sgdr") == shares(partial(get_sgdr_schedule, cycle_len=10), 60)
    assert by_name("sgdr", cycle_len=0.5) == shares(partial(get_sgdr_schedule, cycle_len=5), 60)
    assert by_name("sgdr", cycle_steps=7, cycle_mult=2, min_ratio=0.1) == shares(
        partial(get_sgdr_schedule, cycle_len=7, cycle_mult=2, min_ratio=0.1), 60
    )
    warm = shares(partial(get_sgdr_schedule, cycle_len=20, warmup_len=5), 60)
    assert by_name("sgdr", cycle_len=2, warmup_len=0.5) == by_name("sgdr", cycle_steps=20, warmup_len=5) == warm


def test_the_others_by_name_are_their_functions():
    assert by_name("slanted_triangular", ratio=8) == shares(
        partial(get_slanted_triangular_schedule, num_training_steps=60, ratio=8), 60
    )
    assert by_name("one_cycle", pct_start=0.4) == shares(
        partial(get_one_cycle_schedule, num_training_steps=60, pct_start=0.4), 60
    )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("num_steps", "steps_per_epoch"), [(1, 1), (2, 1), (5, 1000)])
def test_every_name_works_in_the_shortest_runs(name, num_steps, steps_per_epoch):
    values = by_name(name, num_steps, steps_per_epoch)
    assert all(0 <= value <= 1 for value in values)


@pytest.mark.parametrize("name", SCHEDULES)
def test_check_schedule_accepts_every_name_as_it_is(name):
    check_schedule(name)
    check_schedule(name, {})


def test_schedule_settings():
    assert schedule_settings("slanted_triangular") == ["cut_frac", "ratio"]
    assert schedule_settings("triangular2") == ["step_size", "step_epochs", "ratio"]
    assert schedule_settings("exp_range") == ["step_size", "step_epochs", "ratio", "gamma"]
    assert schedule_settings("sgdr") == ["cycle_len", "cycle_steps", "cycle_mult", "min_ratio", "warmup_len"]
    assert schedule_settings("one_cycle")[:3] == ["pct_start", "div_factor", "final_div_factor"]


# What is refused.


@pytest.mark.parametrize(
    ("name", "settings", "line"),
    [
        (
            "slanted_triangle",
            {},
            'There is no schedule "slanted_triangle"; there are slanted_triangular, triangular, triangular2, '
            'exp_range, sgdr, one_cycle. Did you mean "slanted_triangular"?',
        ),
        (
            "sgdr",
            {"cycle_length": 2},
            'The schedule "sgdr" has no setting "cycle_length"; it has cycle_len, cycle_steps, cycle_mult, min_ratio, '
            "warmup_len."
            ' Did you mean "cycle_len"? Received: cycle_length=2',
        ),
        (
            "slanted_triangular",
            {"num_training_steps": 7},
            'The schedule "slanted_triangular" has no setting "num_training_steps"; it has cut_frac, ratio. '
            "Received: num_training_steps=7",
        ),
        (
            "sgdr",
            {"cycle_len": 1, "cycle_steps": 5},
            "Give cycle_len (in epochs) or cycle_steps, not both. Received: cycle_len=1, cycle_steps=5",
        ),
        (
            "triangular",
            {"step_size": 1, "step_epochs": 5},
            "Give step_size (in steps) or step_epochs, not both. Received: step_size=1, step_epochs=5",
        ),
        (
            "slanted_triangular",
            {"cut_frac": 0},
            "cut_frac must be a number above 0 and at most 1. Received: cut_frac=0",
        ),
        ("slanted_triangular", {"ratio": "32"}, "ratio must be a number of at least 1. Received: ratio='32'"),
        ("sgdr", {"cycle_steps": 1.5}, "cycle_steps must be a whole number of at least 1. Received: cycle_steps=1.5"),
        (
            "one_cycle",
            {"anneal_strategy": "cosine"},
            "anneal_strategy must be one of cos, linear. Did you mean \"cos\"? Received: anneal_strategy='cosine'",
        ),
    ],
)
def test_refused_before_there_is_an_optimizer(name, settings, line):
    with pytest.raises(InputError) as error:
        check_schedule(name, settings)
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (get_slanted_triangular_schedule, {"num_training_steps": 0}),
        (get_slanted_triangular_schedule, {"num_training_steps": 9, "cut_frac": 1.1}),
        (get_slanted_triangular_schedule, {"num_training_steps": 9, "cut_frac": -0.1}),
        (get_slanted_triangular_schedule, {"num_training_steps": 9, "ratio": 0.5}),
        (get_slanted_triangular_schedule, {"num_training_steps": 9, "ratio": math.nan}),
        (get_cyclical_schedule, {"step_size": 0.5}),
        (get_cyclical_schedule, {"step_size": True}),
        (get_cyclical_schedule, {"step_size": 5, "mode": "triangular3"}),
        (get_cyclical_schedule, {"step_size": 5, "ratio": 0}),
        (get_cyclical_schedule, {"step_size": 5, "mode": "exp_range"}),
        (get_cyclical_schedule, {"step_size": 5, "mode": "exp_range", "gamma": 0}),
        (get_cyclical_schedule, {"step_size": 5, "mode": "exp_range", "gamma": 1.01}),
        (get_cyclical_schedule, {"step_size": 5, "mode": "triangular", "gamma": 0.9}),
        (get_sgdr_schedule, {"cycle_len": 0}),
        (get_sgdr_schedule, {"cycle_len": -1}),
        (get_sgdr_schedule, {"cycle_len": math.inf}),
        (get_sgdr_schedule, {"cycle_len": 1, "cycle_mult": 0.5}),
        (get_sgdr_schedule, {"cycle_len": 1, "min_ratio": -0.1}),
        (get_sgdr_schedule, {"cycle_len": 1, "min_ratio": 1.5}),
        (get_sgdr_schedule, {"cycle_len": 1, "steps_per_epoch": 0}),
        (get_sgdr_schedule, {"cycle_len": 1, "warmup_len": -1}),
        (get_one_cycle_schedule, {"num_training_steps": 2.5}),
        (get_one_cycle_schedule, {"num_training_steps": 9, "pct_start": 1.5}),
        (get_one_cycle_schedule, {"num_training_steps": 9, "pct_start": 0.6, "three_phase": True}),
        (get_one_cycle_schedule, {"num_training_steps": 9, "div_factor": 0.9}),
        (get_one_cycle_schedule, {"num_training_steps": 9, "final_div_factor": 0}),
        (get_one_cycle_schedule, {"num_training_steps": 9, "three_phase": "no"}),
        (get_one_cycle_schedule, {"num_training_steps": 9, "cycle_momentum": None}),
        (get_one_cycle_schedule, {"num_training_steps": 9, "max_momentum": 1.0}),
        (get_one_cycle_schedule, {"num_training_steps": 9, "base_momentum": 0.99}),
        (get_one_cycle_schedule, {"num_training_steps": 9, "base_momentum": 0}),
    ],
)
def test_values_out_of_range_are_refused_in_one_line_and_change_nothing(build, settings):
    optimizer = three_groups()
    with pytest.raises(InputError, match=r"Received: \w+=") as error:
        build(optimizer, **settings)
    assert "\n" not in str(error.value)
    assert [group["lr"] for group in optimizer.param_groups] == RATES
