"""Rates and parameter groups: by hand, against plain Trainer, and through every optimizer that Trainer names."""

import inspect
import math
import pickle
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_bert, token_rows
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.training_args import OptimizerNames

from ulmfit_tools import param_groups as module
from ulmfit_tools.errors import InputError
from ulmfit_tools.param_groups import (
    DEFAULT_SPREAD,
    decay_parameter_names,
    discriminative_optimizer,
    discriminative_param_groups,
    group_learning_rates,
)

OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]


# ----------------------------------------------------------------------------------------------------------- rates


def test_factor_divides_from_the_head_down():
    # ULMFiT's factor: 1e-2, then 2.6, 2.6 ** 2 = 6.76 and 2.6 ** 3 = 17.576 times lower.
    assert group_learning_rates(4, 1e-2, factor=2.6) == pytest.approx([1e-2 / 17.576, 1e-2 / 6.76, 1e-2 / 2.6, 1e-2])
    assert group_learning_rates(3, 1e-3, factor=1) == [1e-3, 1e-3, 1e-3]
    assert group_learning_rates(1, 1e-3, factor=5) == [1e-3]


def test_default_spread_is_the_same_for_any_depth():
    assert DEFAULT_SPREAD == 10.0
    assert group_learning_rates(3, 1e-3) == pytest.approx([1e-4, 10**-3.5, 1e-3])
    for num_groups in (2, 8, 14, 50):
        rates = group_learning_rates(num_groups, 1e-3)
        assert (rates[0], rates[-1]) == (pytest.approx(1e-4), 1e-3)
        ratios = [after / before for before, after in pairwise(rates)]
        assert ratios == pytest.approx([10 ** (1 / (num_groups - 1))] * (num_groups - 1))
    assert group_learning_rates(1, 1e-3) == [1e-3]


@pytest.mark.parametrize("span", [(1e-5, 1e-3), [1e-5, 1e-3]])
def test_span_is_geometric(span):
    assert group_learning_rates(3, span) == pytest.approx([1e-5, 1e-4, 1e-3])
    assert group_learning_rates(5, span) == pytest.approx([1e-5, 10**-4.5, 1e-4, 10**-3.5, 1e-3])
    assert group_learning_rates(2, span) == [1e-5, 1e-3]  # to the bit
    assert group_learning_rates(1, span) == [1e-3]


def test_one_rate_for_each_group():
    assert group_learning_rates(3, [1e-3, 2e-3, 5e-4]) == [1e-3, 2e-3, 5e-4]
    assert group_learning_rates(2, [1e-3, 1e-5]) == [1e-3, 1e-5]


@pytest.mark.parametrize(
    ("learning_rate", "factor", "line"),
    [
        (1e-3, 0, "factor must be at least 1.*Received: factor=0"),
        (1e-3, -1, "Received: factor=-1"),
        (1e-3, 0.85, r"a layer decay of 0\.85 is factor=1\.18\). Received: factor=0.85"),
        (1e-3, math.inf, "Received: factor=inf"),
        (1e-3, 1e200, "factor is too large for 4 layer groups.*Received: factor=1e\\+200"),
        (1e-3, "2.6", "Received: factor=2.6"),
        ((1e-5, 1e-3), 2.6, "factor goes with a single learning_rate.*Received: factor=2.6"),
        ((1e-3, 1e-5), None, "from the low rate to the high one"),
        ([1e-3] * 3, None, "one for each of the 4 layer groups, from input to output. Received: 3 rates"),
        ([], None, "Received: 0 rates"),
        (0, None, "must be positive and finite. Received: learning_rate=0"),
        (math.nan, None, "positive and finite"),
        ([1e-3, 1e-3, -1e-3, 1e-3], None, "positive and finite"),
        (True, None, "must be a number, a pair .* Received: True"),
        ("1e-3", None, "must be a number, a pair .* Received: '1e-3'"),
        (1e-300, 1e10, "positive and finite"),  # the lowest rate is too small for a number
    ],
)
def test_wrong_rates(learning_rate, factor, line):
    with pytest.raises(InputError, match=line):
        group_learning_rates(4, learning_rate, factor=factor)


# ---------------------------------------------------------------------------------------------------------- groups


def names_of(model: nn.Module, param_group: dict) -> list[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for parameter in param_group["params"]]


