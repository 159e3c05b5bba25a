from functools import partial

import pytest
import torch
from tiny import tiny_bert
from torch import nn

from ulmfit_tools.best_weights import (
    checkpoint_steps,
    load_weights,
    needed_steps,
    remove_weights,
    save_weights,
    weights_file,
)
from ulmfit_tools.errors import InputError
from ulmfit_tools.evaluations import best_step


def test_weights_come_back_to_the_bit_and_in_place(tmp_path):
    model, other = tiny_bert(seed=0), tiny_bert(seed=1)
    model.register_buffer("mean", torch.rand(3))
    other.register_buffer("mean", torch.zeros(3))
    path = weights_file(tmp_path, 7)
    save_weights(model, path, fixed={"classifier.bias"})
    places = [tensor.data_ptr() for tensor in other.parameters()]
    with torch.no_grad():
        other.classifier.bias.fill_(5)
    load_weights(other, path)
    expected = model.state_dict()
    for name, tensor in other.state_dict().items():
        if name == "classifier.bias":
            assert torch.equal(tensor, torch.full((3,), 5.0))
        else:
            assert torch.equal(tensor, expected[name]), name
    assert places == [tensor.data_ptr() for tensor in other.parameters()]


def test_tied_weights_are_kept_once_and_stay_tied(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    before = model["a"].weight.detach().clone()
    save_weights(model, weights_file(tmp_path, 1))
    nn.init.zeros_(model["a"].weight)
    load_weights(model, weights_file(tmp_path, 1))
    assert torch.equal(model["b"].weight, before)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = weights_file(tmp_path, 1)
    save_weights(tiny_bert(seed=0), path)
    before = path.read_bytes()

    def cut_off(tensors, target):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("ulmfit_tools.best_weights.save_file", cut_off)
    with pytest.raises(OSError, match="No space left"):
        save_weights(tiny_bert(seed=1), path)
    assert path.read_bytes() == before


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r'put back the file. Received: ".*step-000000003.safetensors"'):
        load_weights(tiny_bert(), weights_file(tmp_path, 3))


def test_steps_of_checkpoints(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-8.staging", "_best-weights", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert checkpoint_steps(tmp_path) == [9, 10]


def test_what_a_resumed_run_may_ask_for_is_kept(tmp_path):
    """Checkpoint 6 may have been written before or after the evaluation of step 6, so both its bests are needed."""
    history = [{"eval_loss": loss, "step": step} for step, loss in [(2, 1.0), (3, 0.9), (6, 0.5), (7, 0.6), (9, 0.4)]]
    best_of = partial(best_step, metric="loss")
    assert needed_steps(history, [], best_of) == {9}
    assert needed_steps(history, [6], best_of) == {3, 6, 9}
    assert needed_steps(history, [2, 8], best_of) == {2, 6, 9}
    for step in (2, 3, 6):
        weights_file(tmp_path, step).parent.mkdir(exist_ok=True)
        weights_file(tmp_path, step).touch()
    remove_weights(tmp_path, keep={3, 6, 9})
    assert sorted(tmp_path.rglob("*.safetensors")) == [weights_file(tmp_path, 3), weights_file(tmp_path, 6)]
