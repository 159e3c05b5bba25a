"""A training inside `unchanged` leaves nothing behind, whichever way it ends."""

import copy
import functools
import random
import signal
from collections import Counter, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_bert
from torch import nn
from torch.utils.data import DataLoader
from transformers.modeling_outputs import SequenceClassifierOutput

from ulmfit_tools.restoring import _held, unchanged


class WithBuffers(nn.Module):
    """A counter that is replaced, one that is not in the state, and a mode, a gradient and a hook to disturb."""

    def __init__(self):
        super().__init__()
        self.trained = nn.Linear(3, 2)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(2), persistent=False)

    def forward(self, inputs):
        self.seen = self.seen + 1
        return self.trained(self.norm(self.frozen(inputs)))


def snapshot(model):
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def train(model, steps=3, rate=0.1):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_model_and_random_numbers_are_back(on_disk, error, tmp_path):
    model = WithBuffers()
    before, hooks = snapshot(model), len(model.trained._forward_hooks)
    expected = (random.Random(0).random(), np.random.RandomState(0).rand())
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    next_normal = torch.randn(1, generator=torch.Generator().manual_seed(0))

    def disturb():
        with unchanged(model, offload_folder=tmp_path if on_disk else None):
            assert len(list(tmp_path.iterdir())) == on_disk
            random.random(), np.random.rand()  # noqa: NPY002
            train(model)
            model.trained.register_forward_hook(lambda *_: None)
            model.eval()
            model.frozen.requires_grad_(True)
            model.forward = lambda inputs: inputs
            model.trained.note = "new"
            assert not same(before, snapshot(model))
            if error:
                raise error

    if error:
        with pytest.raises(error):
            disturb()
    else:
        disturb()
    assert same(before, snapshot(model))
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002
    assert torch.equal(torch.randn(1), next_normal)
    assert len(model.trained._forward_hooks) == hooks
    assert "forward" not in vars(model)
    assert not hasattr(model.trained, "note")
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.frozen.parameters())
    assert all(parameter.requires_grad for parameter in model.trained.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not list(tmp_path.iterdir())


def test_gradients_are_those_from_before():
    model = WithBuffers()
    model(torch.ones(4, 3)).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with unchanged(model):
        train(model)
    assert before.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.equal(before[name], p.grad) for name, p in model.named_parameters() if p.grad is not None)


def test_frozen_weights_are_not_copied(monkeypatch):
    """One copy of the trainable numbers and the buffers, counted as they are copied."""
    copied = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: (copied.append(self.numel()), to(self, *a, **k))[1])
    model = WithBuffers()
    with unchanged(model):
        pass
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(copied) == trained + sum(b.numel() for b in model.buffers())


@pytest.mark.parametrize("on_disk", [False, True])
def test_layers_thawed_on_the_way_are_back(on_disk, tmp_path):
    """The optimizer holds them from the start, as that of discriminative rates does."""
    model = WithBuffers()
    before = snapshot(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with unchanged(model, optimizer, offload_folder=tmp_path if on_disk else None) as rewind:
        for _ in range(2):
            for thawed in (False, True, True):
                model.frozen.requires_grad_(thawed)
                optimizer.zero_grad()
                model(torch.randn(4, 3)).square().mean().backward()
                optimizer.step()
            assert not torch.equal(before["frozen.weight"], model.frozen.weight)
            rewind()
            assert same(before, snapshot(model))
            assert not model.frozen.weight.requires_grad
    assert same(before, snapshot(model))
    assert not list(tmp_path.iterdir())
    model.frozen.requires_grad_(True)
    train(model)  # outside nothing is kept any more
    assert not same(before, snapshot(model))


def test_an_optimizer_keeps_its_state_rates_and_schedule():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    groups, step = optimizer.param_groups, optimizer.step
    with unchanged(model, optimizer):
        assert not optimizer.state
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step + 1)
        optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate does: other dictionaries for the groups
        for _ in range(2):
            model(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
            schedule.step()
        optimizer.param_groups[0]["weight_decay"] = 3.0
    assert optimizer.param_groups is groups
    assert optimizer.step == step
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, values in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in values.items())


class TestTheOptimizersState:
    """It waits where the copy of the weights is."""

    def trained(self):
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        return model, optimizer, self.values(optimizer)

    def values(self, optimizer):
        return [value for values in optimizer.state.values() for value in values.values()]

    def test_on_disk_and_back_to_the_bit(self, tmp_path):
        model, optimizer, tensors = self.trained()
        before = [tensor.clone() for tensor in tensors]
        with unchanged(model, optimizer, offload_folder=tmp_path) as rewind:
            assert not any(tensor.numel() for tensor in tensors)
            for _ in range(2):
                model(torch.ones(2, 3)).square().sum().backward()
                optimizer.step()
                rewind()
        assert all(torch.equal(*pair) for pair in zip(before, tensors, strict=True))
        assert all(a is b for a, b in zip(self.values(optimizer), tensors, strict=True))
        assert not list(tmp_path.iterdir())

    def test_in_the_hosts_memory_it_stays_where_it_is(self):
        model, optimizer, tensors = self.trained()
        places = [tensor.data_ptr() for tensor in tensors]
        with unchanged(model, optimizer):
            assert [tensor.data_ptr() for tensor in tensors] == places
        assert [tensor.data_ptr() for tensor in tensors] == places

    def test_parts_of_a_larger_tensor_stay(self, tmp_path):
        model, optimizer, _ = self.trained()
        flat = torch.ones(10)
        optimizer.state[model.bias]["max_exp_avg_sq"] = flat[:2]
        with unchanged(model, optimizer, offload_folder=tmp_path):
            pass
        flat.zero_()
        assert optimizer.state[model.bias]["max_exp_avg_sq"].sum() == 0


