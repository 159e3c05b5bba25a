"""The training arguments where transformers reads them by itself."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import yaml
from tiny import tiny_bert, token_rows
from transformers import HfArgumentParser

from ulmfit_tools.errors import InputError
from ulmfit_tools.schedules import SCHEDULES
from ulmfit_tools.trainer import ULMFiTTrainer, ULMFiTTrainingArguments


@pytest.mark.parametrize("name", [None, "one_cycle", "cosine"])
def test_trainer_writes_its_model_card(tmp_path, name):
    settings = {} if name is None else {"lr_scheduler_type": name}
    args = ULMFiTTrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, save_strategy="no", **settings)
    trainer = ULMFiTTrainer(model=tiny_bert(), args=args, train_dataset=token_rows(8))
    trainer.train()
    trainer.create_model_card()
    assert f"lr_scheduler_type: {name or 'slanted_triangular'}\n" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", [*SCHEDULES, "cosine"])
def test_a_schedule_has_its_value_however_the_arguments_travel(name):
    parser = HfArgumentParser(ULMFiTTrainingArguments)
    flags = ["--output_dir", "run", "--lr_scheduler_type", name]
    args = parser.parse_args_into_dataclasses(flags)[0]
    written = json.loads(args.to_json_string())
    assert written["lr_scheduler_type"] == name
    travelled = {
        "flags": args,
        "dictionary": ULMFiTTrainingArguments(**args.to_dict()),
        "yaml": ULMFiTTrainingArguments(**yaml.safe_load(yaml.safe_dump(args.to_dict()))),
        "json": parser.parse_dict(written)[0],
        "replaced": dataclasses.replace(args, seed=7),
        "copied": copy.deepcopy(args),
        "pickled": pickle.loads(pickle.dumps(args)),
    }
    for way, same in travelled.items():
        assert (same.lr_scheduler_type, same.lr_scheduler_type.value) == (name, name), way
        assert type(same.lr_scheduler_type.value) is str, way


def test_no_rates_for_the_groups_are_refused():
    with pytest.raises(InputError, match=r"a rate for each layer group\. Received: \[\]"):
        ULMFiTTrainingArguments("run", group_learning_rates=[])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": "2e-4"}, "learning_rate must be a number. Received: learning_rate='2e-4'"),
        ({"learning_rate": None}, "learning_rate must be a number. Received: learning_rate=None"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number. Received: weight_decay=nan"),
        ({"seed": 1.5}, "seed must be a whole number. Received: seed=1.5"),
        ({"save_total_limit": True}, "save_total_limit must be a whole number. Received: save_total_limit=True"),
        ({"bf16": "yes"}, "bf16 must be true or false. Received: bf16='yes'"),
        ({"group_learning_rates": 3}, "must be a list of numbers. Received: group_learning_rates=3"),
        ({"label_names": [1]}, r"label_names must be a list of texts. Received: label_names=\[1\]"),
        ({"log_level": "loud"}, "log_level is one of detail, debug, .* Received: log_level='loud'"),
        ({"train_sampling_strategy": None}, "one of random, .*Received: train_sampling_strategy=None"),
        ({"lr_scheduler_kwargs": 3}, "a mapping, or a JSON object .*Received: 3"),
        ({"lr_scheduler_kwargs": "3"}, "a mapping, or a JSON object .*Received: '3'"),
    ],
)
def test_a_value_of_a_wrong_type_is_one_line(settings, message):
    with pytest.raises(InputError, match=message) as error:
        ULMFiTTrainingArguments("run", **settings)
    assert "\n" not in str(error.value)


def test_numbers_of_numpy_are_numbers():
    args = ULMFiTTrainingArguments("run", seed=np.int64(3), learning_rate=np.float32(0.5), weight_decay=0)
    assert (args.seed, args.learning_rate) == (3, 0.5)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cosine_with_restarts", {"num_cycle": 2}, 'it has num_cycles. Did you mean "num_cycles"'),
        ("cosine_with_restarts", {"num_cycles": "two"}, "cannot be made: .*lr_scheduler_kwargs={'num_cycles'"),
        ("cosine_with_restarts", {1: 2}, 'no setting "1"'),
        ("constant", {"num_cycles": 2}, 'no setting "num_cycles"; it has none'),
        ("polynomial", {"lr_end": 1.0}, "lr_end .* must be smaller than initial lr"),
        ("warmup_stable_decay", {}, "cannot be made: .*num_decay_steps"),
        ("reduce_lr_on_plateau", {"patients": 2}, "unexpected keyword argument 'patients'"),
    ],
)
def test_trainers_own_schedule_is_tried_before_the_training(name, settings, message):
    more = {"eval_strategy": "epoch"} if name == "reduce_lr_on_plateau" else {}
    with pytest.raises(InputError, match=message):
        ULMFiTTrainingArguments("run", lr_scheduler_type=name, lr_scheduler_kwargs=settings, **more)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("linear", {}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {"lr_end": 1e-8, "power": 2.0}),
        ("warmup_stable_decay", {"num_decay_steps": 5, "min_lr_ratio": 0.1}),
        ("reduce_lr_on_plateau", {"patience": 2}),
        ("cosine_with_min_lr", {"min_lr": 1e-6}),
        ("inverse_sqrt", {"timescale": 100}),
        ("greedy", {}),
        ("constant", {}),
    ],
)
@pytest.mark.parametrize("warmup_steps", [0, 0.1, 7])
def test_trainers_own_schedules_are_taken_with_their_settings(name, settings, warmup_steps):
    args = ULMFiTTrainingArguments(
        "run", lr_scheduler_type=name, lr_scheduler_kwargs=settings, warmup_steps=warmup_steps, eval_strategy="epoch"
    )
    assert args.schedule_settings == settings


def test_a_null_leaves_a_schedules_setting_at_its_default():
    settings = {"cycle_len": 2, "cycle_steps": None}
    assert ULMFiTTrainingArguments(
        "run", lr_scheduler_type="sgdr", lr_scheduler_kwargs=settings
    ).schedule_settings == {"cycle_len": 2}


@pytest.mark.parametrize("share", [1.0, 2, -0.1])
def test_label_smoothing_is_a_share(share):
    with pytest.raises(InputError, match=f"from 0 to below 1. Received: label_smoothing_factor={share}"):
        ULMFiTTrainingArguments("out", label_smoothing_factor=share)
    assert ULMFiTTrainingArguments("out", label_smoothing_factor=0.9).label_smoothing_factor == 0.9
