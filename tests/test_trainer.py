import dataclasses
import inspect
import logging
import math

import numpy as np
import pytest
import torch
from architectures import tiny_model
from datasets import Dataset
from runs import make_trainer
from tiny import pad_rows, ragged_rows, tiny_bert
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import SchedulerType

from ulmfit_tools.errors import InputError
from ulmfit_tools.freezing import freeze_to
from ulmfit_tools.param_groups import group_learning_rates
from ulmfit_tools.sampling import EpochLengthGroupedSampler, length_grouped_order, row_lengths
from ulmfit_tools.schedules import SCHEDULES
from ulmfit_tools.trainer import ULMFiTTrainer, ULMFiTTrainingArguments, optimizer_of_arguments

NEW_FIELDS = {"discriminative_factor", "num_layer_groups", "learning_rate_low", "group_learning_rates"}
TINY_LLAMA = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def parse(*flags: str) -> ULMFiTTrainingArguments:
    return HfArgumentParser(ULMFiTTrainingArguments).parse_args_into_dataclasses(["--output_dir", "run", *flags])[0]


class TestArguments:
    def test_few_fields_of_its_own(self):
        upstream = {field.name for field in dataclasses.fields(TrainingArguments)}
        assert {field.name for field in dataclasses.fields(ULMFiTTrainingArguments)} - upstream == NEW_FIELDS

    def test_defaults(self):
        ours, upstream = ULMFiTTrainingArguments("run"), TrainingArguments("run")
        names = [field.name for field in dataclasses.fields(TrainingArguments)]
        changed = {name: getattr(ours, name) for name in names if getattr(ours, name) != getattr(upstream, name)}
        assert {name: value for name, value in changed.items() if name != "logging_dir"} == {
            "lr_scheduler_type": "slanted_triangular",
            "train_sampling_strategy": "group_by_length",
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 64,
            "logging_steps": 50,
            "save_total_limit": 2,
            "restore_callback_states_from_checkpoint": True,
        }
        assert ours.report_to == []

    def test_flags(self):
        args = parse("--lr_scheduler_type", "sgdr", "--lr_scheduler_kwargs", '{"cycle_len": 2}')
        assert (args.lr_scheduler_type, args.schedule_settings) == ("sgdr", {"cycle_len": 2})
        args = parse("--group_learning_rates", "1e-5", "2e-5", "--num_layer_groups", "2")
        assert (args.group_learning_rates, args.num_layer_groups, args.learning_rate) == ([1e-5, 2e-5], 2, 2e-5)
        args = parse("--discriminative_factor", "2.6", "--lr_scheduler_type", "cosine")
        assert (args.discriminative_factor, args.lr_scheduler_type) == (2.6, SchedulerType.COSINE)
        assert parse("--learning_rate_low", "1e-6").learning_rate_low == 1e-6
        with pytest.raises(SystemExit):
            parse("--train_sampling_strategy", "by_length")

    def test_schedules_do_not_hide_trainers_own(self):
        assert not set(SCHEDULES) & {known.value for known in SchedulerType}

    @pytest.mark.parametrize("name", [*SCHEDULES, "cosine", "linear"])
    def test_survive_copies(self, name):
        args = ULMFiTTrainingArguments("run", lr_scheduler_type=name)
        assert dataclasses.replace(args, seed=7).schedule_name == name
        assert args.to_dict()["lr_scheduler_type"] == name
        assert f'"lr_scheduler_type": "{name}"' in args.to_json_string()
        assert ULMFiTTrainingArguments(**args.to_dict()).schedule_name == name
        assert str(ULMFiTTrainingArguments("run", lr_scheduler_type=args.lr_scheduler_type).schedule_name) == name

    @pytest.mark.parametrize(
        ("settings", "line"),
        [
            (
                {"lr_scheduler_type": "slanted_triangle"},
                "Did you mean \"slanted_triangular\"\\?.*lr_scheduler_type='slanted_triangle'",
            ),
            ({"lr_scheduler_type": "sgdr", "lr_scheduler_kwargs": {"cycle_length": 1}}, "cycle_len"),
            ({"lr_scheduler_kwargs": "word"}, "JSON object.*Received: 'word'"),
            ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": "word"}, "JSON object.*Received: 'word'"),
            ({"warmup_steps": 10}, "slanted_triangular has its own rise.*warmup_steps=10"),
            ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint is not needed here"),
            ({"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, "stay draw other random numbers"),
            ({"learning_rate_low": 1e-6, "discriminative_factor": 2.0}, "leave out discriminative_factor"),
            ({"group_learning_rates": [1e-5], "learning_rate_low": 1e-6}, "leave out learning_rate_low"),
            ({"group_learning_rates": [1e-5], "learning_rate": 1e-3}, "learning_rate=0.001"),
        ],
    )
    def test_refuse_what_makes_no_sense_in_one_line(self, settings, line):
        with pytest.raises(InputError, match=line) as caught:
            ULMFiTTrainingArguments("run", **settings)
        assert "\n" not in str(caught.value)

    def test_warmup_with_trainers_own_schedule(self):
        assert ULMFiTTrainingArguments("run", lr_scheduler_type="linear", warmup_steps=10).warmup_steps == 10


class TestOptimizer:
    def rates(self, trainer) -> list[float]:
        """The rate of each layer group, from input to output."""
        found = {group["name"]: group["lr"] for group in trainer.create_optimizer().param_groups}
        return list(found.values())

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"learning_rate": 0.08, "discriminative_factor": 2.0}, [0.01, 0.02, 0.04, 0.08]),
            ({"learning_rate": 0.08, "learning_rate_low": 0.01}, [0.01, 0.02, 0.04, 0.08]),
            ({"group_learning_rates": [0.1, 0.2, 0.3, 0.5], "learning_rate": 0.5}, [0.1, 0.2, 0.3, 0.5]),
            ({"learning_rate": 0.08, "learning_rate_low": 0.02, "num_layer_groups": 3}, [0.02, 0.04, 0.08]),
            ({"learning_rate": 0.08}, group_learning_rates(4, 0.08)),
        ],
    )
    def test_each_layer_group_has_its_rate(self, tmp_path, settings, expected):
        assert self.rates(make_trainer(tmp_path, **settings)) == pytest.approx(expected)

    def test_holds_each_parameter_once_the_frozen_ones_too(self, tmp_path):
        model = tiny_bert(num_hidden_layers=2)
        freeze_to(model, -1)
        trainer = make_trainer(tmp_path, model=model, weight_decay=0.01)
        held = [id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())

    def test_only_the_trainable_ones_on_request(self, tmp_path):
        model = tiny_bert(num_hidden_layers=2)
        freeze_to(model, -1)
        trainer = make_trainer(tmp_path, model=model)
        trainer.optimizer_cls_and_kwargs = optimizer_of_arguments(trainer.args, trainable_only=True)
        held = {id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]}
        assert held == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}

    def test_one_that_is_passed_is_used(self, tmp_path):
        model = tiny_bert(num_hidden_layers=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        args = ULMFiTTrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, save_strategy="no")
        trainer = ULMFiTTrainer(
            model, args, train_dataset=ragged_rows(), data_collator=pad_rows, optimizers=(optimizer, None)
        )
        assert trainer.create_optimizer() is optimizer

    def test_the_log_shows_the_rate_of_the_head(self, tmp_path):
        settings = {"learning_rate": 0.01, "lr_scheduler_type": "constant", "logging_steps": 1, "max_steps": 1}
        trainer = make_trainer(tmp_path, **settings)
        trainer.train()
        assert trainer.state.log_history[0]["learning_rate"] == 0.01

    def test_refuses_arguments_of_plain_trainer(self, tmp_path):
        with pytest.raises(InputError, match="Received: args=TrainingArguments"):
            ULMFiTTrainer(tiny_bert(), TrainingArguments(str(tmp_path)))


