"""Whose word counts in a run of phases: flags, the plan's settings, what a phase names itself; and that it is said."""

from pathlib import Path

import pytest
from tiny_text import colour_folder, model_folder

from ulmfit_tools import FineTuningPlan, InputError, Phase, UntilOverfit
from ulmfit_tools.cli import main
from ulmfit_tools.plans.settings import phase_arguments, run_arguments, run_notes

BEST = Phase(name="best", keep="best")
LAST = Phase(name="last")


def plan_of(*phases, **settings):
    return FineTuningPlan(name="x", phases=phases, settings=settings)


def arguments(plan, **given):
    """The arguments of each phase."""
    args = run_arguments(plan, "run", {"use_cpu": True} | given)
    return [phase_arguments(phase, args, Path("run"), i, validates=True) for i, phase in enumerate(plan.phases)]


@pytest.mark.parametrize(
    ("phases", "given", "values", "line"),
    [
        (
            [Phase(name="own", factor=3), Phase(name="span", learning_rate=(1e-5, 1e-3)), LAST],
            {"discriminative_factor": 2},
            [3, None, 2],
            "--discriminative_factor serves 'last' of the plan's phases. 'own' names its own factor; "
            "'span' names its own learning_rate.",
        ),
        (
            [BEST, LAST],
            {"save_strategy": "steps", "save_steps": 7},
            ["epoch", "steps"],
            "--save_strategy serves 'last' of the plan's phases. 'best' keeps its best weights, and so writes its "
            "checkpoints when it evaluates (--eval_strategy).",
        ),
        (
            [BEST, LAST],
            {"save_strategy": "steps", "save_steps": 7, "eval_strategy": "steps", "eval_steps": 5},
            ["steps", "steps"],
            "--save_steps serves 'last' of the plan's phases. 'best' keeps its best weights",
        ),
        (
            [Phase(name="own", epochs=2), LAST],
            {"num_train_epochs": 5},
            [2, 5],
            "--num_train_epochs serves 'last' of the plan's phases. 'own' names its own epochs.",
        ),
        (
            [Phase(name="own", schedule="linear"), Phase(name="rises", schedule="sgdr"), LAST],
            {"warmup_steps": 10},
            [10, 0, 0],
            "--warmup_steps serves 'own' of the plan's phases. 'rises' has the schedule sgdr, which rises by itself; "
            "'last' has the schedule slanted_triangular, which rises by itself.",
        ),
        ([Phase(name="own", schedule="linear")], {"warmup_steps": 10}, [10], None),
        (
            [Phase(name="own", schedule="sgdr"), LAST],
            {"warmup_steps": 3, "lr_scheduler_type": "linear"},
            [0, 3],
            "'last'",
        ),
        ([BEST], {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 5}, ["steps"], None),
        ([Phase(name="found", learning_rate="auto")], {"learning_rate_low": 1e-6}, [1e-6], None),
        (
            [Phase(name="found", learning_rate="auto")],
            {"learning_rate": 1e-3},
            [1e-3],
            "--learning_rate serves 'found' only where a range test finds no rate too high.",
        ),
    ],
)
def test_a_flag_serves_the_phases_that_name_none_of_their_own_and_says_so(phases, given, values, line):
    made = arguments(plan_of(*phases), **given)
    assert [getattr(args, next(iter(given))) for args in made] == values
    notes = "\n".join(run_notes(plan_of(*phases), given))
    assert notes == "" if line is None else line in notes


@pytest.mark.parametrize(
    ("phases", "given", "message"),
    [
        (
            [Phase(name="a", factor=3), Phase(name="b", learning_rate=(1e-5, 1e-3))],
            {"discriminative_factor": 2},
            "every phase of plan 'x' names its own factor or names its own learning_rate",
        ),
        (
            [BEST, Phase(name="b", until_overfit=UntilOverfit())],
            {"save_strategy": "steps"},
            "--save_strategy would do nothing: every phase of plan 'x' keeps its best weights.*--eval_strategy",
        ),
        (
            [Phase(name="a", schedule="sgdr")],
            {"warmup_steps": 3},
            "every phase of plan 'x' has the schedule sgdr, which rises by itself",
        ),
        ([LAST], {"warmup_steps": 3}, "has the schedule slanted_triangular, which rises by itself"),
        ([Phase(name="a", schedule="linear")], {"warmup_steps": -1}, "Phase 'a': .*warmup_steps"),
        ([Phase(name="a", schedule="linear")], {"warmup_steps": "1"}, "Phase 'a': warmup_steps must be a number"),
        ([Phase(name="a", keep="best")], {"metric_for_best_model": 3}, "metric_for_best_model=3"),
        (
            [Phase(name="a", schedule="cosine_with_restarts", schedule_settings={"num_cycle": 2})],
            {},
            'Phase \'a\': The schedule "cosine_with_restarts" has no setting .*Did you mean "num_cycles"',
        ),
    ],
)
def test_a_flag_that_would_do_nothing_or_is_wrong_is_refused(phases, given, message):
    with pytest.raises(InputError, match=message):
        arguments(plan_of(*phases), **given)


def test_another_schedule_replaces_what_belonged_to_the_plans():
    settings = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2}, "warmup_steps": 5}
    plan = plan_of(LAST, **settings)
    (args,) = arguments(plan)
    assert (args.schedule_settings, args.warmup_steps) == ({"power": 2}, 5)
    (args,) = arguments(plan, lr_scheduler_type="cosine")
    assert (args.schedule_name, args.schedule_settings, args.warmup_steps) == ("cosine", {}, 5)
    (args,) = arguments(plan, lr_scheduler_type="sgdr")
    assert (args.schedule_name, args.schedule_settings, args.warmup_steps) == ("sgdr", {}, 0)


def test_metrics_of_the_users_own_may_have_any_name():
    plan = plan_of(BEST, metric_for_best_model="f1")
    with pytest.raises(InputError, match="one of loss, accuracy"):
        run_arguments(plan, "run", {"use_cpu": True})
    assert run_arguments(plan, "run", {"use_cpu": True}, own_metrics=True).metric_for_best_model == "f1"


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("settings: {learning_rate: null}\nphases: [{name: a}]", "learning_rate must be a number"),
        ('settings: {learning_rate: "2e-4"}\nphases: [{name: a}]', "learning_rate must be a number"),
        ("settings: {lr_scheduler_kwargs: 3}\nphases: [{name: a}]", "a mapping, or a JSON object"),
        ("[a]: 3\nphases: [{name: a}]", "a key is a plain word"),
        (
            "phases: [{name: a}, {name: b, schedule: cosine_with_restarts, schedule_settings: {num_cycle: 2}}]",
            "Did you mean",
        ),
    ],
)
def test_a_wrong_plan_is_one_line_and_exit_code_2_before_anything_is_written(plan, message, tmp_path, capsys):
    file = tmp_path / "plan.yaml"
    file.write_text(f"name: x\n{plan}\n")
    model, data = model_folder(tmp_path / "model"), colour_folder(tmp_path / "data")
    flags = ["--model", model, "--dataset", data, "--plan", file, "--output_dir", tmp_path / "run", "--use_cpu"]
    capsys.readouterr()
    assert main(["train", *map(str, flags)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()