def test_groups_go_from_input_to_output_each_with_decay_first():
    model = tiny_bert(num_hidden_layers=1)
    groups = discriminative_param_groups(model, 1e-2, factor=10, weight_decay=0.1)
    told = [(group["name"], group["weight_decay"], len(group["params"])) for group in groups]
    assert told == [
        ("embeddings", 0.1, 3),  # words, positions, token types
        ("embeddings", 0.0, 2),  # the norm
        ("layer.0", 0.1, 6),  # query, key, value, 3 dense
        ("layer.0", 0.0, 10),  # their biases, 2 norms
        ("head", 0.1, 2),  # pooler, classifier
        ("head", 0.0, 2),
    ]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 1e-4, 1e-3, 1e-3, 1e-2, 1e-2])
    assert names_of(model, groups[-1]) == ["bert.pooler.dense.bias", "classifier.bias"]
    assert all(group.keys() == {"params", "lr", "weight_decay", "name"} for group in groups)


def test_each_parameter_once():
    model = tiny_bert()
    groups = discriminative_param_groups(model, 1e-3, num_groups=3, weight_decay=0.01)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    assert list(dict.fromkeys(group["name"] for group in groups)) == [
        "embeddings..layer.1",
        "layer.2..layer.3",
        "head",
    ]


def test_without_weight_decay_one_group_a_layer():
    groups = discriminative_param_groups(tiny_bert(), 1e-3)
    assert [group["name"] for group in groups] == ["embeddings", *(f"layer.{index}" for index in range(4)), "head"]
    assert {group["weight_decay"] for group in groups} == {0.0}


def test_frozen_parameters_take_part_unless_told_otherwise():
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[1].requires_grad_(False)
    rates = group_learning_rates(6, 1e-3)
    assert len(discriminative_param_groups(model, 1e-3)) == 6
    trainable = discriminative_param_groups(model, 1e-3, trainable_only=True)
    assert [(group["name"], group["lr"]) for group in trainable] == [
        ("layer.0", rates[1]),
        ("layer.2", rates[3]),
        ("layer.3", rates[4]),
        ("head", rates[5]),
    ]
    model.requires_grad_(False)
    with pytest.raises(InputError, match="no trainable parameters"):
        discriminative_param_groups(model, 1e-3, trainable_only=True)


def test_quantised_weights_never_take_part():
    model = tiny_bert()
    model.classifier.weight = nn.Parameter(torch.zeros(3, 16, dtype=torch.int8), requires_grad=False)
    groups = discriminative_param_groups(model, 1e-3)
    assert names_of(model, groups[-1]) == ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.bias"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT 0.21 asks for it