class TestSchedule:
    def test_slanted_triangular_by_default(self, tmp_path):
        """20 steps: the rate rises for 2, then falls; at step t, with p the share of the height, (1 + 31 p) / 32."""
        trainer = make_trainer(tmp_path, logging_steps=1, learning_rate=0.032, save_strategy="no")
        trainer.train()
        got = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
        shares = [0, 1 / 2, *(1 - step / 18 for step in range(18))]
        assert got == pytest.approx([0.001 * (1 + 31 * p) for p in shares])

    def test_counts_epochs_in_update_steps(self, tmp_path):
        """SGDR with a cycle of one epoch, 5 updates of 2 batches: cosine from the full rate, twice."""
        settings = {"lr_scheduler_type": "sgdr", "gradient_accumulation_steps": 2, "logging_steps": 1}
        trainer = make_trainer(tmp_path, learning_rate=1.0, save_strategy="no", eval_strategy="no", **settings)
        trainer.train()
        got = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
        cycle = [(1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)]
        assert got == pytest.approx([*cycle, *cycle])

    def test_trainers_own(self, tmp_path):
        trainer = make_trainer(tmp_path, lr_scheduler_type="linear", warmup_steps=4, learning_rate=0.01)
        trainer.create_optimizer_and_scheduler(8)
        rates = []
        for _ in range(8):
            rates.append(trainer.lr_scheduler.get_last_lr()[-1])
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
        assert rates == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01, 0.0075, 0.005, 0.0025])

    def test_outside_of_training(self, tmp_path):
        trainer = make_trainer(tmp_path, lr_scheduler_type="sgdr", learning_rate=1.0)
        trainer.create_optimizer_and_scheduler(20)
        for _ in range(5):
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
        assert trainer.lr_scheduler.get_last_lr()[-1] == pytest.approx(0.5)  # half of an epoch of 10 steps

    def test_training_again_starts_it_again(self, tmp_path):
        trainer = make_trainer(tmp_path, logging_steps=1, max_steps=2, save_strategy="no")
        first = [entry["learning_rate"] for entry in (trainer.train(), trainer.state.log_history)[1][:2]]
        second = [entry["learning_rate"] for entry in (trainer.train(), trainer.state.log_history)[1][:2]]
        assert first == second