def test_rewind_starts_the_same_run_again():
    model = WithBuffers()
    optimizer = torch.optim.AdamW(model.trained.parameters(), lr=0.1)
    with unchanged(model, optimizer) as rewind:
        ends = []
        for _ in range(2):
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(4, 3)).square().mean().backward()
                optimizer.step()
            ends.append(snapshot(model))
            rewind()
            assert not optimizer.state
    assert same(*ends)
    assert not same(ends[0], snapshot(model))


class Noisy:
    """A collator with generators of its own."""

    def __init__(self):
        self.torch, self.numpy = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.old, self.python = np.random.RandomState(1), random.Random(1)
        self.calls = 0

    def draw(self):
        self.calls += 1
        numbers = (torch.rand(1, generator=self.torch).item(), self.numpy.random(), self.old.rand())
        return (*numbers, self.python.random(), self.calls)


def test_generators_of_a_collator_are_put_back():
    collator, twin = Noisy(), Noisy()
    with unchanged(nn.Linear(1, 1), holders=[collator, [1, 2], None, len]):
        collator.draw()
    assert collator.draw() == twin.draw()


def test_generators_that_nothing_leads_to_are_put_back():
    """As in a variable of the module or of the function around a collator."""

    def collator():
        python, numpy, old = random.Random(1), np.random.default_rng(1), np.random.RandomState(1)
        own = torch.Generator().manual_seed(1)
        return lambda: (python.random(), numpy.random(), old.rand(), torch.rand(1, generator=own).item())

    draw, twin = collator(), collator()
    with unchanged(nn.Linear(1, 1), holders=[draw]) as rewind:
        first = draw()
        rewind()
        assert draw() == first
    assert draw() == twin()


GENERATOR = torch.Generator().manual_seed(1)


def test_a_generator_of_torch_in_a_variable_of_a_module_is_put_back():
    with unchanged(nn.Linear(1, 1)):
        first = torch.rand(1, generator=GENERATOR)
    assert torch.equal(torch.rand(1, generator=GENERATOR), first)


class LearnedLoss(nn.Module):
    """A loss with weights of its own, an average of what it sees, a counter and the model, as some libraries' have."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.weights = nn.Parameter(torch.ones(2))
        self.register_buffer("average", torch.zeros(2))
        self.calls = 0

    def forward(self, inputs):
        outputs = self.model(inputs) * self.weights
        self.average = 0.9 * self.average + 0.1 * outputs.detach().mean(0)
        self.calls += 1
        return outputs


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_module_that_a_holder_has_is_put_back(on_disk, tmp_path):
    model = WithBuffers()
    loss = LearnedLoss(model)
    before = snapshot(loss)
    with unchanged(model, holders=[Box(losses=[loss])], offload_folder=tmp_path if on_disk else None) as rewind:
        torch.manual_seed(0)
        train(loss)
        first = snapshot(loss)
        rewind()
        assert same(snapshot(loss), before)
        torch.manual_seed(0)
        train(loss)
        assert same(snapshot(loss), first)
        assert loss.calls == 3
    assert same(snapshot(loss), before)
    assert not same(first, before)
    assert loss.calls == 0
    assert loss.weights.grad is None


def test_weights_that_an_optimizer_alone_knows_are_put_back():
    """As those of a loss in a variable, which nothing leads to."""
    loss = LearnedLoss(WithBuffers())
    with unchanged(loss.model):
        train(loss)
        assert not torch.equal(loss.weights, torch.ones(2))
    assert torch.equal(loss.weights, torch.ones(2))


def test_frozen_weights_that_change_by_other_means_are_told(caplog):
    """As those of an average that no optimizer trains: there is no copy of what is frozen."""
    model = WithBuffers()
    with unchanged(model):
        train(model)
    assert not caplog.records
    average = nn.Linear(3, 2).requires_grad_(False)
    with unchanged(model, holders=[Box(average=average)]), torch.no_grad():
        average.weight.mul_(0.5)
    assert "1 frozen parameters were changed" in caplog.text


def test_what_is_around_the_model_is_left_alone():
    """DDP and compiled models look after themselves; what they hold is the model's."""
    model = WithBuffers()
    around = nn.Sequential(model)
    assert [value for value in _held(model, [Box(wrapped=around)]) if value is around] == []


class OwnRandom(random.Random):
    """A generator of another class than the library's."""


