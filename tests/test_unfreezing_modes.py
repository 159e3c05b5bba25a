"""Unfreezing in mid-run together with the other things that a run may do: it must still do what it says."""

import pytest
import torch
from test_callbacks import arguments, trainer_of, watched
from tiny import tiny_bert, token_rows
from torch import nn
from transformers import Trainer

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
    settings = {"optim": "sgd", "learning_rate": 0.5}  # Adam would blow up differences in the last digit
    whole, watch = watched(tmp_path, GradualUnfreezing(), model=without_dropout(), **settings)
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    summed, watch_parts = watched(tmp_path, GradualUnfreezing(), model=without_dropout(), **settings, **parts)
    assert watch.trained == watch_parts.trained == STAGES
    assert_close(summed.model, whole.model, rtol=1e-4, atol=1e-6)


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


@pytest.fixture
def graphs():
    """The number of graphs that were compiled, as a function."""
    torch.compiler.reset()
    counted = []

    def backend(graph, inputs):
        counted.append(graph)
        return graph

    from torch._dynamo import register_backend
    from torch._dynamo.backends.common import aot_autograd

    register_backend(aot_autograd(fw_compiler=backend), name="counted")
    yield lambda: len(counted)
    torch.compiler.reset()


@torch_uses_what_it_deprecated
@pytest.mark.parametrize("eval_mode", [False, True])
def test_a_compiled_model_is_compiled_once_more_for_each_stage(tmp_path, eval_mode):
    torch.compiler.reset()
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    settings = {"optim": "sgd", "learning_rate": 0.5}
    unfreezing = {"eval_mode_for_frozen": eval_mode}
    eager, _ = watched(tmp_path, GradualUnfreezing(**unfreezing), model=without_dropout(), **settings)
    torch._dynamo.utils.counters.clear()
    trainer, watch = watched(
        tmp_path, GradualUnfreezing(**unfreezing), model=without_dropout(), **settings, **compiled
    )
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    assert watch.trained == STAGES
    assert watch.sleeping == ([""] * 12 if not eval_mode else ["e0123"] * 3 + ["e012"] * 3 + ["e01"] * 3 + ["e0"] * 3)
    assert_close(trainer.model, eager.model, rtol=1e-4, atol=1e-6)
    print(torch._dynamo.utils.counters["stats"], torch._dynamo.utils.counters["graph_break"])
    assert 0


@torch_uses_what_it_deprecated
def test_more_stages_than_the_compiler_takes_still_train(tmp_path):
    """Beyond its limit of recompilations torch goes on without compiling: slower, and right."""
    torch.compiler.reset()
    settings = {"optim": "sgd", "learning_rate": 0.5, "num_train_epochs": 4}
    unfreezing = {"by": "step", "every": 1}
    deep = {"num_hidden_layers": 10, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    models = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = trainer_of(tmp_path, GradualUnfreezing(**unfreezing), model=tiny_bert(**deep), **settings, **compiled)
        trainer.train()
        models.append(trainer.model)
    assert_close(*models, rtol=1e-4, atol=1e-6)
    before = tiny_bert(**deep).state_dict()
    words = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(models[1].state_dict()[words], before[words])
