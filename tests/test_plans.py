"""Phases and plans as Python objects and YAML; the refusals name what is wrong and what is meant."""

import dataclasses

import pytest

from ulmfit_tools import FineTuningPlan, InputError, Phase, UntilOverfit, shipped_plans
from ulmfit_tools.data.augmentation import Augmentation

GROUPS = ["embeddings", "layer.0", "layer.1", "layer.2", "head"]


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("all", (0, 1, 2, 3, 4)),
        ("head", (4,)),
        ("top_half", (2, 3, 4)),  # ceil(5 / 2) groups from the top
        (1, (4,)),
        (4, (1, 2, 3, 4)),
        (["head", "layer.1"], (2, 4)),
    ],
)
def test_groups_to_train(train, expected):
    assert Phase(name="x", train=train).groups_to_train(GROUPS) == expected


def test_each_becomes_one_phase_a_group_from_the_input_up():
    phases = FineTuningPlan.load("chain_thaw").expand(GROUPS)
    assert [phase.name for phase in phases] == ["head", *(f"one-{name}" for name in GROUPS), "all"]
    trained = [phase.groups_to_train(GROUPS) for phase in phases]
    assert trained == [(4,), (0,), (1,), (2,), (3,), (4,), (0, 1, 2, 3, 4)]


@pytest.mark.parametrize("name", shipped_plans())
def test_shipped_plan_survives_yaml(name, tmp_path):
    plan = FineTuningPlan.load(name)
    file = tmp_path / "plan.yaml"
    file.write_text(plan.to_yaml())
    assert FineTuningPlan.load(file) == plan
    assert plan.description


def test_a_plan_with_everything_survives_yaml(tmp_path):
    plan = FineTuningPlan(
        name="mine",
        description="All of it.",
        settings={"learning_rate": 2e-4, "seed": 7},
        phases=[
            Phase(name="a", train="head", steps=10, schedule="sgdr", schedule_settings={"cycle_len": 1}),
            Phase(name="b", train=2, epochs=0.5, learning_rate=(1e-5, 1e-3), keep="best"),
            Phase(name="e", augment=Augmentation(drop=0.2, mask=0.1)),
            Phase(name="c", train=["head"], until_overfit=UntilOverfit(patience=3, min_delta=0.01, max_epochs=9)),
            Phase(name="d", factor=2.6, num_groups=3, learning_rate="previous", precompute=True, note="Last."),
        ],
    )  # fmt: skip
    file = tmp_path / "plan.yml"
    file.write_text(plan.to_yaml())
    assert FineTuningPlan.load(str(file)) == plan


