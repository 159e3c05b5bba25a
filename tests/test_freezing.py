import copy
import math
import random

import pytest
import torch
from test_evaluations import losses
from tiny import tiny_bert, token_rows
from torch import nn
from transformers import RoFormerConfig, RoFormerForSequenceClassification

from ulmfit_tools.errors import InputError
from ulmfit_tools.freezing import (
    chain_thaw_stages,
    fixed_parameters,
    freeze_to,
    frozen_modules,
    keep_in_eval_mode,
    plateau_starts,
    regular_starts,
    set_trainable,
    stage_at,
    thaw_step,
    trainable_names,
    unfreeze,
    unfreezing_stages,
    warmup_factor,
)
from ulmfit_tools.layers import layer_groups

# PEFT 0.21 reads a property that transformers 5.23 has deprecated.
peft_reads_a_deprecated_property = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def training(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def of_blocks(model, *blocks, head=True):
    """The names of some of a tiny BERT's parameters, by the spelling of their names alone."""
    starts = tuple(f"bert.encoder.layer.{block}." for block in blocks)
    top = ("bert.pooler.", "classifier.") if head else ()
    return {name for name, _ in model.named_parameters() if name.startswith(starts + top)}


def batch(rows=8, seed=0):
    rows = token_rows(rows, seed=seed)
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


# ---- freeze_to and unfreeze ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "blocks"), [(-1, []), (5, []), (-2, [3]), (4, [3]), (2, [1, 2, 3]), (1, [0, 1, 2, 3]), (-5, [0, 1, 2, 3])]
)
def test_freeze_to_trains_the_groups_from_n_on(n, blocks):
    model = tiny_bert()  # embeddings, four blocks, head: n counts as in fastai
    names = freeze_to(model, n)
    assert set(names) == training(model) == of_blocks(model, *blocks)
    assert names == [name for name, _ in model.named_parameters() if name in training(model)]


def test_freeze_to_the_first_group_and_unfreeze_train_everything():
    model = tiny_bert()
    everything = {name for name, _ in model.named_parameters()}
    freeze_to(model, -1)
    assert set(freeze_to(model, 0)) == everything
    freeze_to(model, -1)
    assert set(unfreeze(model)) == training(model) == everything


def test_freeze_to_counts_merged_groups():
    model = tiny_bert()
    groups = layer_groups(model, 3)
    assert set(freeze_to(model, -2, num_groups=3)) == {*groups[1].parameter_names, *groups[2].parameter_names}


@pytest.mark.parametrize("n", [6, -7, 100])
def test_freeze_to_refuses_a_group_that_does_not_exist(n):
    with pytest.raises(InputError, match=rf"from -6 to 5 here. Received: n={n}"):
        freeze_to(tiny_bert(), n)


def test_frozen_gradients_are_dropped():
    model = tiny_bert()
    model(**batch()).loss.backward()
    freeze_to(model, -1)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == of_blocks(model)


@pytest.mark.parametrize("fused", [False, True])
def test_frozen_layers_get_no_gradient_no_state_and_no_decay(fused):
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5, fused=fused)
    freeze_to(model, -2)
    before = copy.deepcopy(model.state_dict())
    for step in range(3):
        optimizer.zero_grad()
        model(**batch(seed=step)).loss.backward()
        optimizer.step()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    thawed = of_blocks(model, 3)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == thawed
    assert {names[id(parameter)] for parameter in optimizer.state} == thawed
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is (name not in thawed), name


# ---- What can never train ------------------------------------------------------------------------------------------


def peft_configs():
    import peft

    lora = {"r": 2, "target_modules": ["query", "value"]}
    return {
        "classification": peft.LoraConfig(task_type="SEQ_CLS", **lora),
        "bias_all": peft.LoraConfig(task_type="SEQ_CLS", bias="all", **lora),
        "bias_lora_only": peft.LoraConfig(task_type="SEQ_CLS", bias="lora_only", **lora),
        "modules_to_save": peft.LoraConfig(modules_to_save=["pooler", "classifier"], **lora),
        "dora": peft.LoraConfig(task_type="SEQ_CLS", use_dora=True, **lora),
        "tokens": peft.LoraConfig(task_type="SEQ_CLS", trainable_token_indices=[1, 2], **lora),
        "ia3": peft.IA3Config(task_type="SEQ_CLS", target_modules=["query"], feedforward_modules=[]),
        "prompt": peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    }


@peft_reads_a_deprecated_property
@pytest.mark.parametrize("kind", sorted(peft_configs()))
def test_with_adapters_what_peft_trains_is_what_can_train(kind):
    import peft

    model = peft.get_peft_model(tiny_bert(num_hidden_layers=2), peft_configs()[kind])
    names, trained = {name for name, _ in model.named_parameters()}, training(model)
    assert 0 < len(trained) < len(names)
    assert names - fixed_parameters(model) == trained
    assert training(model) == trained  # asking changes nothing
    freeze_to(model, -1) if kind != "tokens" else freeze_to(model, 1)
    assert training(model) < trained
    assert names - fixed_parameters(model) == trained  # nor does it depend on what is frozen
    assert set(unfreeze(model)) == training(model) == trained


