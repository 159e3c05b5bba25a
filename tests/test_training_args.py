"""The training arguments where transformers reads them by itself."""

import copy
import dataclasses
import json
import pickle

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