def test_yaml_reads_rates_as_people_write_them(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("name: x\nphases: [{name: a, learning_rate: 2e-4}, {name: b, learning_rate: [1e-5, 1E-3]}]\n")
    a, b = FineTuningPlan.load(file).phases
    assert a.learning_rate == 0.0002
    assert b.learning_rate == (0.00001, 0.001)


def test_augment_true_is_the_default_and_false_is_none():
    assert Phase.from_dict({"name": "x", "augment": True}).augment == Augmentation(drop=0.1)
    assert Phase.from_dict({"name": "x", "augment": False}).augment is None
    with pytest.raises(InputError, match="augment is an Augmentation or None. Received: True"):
        Phase(name="x", augment=True)


def test_until_overfit_keeps_the_best_checkpoint():
    phase = Phase.from_dict({"name": "x", "until_overfit": True})
    assert phase.until_overfit == UntilOverfit()
    assert phase.keep == "best"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "x", "epoch": 3}, "no key 'epoch'.*Did you mean \"epochs\""),
        ({"train": "all"}, "needs a name"),
        ({"name": "../x"}, "names a folder. Received: '../x'"),
        ({"name": "x", "train": "heads"}, "Received: 'heads'. Did you mean \"head\""),
        ({"name": "x", "train": 0}, "at least 1.*Received: 0"),
        ({"name": "x", "train": []}, "at least one group"),
        ({"name": "x", "epochs": 1, "steps": 5}, "epochs and steps exclude each other"),
        ({"name": "x", "epochs": -1}, "positive number. Received: -1"),
        ({"name": "x", "steps": 1.5}, "whole number from 1. Received: 1.5"),
        ({"name": "x", "learning_rate": "fast"}, "a span .low, high., auto or previous. Received: 'fast'"),
        ({"name": "x", "learning_rate": "previus"}, "Did you mean \"previous\""),
        ({"name": "x", "learning_rate": "previous"}, "the first phase has no phase before it"),
        ({"name": "x", "precompute": "yes"}, "precompute is true or false. Received: 'yes'"),
        ({"name": "x", "augment": {"dropp": 0.1}}, "augment has no key 'dropp'.*Did you mean \"drop\""),
        ({"name": "x", "augment": {"drop": 2}}, "augment.drop is a share from 0 to below 1. Received: 2"),
        ({"name": "x", "augment": {}}, "augment changes nothing"),
        ({"name": "x", "augment": "much"}, "augment must be a mapping"),
        ({"name": "x", "note": 3}, "note is a text. Received: 3"),
        ({"name": "x", "learning_rate": [1e-3, 1e-5]}, "low must not be above high"),
        ({"name": "x", "learning_rate": [1e-3]}, "two rates"),
        ({"name": "x", "learning_rate": [1e-5, 1e-3], "factor": 2}, "exclude each other"),
        ({"name": "x", "schedule": "slanted"}, "slanted_triangular"),
        ({"name": "x", "schedule": ["sgdr"]}, r"schedule must be one of .*Received: \['sgdr'\]"),
        ({"name": "x", "schedule_settings": {"cut_frac": 0.2}}, "needs a schedule"),
        ({"name": "x", "schedule": "linear", "schedule_settings": 3}, "must be a mapping. Received: 3"),
        ({"name": "x", "schedule": "sgdr", "schedule_settings": {1: 3}}, 'no setting "1"'),
        ({"name": "x", "steps": True}, "whole number from 1. Received: True"),
        ({"name": "x", "until_overfit": {"patience": True}}, "whole number from 1. Received: True"),
        ({"name": "x", "until_overfit": {"max_epochs": None}}, "positive number. Received: None"),
        ({"name": "x", "train": None}, "at least one group. Received: None"),
        ({"name": "x", "keep": None}, "one of last, best. Received: None"),
        ({"name": "x", "keep": "worst"}, "one of last, best. Received: 'worst'"),
        ({"name": "x", "until_overfit": {"patience": 0}}, "whole number from 1. Received: 0"),
        ({"name": "x", "until_overfit": {"patients": 2}}, "Did you mean \"patience\""),
        ("x", "must be a mapping"),
    ],
)  # fmt: skip
def test_wrong_phase_is_refused(values, message):
    with pytest.raises(InputError, match=message) as error:
        FineTuningPlan.from_dict({"name": "plan", "phases": [values]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a mapping"),
        ("name: x\nname: y\nphases: []\n", "line 2: the key 'name' stands twice"),
        ("name: x\nphases: []\n", "nothing would train"),
        ("name: x\nphases: [{name: a}, {name: a}]\n", "names must differ. Received twice: a"),
        ("name: x\n", "needs the key 'phases'"),
        ("name: x\nphase: []\n", "no key 'phase'.*Did you mean \"phases\""),
        ("name: [x\n", "not valid YAML"),
        ("name: x\n[a]: 3\nphases: []\n", "line 2: a key is a plain word, not a sequence"),
        ("name: x\nphases: [{{a: 1}: 3}]\n", "line 2: a key is a plain word, not a mapping"),
        ("name: x\nphases: [{<<: 3}]\n", "not valid YAML: .*merging"),
        ("name:\nphases: [{name: a}]\n", "name is a text. Received: None"),
        ("name: x\nphases: {name: a}\n", "phases are a list"),
        ("name: x\nsettings: [seed]\nphases: [{name: a}]\n", r"mapping of training arguments. Received: \['seed'\]"),
        ("name: x\nsettings: 0\nphases: [{name: a}]\n", "mapping of training arguments. Received: 0"),
        ("name: x\nphases: [{name: !!python/object/apply:os.getcwd []}]\n", "not valid YAML"),
    ],
)
def test_wrong_plan_file_is_refused(tmp_path, text, message):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        FineTuningPlan.load(file)
    assert "\n" not in str(error.value)


def test_a_mapping_may_take_over_another(tmp_path):
    """YAML's merge key; what the mapping says itself wins, in whatever order they are read."""
    file = tmp_path / "plan.yaml"
    file.write_text(
        "name: x\n"
        "settings: {seed: 3}\n"
        "phases:\n"
        "  - &head {name: head, train: head, epochs: 1, schedule: sgdr, schedule_settings: &cycles {cycle_len: 2}}\n"
        "  - &all {<<: *head, name: all, train: all, schedule_settings: {<<: *cycles, cycle_mult: 2}}\n"
        "  - {<<: *all, name: last}\n"
    )
    head, everything, last = FineTuningPlan.load(file).phases
    assert (head.schedule_settings, head.train) == ({"cycle_len": 2}, "head")
    assert everything == Phase(
        name="all", epochs=1, schedule="sgdr", schedule_settings={"cycle_len": 2, "cycle_mult": 2}
    )
    assert last == dataclasses.replace(everything, name="last")


def test_settings_without_a_value_are_none(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("name: 7\nsettings:\nphases: [{name: a, schedule: linear, schedule_settings: }]\n")
    assert FineTuningPlan.load(file) == FineTuningPlan(name="7", phases=[Phase(name="a", schedule="linear")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"phases": ["a"]}, r"phases are a list of Phase objects. Received: \['a'\]"),
        ({"phases": 3}, "Received: 3"),
        ({"phases": [Phase(name="a")], "settings": None}, "mapping of training arguments. Received: None"),
        ({"phases": [Phase(name="a")], "name": 3}, "name is a text. Received: 3"),
    ],
)
def test_wrong_plan_in_python_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        FineTuningPlan(**{"name": "x"} | arguments)


def test_unknown_plan_suggests_the_nearest():
    with pytest.raises(InputError, match="no plan 'gradual_unfreezin'.*Did you mean \"gradual_unfreezing\""):
        FineTuningPlan.load("gradual_unfreezin")


def test_missing_plan_file_is_named():
    with pytest.raises(InputError, match="no file my_plan.yaml"):
        FineTuningPlan.load("my_plan.yaml")


def test_group_that_the_model_lacks_is_named():
    with pytest.raises(InputError, match="no layer group 'layer.9'.*Did you mean \"layer."):
        Phase(name="x", train=["layer.9"]).groups_to_train(GROUPS)
    with pytest.raises(InputError, match="5 layer groups. Received: 6"):
        Phase(name="x", train=6).groups_to_train(GROUPS)