GENERATORS = {
    "an array of objects": lambda: np.array([np.random.default_rng(1), OwnRandom(1)]),
    "a long list": lambda: [OwnRandom(number) for number in range(100)],
    "a long dictionary": lambda: dict(enumerate(np.random.default_rng(1).spawn(100))),
    "bits alone": lambda: [np.random.PCG64(1)],
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_generators_in_any_container_are_put_back(kind):
    def draw(held):
        values = held.values() if isinstance(held, dict) else held
        return [value.random_raw() if hasattr(value, "random_raw") else value.random() for value in values]

    held, twin = GENERATORS[kind](), GENERATORS[kind]()
    with unchanged(nn.Linear(1, 1), holders=[Box(held=held)]):
        draw(held)
    assert draw(held) == draw(twin)


def test_a_generator_without_a_state_is_no_obstacle():
    with unchanged(nn.Linear(1, 1), holders=[Box(generator=random.SystemRandom())]):
        pass


def test_the_helper_of_a_module_is_put_back():
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].helper, twin = Noisy(), Noisy()
    with unchanged(model):
        model[0].helper.draw()
    assert model[0].helper.draw() == twin.draw()


class Sharp(torch.optim.Optimizer):
    """It takes its steps with another optimizer, which holds the state."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.base = torch.optim.AdamW(self.param_groups, lr=0.1)

    def step(self, closure=None):
        self.base.step(closure)


def test_the_state_of_an_inner_optimizer_is_kept():
    model = nn.Linear(1, 1)
    optimizer = Sharp(model.parameters())
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    with unchanged(model, optimizer):
        assert not optimizer.base.state
        optimizer.step()
    assert [state["step"] for state in optimizer.base.state.values()] == [1, 1]


def test_a_second_interrupt_waits_until_all_is_back(monkeypatch):
    model = WithBuffers()
    before, copy_ = snapshot(model), torch.Tensor.copy_

    def pressed_again(tensor, *others):
        signal.raise_signal(signal.SIGINT)
        return copy_(tensor, *others)

    def interrupted():
        with unchanged(model):
            train(model)
            monkeypatch.setattr(torch.Tensor, "copy_", pressed_again)
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    monkeypatch.undo()
    assert same(before, snapshot(model))
    assert signal.getsignal(signal.SIGINT) is handler


def test_values_to_the_bit_with_nan_and_negative_zero():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[float("nan"), -0.0]]))
    bits = model.weight.detach().view(torch.int32).clone()
    with unchanged(model), torch.no_grad():
        model.weight.fill_(1.0)
    assert torch.equal(model.weight.detach().view(torch.int32), bits)


def test_configuration_is_put_back():
    model = tiny_bert()
    with unchanged(model):
        model.config.pad_token_id = 7
        model.config.id2label[0] = "changed"
    assert model.config.pad_token_id != 7
    assert model.config.id2label[0] == "LABEL_0"


class Box:
    """Any object, with what it is given as attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


def in_a_cycle(noisy):
    box = Box(noisy=noisy)
    box.itself = box
    return box


NESTS = {
    "a data loader": lambda noisy: Box(loader=DataLoader([1], collate_fn=noisy.draw)),
    "an attribute of an attribute": lambda noisy: Box(inner=Box(noisy=noisy)),
    "a cycle": in_a_cycle,
    "a list and a dictionary": lambda noisy: Box(steps=[Box(), {"noisy": noisy}]),
    "a method": lambda noisy: Box(collate=noisy.draw),
    "a partial": lambda noisy: functools.partial(print, noisy, end=""),
}


@pytest.mark.parametrize("nest", NESTS)
def test_what_a_holder_holds_is_put_back(nest):
    noisy, twin = Noisy(), Noisy()
    with unchanged(nn.Linear(1, 1), holders=[NESTS[nest](noisy)]):
        noisy.draw()
    assert noisy.draw() == twin.draw()


def test_containers_are_put_back_in_place():
    def collate():
        pass

    collate.calls = 0
    values = {"list": [1, 2], "dict": {"a": 1}, "set": {1}, "deque": deque([1, 2], maxlen=3), "count": Counter("aab")}
    holder, before = Box(**values, collate=collate, space=SimpleNamespace(calls=0)), copy.deepcopy(values)
    with unchanged(nn.Linear(1, 1), holders=[holder]):
        for value in values.values():
            value.clear()
        holder.list, holder.new = [], 1
        holder.space.calls = collate.calls = 1
    assert values == before
    assert holder.list is values["list"]
    assert (holder.space.calls, collate.calls) == (0, 0)
    assert not hasattr(holder, "new")


def test_what_refuses_to_be_changed_is_left_alone():
    holder = Box(outputs=SequenceClassifierOutput(logits=torch.ones(1)))
    with unchanged(nn.Linear(1, 1), holders=[holder]):
        holder.outputs = None
    assert holder.outputs.logits == 1


def test_rows_are_not_looked_at_one_by_one():
    """A list of a million rows costs a copy of the list; a row that changes is the dataset's own business."""
    rows = [Box(seen=0) for _ in range(100)]
    assert len(_held(nn.Linear(1, 1), [Box(rows=rows)])) == 3  # the model, the box and the list