class TestDataOrder:
    def batches(self, trainer) -> list[list[int]]:
        seen = []
        collate = trainer.data_collator

        def note(rows):
            seen.append([trainer.train_dataset.index(row) for row in rows])
            return collate(rows)

        trainer.data_collator = note
        trainer.train()
        return seen

    def test_an_epoch_is_the_samplers_order(self, tmp_path):
        trainer = make_trainer(tmp_path, save_strategy="no", eval_strategy="no", data_seed=8)
        lengths = row_lengths(trainer.train_dataset)
        seen = self.batches(trainer)
        for epoch, batches in enumerate((seen[:10], seen[10:])):
            order = length_grouped_order(lengths, 4, seed=8, epoch=epoch)
            assert [row for batch in batches for row in batch] == order

    def test_random_and_sequential_as_in_trainer(self, tmp_path):
        for strategy in ("random", "sequential"):
            settings = {"train_sampling_strategy": strategy, "save_strategy": "no", "eval_strategy": "no"}
            ours, plain = (self.batches(make_trainer(tmp_path, plain=plain, **settings)) for plain in (False, True))
            assert ours == plain

    def test_accumulated_batches_need_not_be_of_one_length(self, tmp_path):
        """Only what is padded together is: more would make each update one of short or of long texts."""
        trainer = make_trainer(tmp_path, gradient_accumulation_steps=8)
        sampler = trainer._get_train_sampler(trainer.train_dataset)
        assert isinstance(sampler, EpochLengthGroupedSampler)
        assert sampler.batch_size == 4

    def test_evaluates_the_longest_first(self, tmp_path):
        trainer = make_trainer(tmp_path)
        lengths = [len(row["input_ids"]) for row in trainer.eval_dataset]
        order = list(trainer._get_eval_sampler(trainer.eval_dataset))
        assert [lengths[row] for row in order] == sorted(lengths, reverse=True)

    @pytest.mark.parametrize("strategy", ["group_by_length", "random"])
    def test_predictions_come_in_the_order_of_the_rows(self, tmp_path, strategy):
        trainer = make_trainer(tmp_path, train_sampling_strategy=strategy, per_device_eval_batch_size=5)
        rows = ragged_rows(12, seed=1)
        output = trainer.predict(rows)
        assert output.label_ids.tolist() == [row["labels"] for row in rows]
        with torch.no_grad():
            alone = [trainer.model(**pad_rows([row])).logits[0] for row in rows]
        assert torch.allclose(torch.tensor(output.predictions), torch.stack(alone), atol=1e-5)

    def test_plain_trainers_predictions_do_not(self, tmp_path):
        rows = ragged_rows(12, seed=1)
        output = make_trainer(tmp_path, plain=True).predict(rows)
        assert output.label_ids.tolist() != [row["labels"] for row in rows]

    ROWS = ragged_rows(12, seed=1)
    IN_BATCHES = ({"eval_do_concat_batches": False}, {"batch_eval_metrics": True})

    @pytest.mark.parametrize("settings", [{}, *IN_BATCHES, {"dataloader_drop_last": True}])
    def test_whoever_sees_the_rows_sees_them_in_their_order(self, tmp_path, settings):
        seen = []

        def compute_metrics(prediction, compute_result=True):
            labels = prediction.label_ids
            seen.extend(np.concatenate(labels) if isinstance(labels, list) else labels)
            return {}

        trainer = make_trainer(tmp_path, per_device_eval_batch_size=5, **settings)
        trainer.compute_metrics = compute_metrics
        trainer.evaluate(self.ROWS)
        rows = self.ROWS[:10] if "dataloader_drop_last" in settings else self.ROWS
        assert [int(label) for label in seen] == [row["labels"] for row in rows]
        predicted = trainer.predict(self.ROWS).predictions
        predicted = np.concatenate(predicted) if isinstance(predicted, list) else predicted
        with torch.no_grad():
            alone = [trainer.model(**pad_rows([row])).logits[0] for row in rows]
        assert torch.allclose(torch.tensor(predicted), torch.stack(alone), atol=1e-5)
        assert trainer.compute_metrics is compute_metrics

    def test_inputs_and_losses_go_with_their_rows(self, tmp_path):
        trainer = make_trainer(tmp_path, per_device_eval_batch_size=1, include_for_metrics=["inputs", "loss"])
        seen = []
        trainer.compute_metrics = lambda found: seen.append(found) or {}
        trainer.evaluate(self.ROWS)
        for row, ids, loss in zip(self.ROWS, seen[0].inputs, seen[0].losses, strict=True):
            assert ids[: len(row["input_ids"])].tolist() == row["input_ids"]
            assert trainer.model(**pad_rows([row])).loss.item() == pytest.approx(float(loss), abs=1e-5)

    def test_what_is_one_value_a_batch_stays_as_it_is(self, tmp_path):
        trainer = make_trainer(tmp_path, per_device_eval_batch_size=5)
        trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.mean().reshape(1)
        assert len(trainer.predict(self.ROWS).predictions) == 3

    def test_predictions_of_several_arrays(self, tmp_path):
        model = tiny_bert(num_hidden_layers=2, output_hidden_states=True)
        rows = [row for row in ragged_rows(40) if len(row["input_ids"]) == 9][:3] + ragged_rows(3, seed=2)
        output = make_trainer(tmp_path, model=model).predict(rows)
        logits, hidden = output.predictions
        assert len(logits) == len(hidden[0]) == len(rows)
        first = model(**pad_rows(rows[:1])).hidden_states[0][0]
        assert torch.allclose(torch.tensor(hidden[0][0][: len(first)]), first, atol=1e-5)

    def test_rows_without_lengths(self, tmp_path):
        trainer = make_trainer(tmp_path)
        with pytest.raises(InputError, match="--train_sampling_strategy random"):
            trainer._get_train_sampler([{"pixels": 1}])