@peft_reads_a_deprecated_property
def test_adapters_thaw_by_depth_and_the_base_stays_frozen():
    import peft

    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    model = peft.get_peft_model(tiny_bert(), config)
    names = freeze_to(model, -3)  # head and the two last blocks
    assert all("lora_" in name or "modules_to_save" in name for name in names)
    assert sum("layer.3." in name for name in names) == sum("layer.2." in name for name in names) == 4
    assert sum("classifier" in name for name in names) == 2
    assert len(names) == 10


def test_adapters_that_transformers_adds_are_known_too():
    import peft

    model = tiny_bert()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]))
    assert len(unfreeze(model)) == 8
    assert all("lora_" in name for name in training(model))


@peft_reads_a_deprecated_property
def test_freezing_all_that_can_train_is_refused_and_changes_nothing():
    import peft

    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(r=2, target_modules=["query"]))  # no head to train
    before = training(model)
    with pytest.raises(InputError, match=r'No parameter from group "head" on can train. Received: n=-1'):
        freeze_to(model, -1)
    assert training(model) == before


def test_quantised_weights_stay_as_they_are():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    assert set(unfreeze(model)) == {"0.bias", "1.weight", "1.bias"}


def test_what_the_class_itself_fixes_stays_fixed():
    config = RoFormerConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=64
    )
    model = RoFormerForSequenceClassification(config)
    positions = {"roformer.encoder.embed_positions.weight"}
    freeze_to(model, -1)
    generators = torch.get_rng_state(), random.getstate()
    assert fixed_parameters(model) == positions
    assert {name for name, _ in model.named_parameters()} - set(unfreeze(model)) == positions
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1] == random.getstate()


def test_a_class_that_is_not_made_from_its_config_alone_is_taken_as_it_is():
    class WithClasses(type(tiny_bert())):
        def __init__(self, config, weights):
            super().__init__(config)
            self.weights = weights

    model = WithClasses(tiny_bert().config, [1.0, 2.0, 1.0])
    assert fixed_parameters(model) == set()
    assert len(freeze_to(model, -1)) == 4


# ---- Stages and their starts ---------------------------------------------------------------------------------------


def test_stages_from_the_top():
    assert unfreezing_stages(3) == [{2}, {1, 2}, {0, 1, 2}]
    assert unfreezing_stages(6, start=1, groups_per_stage=2) == [{5}, {3, 4, 5}, {1, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5}]
    assert unfreezing_stages(5, start=2, groups_per_stage=3) == [{3, 4}, {0, 1, 2, 3, 4}]
    assert unfreezing_stages(4, start=4) == [{0, 1, 2, 3}]


def test_chain_thaw_takes_the_head_then_each_other_from_the_first_on_then_all():
    assert chain_thaw_stages(4) == [{3}, {0}, {1}, {2}, {0, 1, 2, 3}]
    assert chain_thaw_stages(1) == [{0}]


@pytest.mark.parametrize(("settings", "received"), [({"start": 0}, "start=0"), ({"start": 4}, "start=4")])
def test_impossible_first_stage(settings, received):
    with pytest.raises(InputError, match=f"from 1 to 3 groups. Received: {received}"):
        unfreezing_stages(3, **settings)


def test_impossible_stage_size():
    with pytest.raises(InputError, match=r"at least 1 group. Received: groups_per_stage=0"):
        unfreezing_stages(3, groups_per_stage=0)


@pytest.mark.parametrize(
    ("every", "unit", "starts"),
    [
        (5, 1, [0, 5, 10, 15]),  # steps
        (1, 7, [0, 7, 14, 21]),  # epochs of 7 steps
        (0.5, 7, [0, 4, 7, 11]),  # half an epoch is over after 3.5 steps, so with the fourth
        (0.1, 30, [0, 3, 6, 9]),  # 0.1 * 3 * 30 is 9.000000000000002 in floating point
        (0.25, 10, [0, 3, 5, 8]),
    ],
)
def test_starts_of_stages_of_equal_length(every, unit, starts):
    assert regular_starts(4, every, unit) == starts


def test_stage_at_a_step():
    assert [stage_at(step, [0, 2, 2, 5]) for step in range(7)] == [0, 0, 2, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("values", "patience", "starts"),
    [
        ([3, 2, 1], 1, [0]),  # it still improves
        ([3, 2, 2], 1, [0, 30]),  # as good is not better
        ([3, 2, 4, 1, 5, 6], 1, [0, 30, 50, 60]),
        ([3, 2, 4, 5, 6, 7], 2, [0, 40, 60]),  # the wait begins anew with the stage
        ([3, 2, 4, 1, 5, 6], 2, [0, 60]),  # and with each new best
        ([3, 4, 5, 6, 7, 8], 1, [0, 20, 30, 40]),  # no more than four stages
        ([math.nan, 3, 2, math.nan], 1, [0, 10, 40]),
    ],
)
def test_starts_at_plateaus(values, patience, starts):
    settings = {"patience": patience, "metric": "loss", "greater_is_better": False}
    assert plateau_starts(losses(*values), 4, **settings) == starts


