"""Unfreezing in mid-run together with the other things that a run may do: it must still do what it says."""

import pytest
import torch
import torch.compiler.config
from tiny import tiny_bert, token_rows
from transformers import Trainer
from unfreezing_runs import Watch, arguments, trainer_of, watched

from ulmfit_tools.callbacks import GradualUnfreezing
from ulmfit_tools.layers import layer_groups

STAGES = ["h"] * 3 + ["3h"] * 3 + ["23h"] * 3 + ["123h"] * 3


def without_dropout():
    return tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def assert_close(model, other, **tolerance):
    expected = other.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def frozen_throughout(model):
    """The names of what the four stages of these runs never thaw."""
    groups = layer_groups(model)
    return [*groups[0].parameter_names, *groups[1].parameter_names]


# ---- Gradient accumulation -----------------------------------------------------------------------------------------


def test_gradient_accumulation_takes_the_same_steps(tmp_path):
    trainers = []
    for parts in ({}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}):
        watch = Watch()
        model = without_dropout()
        settings = {"optim": "sgd", "learning_rate": 0.5}  # Adam would blow up differences in the last digit
        trainers.append(trainer_of(tmp_path, GradualUnfreezing(), watch, model=model, **settings, **parts))
        # BERT's loss is a plain mean. Trainer takes it for scaled, and would not divide it by the four batches.
        trainers[-1].model_accepts_loss_kwargs = False
        trainers[-1].train()
        assert watch.trained == STAGES
    assert_close(trainers[1].model, trainers[0].model, rtol=1e-4, atol=1e-6)


def test_a_stage_never_begins_between_accumulated_batches(tmp_path):
    """A gradient summed over batches of which only some trained a layer would be neither one thing nor the other."""
    seen = {}

    class Counting(Trainer):
        def training_step(self, model, *args, **kwargs):
            trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            seen.setdefault(self.state.global_step, []).append(trained)
            return super().training_step(model, *args, **kwargs)

    args = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    Counting(tiny_bert(), args, train_dataset=token_rows(48), callbacks=[GradualUnfreezing()]).train()
    assert [len(sets) for sets in seen.values()] == [4] * 12
    assert all(len(set(map(frozenset, sets))) == 1 for sets in seen.values())


# ---- Activation checkpointing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("eval_mode", [False, True])
def test_activation_checkpointing_changes_nothing(tmp_path, kwargs, eval_mode):
    """Frozen first layers give the blocks above an input without a gradient, from which checkpointing must recover."""
    checkpointed = {"activation_checkpointing": True, "activation_checkpointing_kwargs": kwargs or None}
    unfreezing = {"eval_mode_for_frozen": eval_mode}
    plain, _ = watched(tmp_path, GradualUnfreezing(**unfreezing))
    trainer, watch = watched(tmp_path, GradualUnfreezing(**unfreezing), **checkpointed)
    assert trainer.model.is_activation_checkpointing
    assert watch.trained == STAGES
    assert_close(trainer.model, plain.model, rtol=0, atol=0)


# ---- Mixed precision -----------------------------------------------------------------------------------------------


def test_bf16_trains_what_is_thawed_in_full_precision_weights(tmp_path):
    settings = {"optim": "sgd", "learning_rate": 0.1}
    full, _ = watched(tmp_path, GradualUnfreezing(), model=without_dropout(), **settings)
    half, watch = watched(tmp_path, GradualUnfreezing(), model=without_dropout(), bf16=True, **settings)
    assert watch.trained == STAGES
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (full, half)]
    assert losses[0] != losses[1]  # it did run in bf16
    assert losses[0] == pytest.approx(losses[1], abs=0.01)
    before = without_dropout().state_dict()
    for name in frozen_throughout(half.model):
        assert torch.equal(half.model.state_dict()[name], before[name])
    thawed = set(dict(half.model.named_parameters())) - set(frozen_throughout(half.model))
    still = [name for name in thawed if torch.equal(half.model.state_dict()[name], before[name])]
    assert all(name.endswith("key.bias") for name in still), still


# ---- torch.compile -------------------------------------------------------------------------------------------------

# torch itself still uses what it has deprecated, when it loads its compiler.
torch_uses_what_it_deprecated = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning:torch.*")


SGD = {"optim": "sgd", "learning_rate": 0.5, "torch_compile_backend": "aot_eager"}


def two_blocks():
    return tiny_bert(num_hidden_layers=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@torch_uses_what_it_deprecated
@pytest.mark.parametrize(("limit", "eval_mode"), [(8, False), (8, True), (1, False)])
def test_a_compiled_model_trains_what_is_thawed(tmp_path, limit, eval_mode):
    """Also beyond torch's limit of recompilations, from where it goes on without compiling: slower, and right."""
    torch.compiler.reset()
    models = []
    for compiled in (False, True):
        unfreezing = GradualUnfreezing(by="step", every=3, eval_mode_for_frozen=eval_mode)
        trainer = trainer_of(tmp_path, unfreezing, model=two_blocks(), torch_compile=compiled, **SGD)
        with torch.compiler.config.patch(recompile_limit=limit):
            trainer.train()
        models.append(trainer.model)
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    assert_close(*models, rtol=1e-4, atol=1e-6)
    for name, tensor in two_blocks().named_parameters():
        assert not torch.equal(models[1].state_dict()[name], tensor) or name.endswith("key.bias"), name
    torch.compiler.reset()


@torch_uses_what_it_deprecated
def test_a_compiled_model_leaves_what_is_frozen(tmp_path):
    torch.compiler.reset()
    unfreezing = GradualUnfreezing(by="step", every=2, groups_per_stage=1)
    trainer = trainer_of(tmp_path, unfreezing, model=two_blocks(), torch_compile=True, max_steps=4, **SGD)
    trainer.train()
    groups, before = layer_groups(trainer.model), two_blocks().state_dict()
    for name, tensor in trainer.model.named_parameters():
        frozen = groups.index_of(name) < 2  # the embeddings and the first block
        assert torch.equal(tensor, before[name]) is frozen or name.endswith("key.bias"), name
    torch.compiler.reset()