class TestGradientAccumulation:
    """One update of 16 rows is the same in one batch and in four, and the first loss of 3 labels is about log 3."""

    def first_update(self, folder, model, accumulate: int, plain: bool = False) -> tuple[float, float]:
        settings = {"train_sampling_strategy": "sequential", "save_strategy": "no", "eval_strategy": "no"}
        trainer = make_trainer(
            folder,
            model=model,
            plain=plain,
            per_device_train_batch_size=16 // accumulate,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            logging_steps=1,
            **settings,
        )
        trainer.train()
        return tuple(trainer.state.log_history[0][name] for name in ("loss", "grad_norm"))

    MODELS = {
        "bert": lambda: tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**TINY_LLAMA, num_labels=3, pad_token_id=0)),
    }

    @pytest.mark.parametrize("name", MODELS)
    def test_an_update_in_parts(self, tmp_path, name):
        whole, parts = (self.first_update(tmp_path, self.seeded(name), accumulate) for accumulate in (1, 4))
        assert parts == pytest.approx(whole, rel=1e-4)
        assert parts[0] == pytest.approx(math.log(3), rel=0.05)

    @pytest.mark.parametrize("name", MODELS)
    def test_plain_trainer_adds_the_parts_up(self, tmp_path, name):
        whole, parts = (self.first_update(tmp_path, self.seeded(name), accumulate, True) for accumulate in (1, 4))
        assert parts == pytest.approx([4 * value for value in whole], rel=1e-4)

    def test_models_that_count_for_themselves_are_left_to_it(self, tmp_path):
        model = LlamaForCausalLM(LlamaConfig(**TINY_LLAMA))
        assert make_trainer(tmp_path, model=model).model_accepts_loss_kwargs

    def seeded(self, name):
        torch.manual_seed(0)
        return self.MODELS[name]()