def test_plateaus_of_a_metric_that_grows():
    history = [{"eval_accuracy": value, "step": step} for step, value in enumerate([0.5, 0.6, 0.55, 0.7, 0.7])]
    assert plateau_starts(history, 9, patience=1, metric="accuracy", greater_is_better=True) == [0, 2, 4]


def test_starts_that_are_known_never_change():
    """So a run resumed from any checkpoint agrees with the one that wrote it."""
    generator = random.Random(0)
    history = losses(*(generator.random() for _ in range(60)))
    settings = {"patience": 2, "metric": "eval_loss", "greater_is_better": False}
    whole = plateau_starts(history, 12, **settings)
    assert len(whole) == 12
    for length in range(len(history)):
        part = plateau_starts(history[:length], 12, **settings)
        assert part == whole[: len(part)]


def test_thaw_step_of_a_group():
    stages, starts = unfreezing_stages(3), [0, 10, 20]
    assert [thaw_step(group, 2, stages, starts) for group in range(3)] == [20, 10, 0]
    chain, starts = chain_thaw_stages(3), [0, 10, 20, 30]  # {2}, {0}, {1}, all: group 2 was frozen in between
    assert [thaw_step(group, 3, chain, starts) for group in range(3)] == [30, 20, 30]


def test_warm_up_from_a_groups_own_start():
    assert [warmup_factor(step, 10, 4) for step in range(10, 16)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [warmup_factor(step, 0, 4) for step in range(3)] == [1, 1, 1]  # the schedule's own warm-up serves it
    assert warmup_factor(10, 10, 0) == 1


# ---- Eval mode of frozen layers ------------------------------------------------------------------------------------


def test_frozen_modules_are_the_outermost_ones():
    model = tiny_bert()
    groups = layer_groups(model)
    freeze_to(model, -2)
    blocks = [f"bert.encoder.layer.{block}" for block in (0, 1, 2)]
    assert frozen_modules(model, groups) == ["bert.embeddings", *blocks]
    unfreeze(model)
    assert frozen_modules(model, groups) == []
    set_trainable(model, groups, [])
    assert frozen_modules(model, groups) == [""]


@peft_reads_a_deprecated_property
def test_a_block_with_training_adapters_is_not_frozen():
    import peft

    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    groups = layer_groups(model)
    freeze_to(model, -2)  # the frozen dense layer and dropout of the last block work with its adapters
    start = "base_model.model.bert."
    assert frozen_modules(model, groups) == [
        f"{start}embeddings",
        *(f"{start}encoder.layer.{block}" for block in (0, 1, 2)),
    ]


@pytest.mark.parametrize(
    "wrap", [lambda model: model, nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_train_leaves_frozen_modules_in_eval_mode(wrap):
    model = tiny_bert()
    outer = wrap(model)
    freeze_to(model, -2)
    restore = keep_in_eval_mode(model, frozen_modules(model, layer_groups(model)))
    outer.eval()
    outer.train()
    modes = [block.training for block in model.bert.encoder.layer]
    assert modes == [False, False, False, True]
    assert not model.bert.embeddings.dropout.training
    assert not model.bert.encoder.layer[0].output.dropout.training
    assert model.dropout.training  # before the classifier, with no parameters of its own
    assert model.training
    restore()
    assert "train" not in vars(model)
    assert all(module.training for module in model.modules())
    outer.eval()
    assert not any(module.training for module in model.modules())


def test_frozen_modules_in_eval_mode_have_no_dropout():
    model = tiny_bert(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    freeze_to(model, -1)
    keep_in_eval_mode(model, frozen_modules(model, layer_groups(model)))
    model.train()
    hidden = [model.bert(batch()["input_ids"]).last_hidden_state for _ in range(2)]
    assert torch.equal(*hidden)
    assert not torch.equal(model(**batch()).logits, model(**batch()).logits)  # the head still has its own


def test_a_copy_keeps_its_own_modules_in_eval_mode():
    model = tiny_bert()
    restore = keep_in_eval_mode(model, ["bert.embeddings"])
    twin = copy.deepcopy(model)
    restore()
    twin.train()
    assert twin.training
    assert not twin.bert.embeddings.training
    assert model.bert.embeddings.training


def test_trainable_names_are_in_the_models_order():
    model = tiny_bert()
    names = trainable_names(model, layer_groups(model), [5, 0])
    assert names[0].startswith("bert.embeddings")
    assert names[-1] == "classifier.bias"