def test_lora_adapters_have_the_rate_of_their_layer():
    model = get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    groups = discriminative_param_groups(model, 1e-3, factor=10, trainable_only=True)
    assert [group["name"] for group in groups] == ["layer.0", "layer.1", "layer.2", "layer.3", "head"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
    assert [name.split(".")[-3] for name in names_of(model, groups[0])] == ["lora_A", "lora_B"]
    assert [name.split(".")[-3] for name in names_of(model, groups[-1])] == ["modules_to_save"] * 2


def test_weight_decay_follows_the_rule_of_trainer(tmp_path):
    model = tiny_bert(num_hidden_layers=1)
    trainer = Trainer(model, TrainingArguments(tmp_path, report_to=[]))
    found = decay_parameter_names(model)
    assert found == set(trainer.get_decay_parameter_names(model))
    assert {name for name, _ in model.named_parameters()} - found == {
        name for name, _ in model.named_parameters() if name.endswith("bias") or "LayerNorm" in name
    }
    # The trainer itself has no say in it, so the rule can be asked without one.
    assert list(inspect.signature(Trainer.get_decay_parameter_names).parameters) == ["self", "model"]
    assert "self." not in inspect.getsource(Trainer.get_decay_parameter_names)


def test_schedules_keep_the_rate_of_each_group():
    optimizer = torch.optim.SGD(discriminative_param_groups(tiny_bert(num_hidden_layers=1), 1e-2, factor=10))
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    schedule.step()
    assert [group["initial_lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 1e-3, 1e-2])
    assert schedule.get_last_lr() == pytest.approx([5e-5, 5e-4, 5e-3])


# --------------------------------------------------------------------------------------------- in a plain Trainer


def arguments(folder, **settings) -> TrainingArguments:
    defaults = dict(
        per_device_train_batch_size=8,
        max_steps=3,
        learning_rate=1e-3,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    return TrainingArguments(folder, **(defaults | settings))


def trained(args: TrainingArguments, callbacks=(), resume=None, **trainer_settings) -> Trainer:
    trainer = Trainer(
        tiny_bert(),
        args,
        train_dataset=token_rows(),
        data_collator=default_data_collator,
        callbacks=list(callbacks),
        **trainer_settings,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_factor_1_is_plain_trainer_to_the_bit(tmp_path, optim):
    args = arguments(tmp_path, optim=optim)
    plain = trained(args)
    ours = trained(args, optimizer_cls_and_kwargs=discriminative_optimizer(args, factor=1))
    assert type(ours.optimizer.optimizer) is type(plain.optimizer.optimizer)
    assert_same(weights(ours), weights(plain))


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_rate_of_each_group_arrives(tmp_path, optim):
    args = arguments(tmp_path, optim=optim, lr_scheduler_type="constant")
    before = {name: parameter.detach().clone() for name, parameter in tiny_bert().named_parameters()}
    trainer = trained(args, optimizer_cls_and_kwargs=discriminative_optimizer(args, learning_rate=(1e-12, 1e-3)))
    rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == dict(zip(rates, group_learning_rates(6, (1e-12, 1e-3)), strict=True))
    moved = {name: (after - before[name]).abs().max().item() for name, after in weights(trainer).items()}
    assert moved["classifier.weight"] > 1e-5
    assert moved["bert.embeddings.word_embeddings.weight"] < 1e-9


def test_settings_of_the_optimizer_arrive(tmp_path):
    args = arguments(tmp_path, adam_beta1=0.5, adam_epsilon=1e-3, weight_decay=0.3)
    factory, settings = discriminative_optimizer(args)
    optimizer = factory()(tiny_bert(), **settings)
    assert optimizer.defaults["betas"] == (0.5, 0.999)
    assert optimizer.defaults["eps"] == 1e-3
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0] * 6
    args = arguments(tmp_path, optim="sgd", optim_args="momentum=0.9,nesterov=true")
    factory, settings = discriminative_optimizer(args)
    assert factory()(tiny_bert(), **settings).defaults["nesterov"] is True


def test_arguments_are_read_when_the_optimizer_is_made(tmp_path):
    args = arguments(tmp_path)
    factory, settings = discriminative_optimizer(args, num_groups=3)
    args.learning_rate = 5e-2  # as a hyperparameter search does
    optimizer = factory()(tiny_bert(), **settings)
    assert optimizer.param_groups[-1]["lr"] == optimizer.defaults["lr"] == 5e-2
    assert len({group["name"] for group in optimizer.param_groups}) == 3
    factory, settings = discriminative_optimizer(args, learning_rate=(1e-3, 2e-3))
    assert factory()(tiny_bert(), **settings).defaults["lr"] == 2e-3  # StableAdamW divides by it


def test_factory_and_keywords_can_be_pickled(tmp_path):
    factory, settings = pickle.loads(pickle.dumps(discriminative_optimizer(arguments(tmp_path), factor=1.2)))
    assert is_optimizer_factory(factory)
    assert isinstance(factory()(tiny_bert(), **settings), torch.optim.AdamW)


class ThawAll(TrainerCallback):
    """Thaws everything after the first step."""

    def on_step_end(self, args, state, control, model, **kwargs):
        model.requires_grad_(True)


def test_layers_frozen_before_train_and_thawed_in_it_train(tmp_path):
    model, before = tiny_bert(), tiny_bert().bert.embeddings.word_embeddings.weight.detach()
    model.bert.requires_grad_(False)
    args = arguments(tmp_path)
    trainer = Trainer(
        model,
        args,
        train_dataset=token_rows(),
        data_collator=default_data_collator,
        callbacks=[ThawAll()],
        optimizer_cls_and_kwargs=discriminative_optimizer(args),
    )
    trainer.train()
    assert not torch.equal(model.bert.embeddings.word_embeddings.weight, before)
    # Plain Trainer leaves out what is frozen when it makes its optimizer.
    plain = Trainer(model.requires_grad_(False), args)
    plain.create_optimizer()
    assert sum(len(group["params"]) for group in plain.optimizer.param_groups) == 0


def test_optimizer_state_resumes(tmp_path):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, lr_scheduler_type="cosine")
    args = arguments(tmp_path / "whole", **settings)
    whole = trained(args, optimizer_cls_and_kwargs=discriminative_optimizer(args))
    args = arguments(tmp_path / "resumed", **settings)
    resumed = trained(
        args,
        optimizer_cls_and_kwargs=discriminative_optimizer(args),
        resume=str(tmp_path / "whole" / "checkpoint-2"),
    )
    assert_same(weights(resumed), weights(whole))
    assert [group["name"] for group in resumed.optimizer.param_groups[:2]] == ["embeddings", "embeddings"]


# ------------------------------------------------------------------------------------------------- every optimizer


def test_optimizers_that_bring_their_own_groups_are_refused(tmp_path):
    refused = {
        name.value for name in OptimizerNames if any(part in name.value for part in ("galore", "apollo", "lomo"))
    }
    assert len(refused) == 10  # 6 of GaLore, 2 of APOLLO, LOMO and AdaLomo
    for name in refused:
        with pytest.raises(InputError, match=f'^optim="{name}" cannot have discriminative learning rates: it '):
            discriminative_optimizer(arguments(tmp_path, optim=name))


def test_every_other_optimizer_takes_groups_or_wants_its_package(tmp_path):
    found, wanting = [], {}
    for name in OptimizerNames:
        try:
            factory, settings = discriminative_optimizer(arguments(tmp_path, optim=name))
        except InputError as error:
            wanting[name.value] = str(error)
            continue
        assert len(factory()(tiny_bert(), **settings).param_groups) == 12
        found.append(name.value)
    assert set(found) >= set(OPTIMIZERS)
    assert all(line.startswith(f'optim="{name}" cannot ') for name, line in wanting.items())
    assert not any("\n" in line for line in wanting.values())


def use_instead(monkeypatch, optimizer_class, settings) -> None:
    monkeypatch.setattr(
        Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args: (optimizer_class, settings))
    )


def test_factories_are_refused(tmp_path, monkeypatch):
    use_instead(monkeypatch, lambda: None, {})
    with pytest.raises(InputError, match='optim="adamw_torch_fused" cannot have .* it makes its own groups'):
        discriminative_optimizer(arguments(tmp_path))


class EightBit(torch.optim.SGD):
    """Stands for an optimizer of bitsandbytes."""

    def __init__(self, params, lr, optim_bits):
        super().__init__(params, lr)


def test_8_bit_optimizers_keep_embeddings_in_32_bits(tmp_path, monkeypatch):
    overrides = []

    class Manager:
        @staticmethod
        def get_instance():
            return Manager

        @staticmethod
        def register_module_override(module, name, settings):
            overrides.append((module, name, settings))

    fake = SimpleNamespace(GlobalOptimManager=Manager)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=fake))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", fake)
    model = tiny_bert()
    for bits, expected in ((32, 0), (8, 3)):
        use_instead(monkeypatch, EightBit, {"lr": 1e-3, "optim_bits": bits})
        factory, settings = discriminative_optimizer(arguments(tmp_path))
        factory()(model, **settings)
        assert len(overrides) == expected
    assert overrides[0] == (model.bert.embeddings.word_embeddings, "weight", {"optim_bits": 32})


def test_tensors_of_different_meshes_have_groups_of_their_own(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'mesh'}", rank=0, world_size=1)
    try:
        model = tiny_bert(num_hidden_layers=1)
        mesh = init_device_mesh("cpu", (1,))
        model.classifier.weight = nn.Parameter(distribute_tensor(model.classifier.weight.detach(), mesh))
        groups = module._split_by_mesh(discriminative_param_groups(model, 1e-3))
        assert [group["name"] for group in groups] == ["embeddings", "layer.0", "head", "head"]
        assert [isinstance(group["params"][0], DTensor) for group in groups] == [False, False, False, True]
        assert {group["lr"] for group in groups[2:]} == {1e-3}
    finally:
        torch.distributed.destroy_process_group()