class TestTrainingAgain:
    def test_a_passed_optimizer_that_lacks_thawed_layers_is_named(self, tmp_path, caplog):
        model = tiny_bert(num_hidden_layers=2)
        optimizer = torch.optim.SGD(model.classifier.parameters(), lr=0.1)
        args = ULMFiTTrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, save_strategy="no")
        trainer = ULMFiTTrainer(
            model, args, train_dataset=ragged_rows(), data_collator=pad_rows, optimizers=(optimizer, None)
        )
        with caplog.at_level(logging.WARNING):
            trainer.create_optimizer()
        assert "will not train, the first of them bert.embeddings.word_embeddings.weight" in caplog.text

    def test_load_weights(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=1)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.save_model(str(tmp_path / "model"))
        trainer.train()
        assert not all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
        trainer.load_weights(tmp_path / "model")
        assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


class TestUpstream:
    """What is overridden or read of Trainer beside its public methods; fails when upstream changes."""

    OVERRIDDEN = {
        "_get_train_sampler": ["self", "train_dataset"],
        "_get_eval_sampler": ["self", "eval_dataset"],
        "_get_learning_rate": ["self"],
        "_get_output_dir": ["self", "trial"],
        "_save_checkpoint": ["self", "model", "trial"],
        "_push_from_checkpoint": ["self", "checkpoint_folder"],
        "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
        "_load_rng_state": ["self", "checkpoint"],
    }
    ATTRIBUTES = [
        "_tr_loss",
        "_total_loss_scalar",
        "_globalstep_last_logged",
        "_created_lr_scheduler",
        "_train_batch_size",
    ]

    @pytest.mark.parametrize("name", OVERRIDDEN)
    def test_methods_take_what_they_took(self, name):
        assert list(inspect.signature(getattr(Trainer, name)).parameters) == self.OVERRIDDEN[name]

    def test_nothing_else_is_overridden(self):
        private = {name for name in vars(ULMFiTTrainer) if name.startswith("_") and not name.startswith("__")}
        overridden = {name for name in private if name in vars(Trainer)}
        read = {"_load_from_checkpoint", "_load_rng_state"}
        assert overridden == (set(self.OVERRIDDEN) - read) | {"_run_epoch"}

    def test_attributes_are_there(self, tmp_path):
        trainer = make_trainer(tmp_path, plain=True, max_steps=1)
        trainer.train()
        assert all(hasattr(trainer, name) for name in self.ATTRIBUTES)

    def test_the_loop_asks_for_one_epoch_at_a_time_and_then_whether_to_stop(self):
        source = inspect.getsource(Trainer._inner_training_loop)
        assert source.index("on_train_begin") < source.index("self._run_epoch(") < source.index("should_training_stop")
        assert list(inspect.signature(Trainer.get_train_dataloader).parameters) == ["self"]


def test_labels_reach_a_model_whose_forward_does_not_name_them(tmp_path):
    model = tiny_model("qwen3_5")
    assert "labels" not in inspect.signature(model.forward).parameters  # Trainer takes the column away
    rows = Dataset.from_list(ragged_rows(8, num_labels=model.config.num_labels))
    args = ULMFiTTrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    trainer = ULMFiTTrainer(model, args, train_dataset=rows, eval_dataset=rows, data_collator=pad_rows)
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0
    asked = ULMFiTTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", label_names=["other"])
    assert ULMFiTTrainer(model, asked).label_names == ["other"]
