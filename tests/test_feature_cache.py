"""Training from precomputed activations: the same numbers, the same order, everything put back, never a stale one."""

import json
import logging
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset, IterableDataset
from runs import differences, make_trainer, outcome
from test_distributed import launch_worker
from tiny import pad_rows, ragged_rows, tiny_bert
from tiny_text import tiny_tokenizer
from transformers import (
    DataCollatorWithPadding,
    GPT2Config,
    GPT2ForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ulmfit_tools import activation_store
from ulmfit_tools.callbacks import GradualUnfreezing
from ulmfit_tools.data.augmentation import Augmentation, augmented
from ulmfit_tools.errors import InputError
from ulmfit_tools.feature_cache import CannotPrecompute, activation_cache, precomputed
from ulmfit_tools.freezing import freeze_to
from ulmfit_tools.lr_range import lr_range_test

HEAD, TOP = -1, -3  # what trains: the head alone, or two layers and the head


def trainer_of(folder, frozen_to=HEAD, *, dropout=0.0, callbacks=None, **settings):
    model = tiny_bert(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    freeze_to(model, frozen_to)
    return make_trainer(folder, model=model, callbacks=callbacks, **settings)


def train(folder, cache=None, frozen_to=HEAD, resume=None, **settings):
    """The outcome of a training, from activations where a cache is given."""
    trainer = trainer_of(folder, frozen_to, **settings)
    with precomputed(trainer, cache_dir=cache) if cache else nullcontext():
        trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer)


def close(one, other, tolerance=1e-6):
    """Whether all losses and weights of two outcomes are equal but for the order of additions."""
    losses = [
        [entry[key] for entry in run["history"] for key in ("loss", "eval_loss") if key in entry]
        for run in (one, other)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    for name, weight in one["weights"].items():
        assert torch.allclose(weight, other["weights"][name], rtol=tolerance, atol=tolerance), name
    return True


@pytest.mark.parametrize("frozen_to", [HEAD, TOP])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.1},
        {"train_sampling_strategy": "random"},
        {"dataloader_num_workers": 1},
        {"plain": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_same_numbers(tmp_path, frozen_to, settings):
    through = train(tmp_path / "through", frozen_to=frozen_to, **settings)
    assert close(train(tmp_path / "from", tmp_path / "cache", frozen_to, **settings), through)


@pytest.mark.parametrize("frozen_to", [HEAD, TOP])
def test_mixed_precision(tmp_path, frozen_to):
    through = train(tmp_path / "through", frozen_to=frozen_to, bf16=True)
    assert close(train(tmp_path / "from", tmp_path / "cache", frozen_to, bf16=True), through, 2e-3)  # eps is 8e-3


@pytest.mark.parametrize("frozen_to", [HEAD, TOP])
def test_padding_on_the_left(tmp_path, frozen_to):
    """As decoders are padded; they read the last token."""
    tiny = dict(vocab_size=64, n_positions=32, n_embd=16, n_layer=4, n_head=2, pad_token_id=0, num_labels=3)

    def left(rows):
        batch = pad_rows(rows)
        shifts = (batch["attention_mask"] == 0).sum(1).tolist()
        moved = {
            k: torch.stack([row.roll(s) for row, s in zip(batch[k], shifts)]) for k in ("input_ids", "attention_mask")
        }
        return {**batch, **moved, "position_ids": (moved["attention_mask"].cumsum(1) - 1).clamp_min(0)}

    def trained(cache):
        torch.manual_seed(0)
        model = GPT2ForSequenceClassification(GPT2Config(**tiny, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        freeze_to(model, frozen_to)
        trainer = make_trainer(tmp_path / str(cache is None), model=model, save_strategy="no")
        trainer.data_collator = left
        with precomputed(trainer, cache_dir=cache) if cache else nullcontext():
            trainer.train()
        return outcome(trainer)

    # The bias of a key has no gradient but for rounding, which Adam makes steps of.
    assert close(trained(tmp_path / "cache"), trained(None), 1e-4)


def test_frozen_layers_run_without_dropout_and_the_head_with(tmp_path):
    """With dropout in the head alone nothing changes; the random numbers are drawn in the same order."""
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.5)
    assert model.dropout.p == 0.5
    head = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.5}

    def trained(cache):
        model = tiny_bert(**head)
        freeze_to(model, HEAD)
        trainer = make_trainer(tmp_path / str(cache is None), model=model, save_strategy="no")
        with precomputed(trainer, cache_dir=cache) if cache else nullcontext():
            trainer.train()
        return outcome(trainer)

    assert close(trained(tmp_path / "cache"), trained(None))


class Stop(Exception):
    pass


class StopAt(TrainerCallback):
    """Raises after a step, as a crash would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stop


@pytest.mark.parametrize("frozen_to", [HEAD, TOP])
def test_resumed_in_the_middle_it_ends_with_the_same_bits(tmp_path, frozen_to):
    cache = tmp_path / "cache"
    whole = train(tmp_path / "whole", cache, frozen_to, dropout=0.1)
    with pytest.raises(Stop):
        train(tmp_path / "run", cache, frozen_to, dropout=0.1, callbacks=[StopAt(13)])
    assert differences(whole, train(tmp_path / "run", cache, frozen_to, resume=True, dropout=0.1)) == []


@pytest.mark.parametrize("frozen_to", [HEAD, TOP])
def test_the_range_test_inside_sees_the_same_curve(tmp_path, frozen_to):
    sweep = {"num_steps": 20, "start_lr": 1e-4, "end_lr": 1.0}
    plain = lr_range_test(trainer_of(tmp_path / "a", frozen_to), **sweep)
    trainer = trainer_of(tmp_path / "b", frozen_to)
    with precomputed(trainer, cache_dir=tmp_path / "cache"):
        curve = lr_range_test(trainer, **sweep)
        on_held_out = lr_range_test(trainer, eval_batches=2, **sweep)
    assert curve.losses == pytest.approx(plain.losses, rel=1e-5)
    again = lr_range_test(trainer_of(tmp_path / "c", frozen_to), eval_batches=2, **sweep)
    assert on_held_out.losses == pytest.approx(again.losses, rel=1e-5)


def columns_of(rows):
    return {"input_ids": [row["input_ids"] for row in rows], "labels": [row["labels"] for row in rows]}


@pytest.mark.parametrize("frozen_to", [HEAD, TOP])
def test_a_dataset_with_columns_that_the_model_does_not_read(tmp_path, frozen_to):
    rows = [{**row, "input_ids": [i % 20 + 5 for i in row["input_ids"]]} for row in ragged_rows()]
    named = Dataset.from_dict({**columns_of(rows), "text": ["a"] * len(rows)})

    def trained(cache):
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        freeze_to(model, frozen_to)
        args = TrainingArguments(
            str(tmp_path / "run"), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=5, logging_steps=1,
            save_strategy="no",
        )  # fmt: skip
        collator = DataCollatorWithPadding(tiny_tokenizer())
        trainer = Trainer(
            model=model, args=args, train_dataset=named, eval_dataset={"a": named.select(range(5)), "b": named},
            data_collator=collator,
        )  # fmt: skip
        with precomputed(trainer, cache_dir=cache) if cache else nullcontext():
            trainer.train()
            scores = trainer.evaluate()
        assert trainer.train_dataset is named
        assert trainer.data_collator is collator
        assert args.remove_unused_columns
        return [
            scores["eval_a_loss"],
            scores["eval_b_loss"],
            *(e["loss"] for e in trainer.state.log_history if "loss" in e),
        ]

    assert trained(tmp_path / "cache") == pytest.approx(trained(None), rel=1e-6)


def test_everything_is_put_back_also_when_something_raises(tmp_path):
    trainer = trainer_of(tmp_path, TOP)
    model = trainer.model
    before = {k: v for k, v in vars(trainer).items() if k in ("train_dataset", "eval_dataset", "data_collator")}
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    callbacks = list(trainer.callback_handler.callbacks)
    batch = pad_rows(ragged_rows(4))
    model.eval()
    logits = model(**batch).logits

    def raise_inside():
        with precomputed(trainer, cache_dir=tmp_path / "cache"):
            assert trainer.train_dataset is not before["train_dataset"]
            raise KeyError

    with pytest.raises(KeyError):
        raise_inside()
    assert all(getattr(trainer, name) is value for name, value in before.items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == frozen
    assert trainer.callback_handler.callbacks == callbacks
    assert torch.equal(model(**batch).logits, logits)
    assert all("forward" not in vars(module) for module in model.modules())


# ---- Found again, and never a stale one ----------------------------------------------------------------------------


def report_of(tmp_path, frozen_to=HEAD, change=lambda trainer: None, **settings):
    trainer = trainer_of(tmp_path / "run", frozen_to)
    change(trainer)
    with precomputed(trainer, cache_dir=tmp_path / "cache", **settings) as report:
        return report


def test_it_is_computed_once_for_many_trainings(tmp_path):
    first, again = report_of(tmp_path), report_of(tmp_path)
    assert (first.reused, again.reused, again.seconds) == (False, True, 0.0)
    assert first.form == "vector"
    assert first.nbytes == (40 + 12) * (16 * 4 + 4)  # 16 numbers of 4 bytes and a position for each row


def other_weights(trainer):
    with torch.no_grad():
        trainer.model.bert.encoder.layer[2].output.dense.bias[0] += 1e-3


def other_rows(trainer):
    trainer.train_dataset = [*ragged_rows()[:-1], {"input_ids": [5, 6, 7], "labels": 0}]


@pytest.mark.parametrize("change", [other_weights, other_rows, lambda t: setattr(t.args, "bf16", True)])
def test_whatever_changes_the_numbers_makes_another_entry(tmp_path, change):
    report_of(tmp_path)
    assert not report_of(tmp_path, change=change).reused


def test_the_head_and_the_labels_do_not(tmp_path):
    report_of(tmp_path)

    def other_head(trainer):
        with torch.no_grad():
            trainer.model.classifier.weight += 1
        trainer.train_dataset = [{**row, "labels": 0} for row in trainer.train_dataset]

    assert report_of(tmp_path, change=other_head).reused


def test_an_interrupted_pass_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(activation_store, "ROWS_IN_A_PART", 10)
    write, written = activation_store.Entry.write, []

    def dies(self, part, *more):
        if len(written) == 2:
            raise KeyboardInterrupt
        write(self, part, *more)
        written.append(part)

    monkeypatch.setattr(activation_store.Entry, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        report_of(tmp_path)
    written.clear()
    monkeypatch.setattr(activation_store.Entry, "write", lambda *a: (written.append(a[1]), write(*a)))
    assert not report_of(tmp_path).reused
    assert written == [2, 3, 0, 1]  # the rest of the four parts of 40 training rows, and the two of 12 others


def test_half_precision_tells_its_error(tmp_path):
    exact, half = report_of(tmp_path, TOP), report_of(tmp_path, TOP, dtype="float16")
    assert (exact.error, exact.dtype, half.dtype) == (0.0, "float32", "float16")
    assert 1e-6 < half.error < 1e-2
    assert half.nbytes == exact.nbytes / 2
    assert half.form == "sequence"
    assert exact.nbytes == 16 * 4 * sum(len(row["input_ids"]) for row in [*ragged_rows(), *ragged_rows(12, seed=1)])


def names_from(group):
    model = tiny_bert()
    return freeze_to(model, group)


def test_one_pass_serves_the_trainings_to_come(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        report_of(tmp_path, HEAD, to_come=[names_from(-2), names_from(-4)])
    assert "The same pass keeps what leaves bert.encoder.layer.2 for a later phase" in caplog.text
    assert "bert.encoder.layer.0" in caplog.text
    assert report_of(tmp_path, -2).reused
    assert report_of(tmp_path, -4).reused
    assert not report_of(tmp_path, -3).reused


def test_without_room_for_those_to_come_it_keeps_its_own(tmp_path, monkeypatch, caplog):
    usage = type("Usage", (), {"free": 4000})  # its own need 3,536 bytes and 5 % more
    monkeypatch.setattr(activation_store.shutil, "disk_usage", lambda folder: usage)
    with caplog.at_level(logging.WARNING):
        report_of(tmp_path, HEAD, to_come=[names_from(-2)])
    assert "What leaves bert.encoder.layer.2 is left for later: no room" in caplog.text
    usage.free = 3600
    with pytest.raises(InputError, match="make room, choose another folder or a smaller dtype"):
        report_of(tmp_path, HEAD, change=other_weights)


def test_a_higher_boundary_is_computed_from_a_lower_one(tmp_path, caplog, monkeypatch):
    report_of(tmp_path, -4)  # what leaves the first layer
    calls = []
    layer = type(tiny_bert().bert.encoder.layer[0])
    own = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, x, *a, **k: (calls.append(len(x)), own(self, x, *a, **k))[1])
    with caplog.at_level(logging.WARNING):
        report = report_of(tmp_path, -2)
    assert "The pass begins at what leaves bert.encoder.layer.0, which is there" in caplog.text
    assert not report.reused
    monkeypatch.setattr(layer, "forward", own)
    close(train(tmp_path / "from", tmp_path / "cache", -2), train(tmp_path / "through", frozen_to=-2))


# ---- Frozen layers that move ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen_to", [HEAD, TOP])
def test_thawing_below_the_boundary_drops_it(tmp_path, frozen_to, caplog):
    def trained(cache):
        class Thaw(TrainerCallback):
            def on_epoch_begin(self, args, state, control, model=None, **kwargs):
                if state.epoch == 1:
                    freeze_to(model, 2)

        trainer = trainer_of(tmp_path / str(cache is None), frozen_to, callbacks=[Thaw()], save_strategy="no")
        with precomputed(trainer, cache_dir=cache) if cache else nullcontext():
            trainer.train()
        return outcome(trainer)

    with caplog.at_level(logging.WARNING):
        dropped = trained(tmp_path / "cache")
    assert "Layers of the frozen part were thawed: training goes on through the layers" in caplog.text
    assert close(dropped, trained(None), 1e-5)


def test_a_checkpoint_with_other_weights_drops_it(tmp_path, caplog):
    other = trainer_of(tmp_path / "run", HEAD)
    other_weights(other)
    other.add_callback(StopAt(5))
    with pytest.raises(Stop):
        other.train()
    resumed = trainer_of(tmp_path / "run", HEAD)
    with caplog.at_level(logging.WARNING), precomputed(resumed, cache_dir=tmp_path / "cache"):
        resumed.train(resume_from_checkpoint=True)
    assert "The checkpoint has other weights in the frozen layers" in caplog.text
    straight = trainer_of(tmp_path / "straight", HEAD)
    other_weights(straight)
    straight.train()
    assert close(outcome(resumed), outcome(straight), 1e-5)


# ---- Where it cannot be --------------------------------------------------------------------------------------------


def refusal(trainer, cache):
    with pytest.raises(InputError) as error, precomputed(trainer, cache_dir=cache):
        pass
    assert "\n" not in str(error.value)
    return error.type, str(error.value)


def test_a_head_that_reads_padding_is_found_out(tmp_path):
    """BERT reads the first place of a row, which is padding where a batch is padded on the left."""
    trainer = trainer_of(tmp_path)
    trainer.data_collator = lambda rows: {k: v.flip(1) if v.dim() == 2 else v for k, v in pad_rows(rows).items()}
    assert "gives other numbers from activations" in refusal(trainer, tmp_path / "cache")[1]


def test_what_it_refuses(tmp_path):
    cache = tmp_path / "cache"
    trainer = trainer_of(tmp_path / "all", 0)
    assert "No block of layers is frozen" in refusal(trainer, cache)[1]
    trainer = trainer_of(tmp_path / "augmented")
    with augmented(trainer, Augmentation(drop=0.1), tiny_tokenizer()):
        assert "The text is augmented" in refusal(trainer, cache)[1]
    calls = []

    def changing(rows):
        calls.append(1)
        batch = pad_rows(rows)
        batch["input_ids"][:, -1] = 5 + len(calls) % 2
        return batch

    trainer.data_collator = changing
    assert "another batch for the same rows each time" in refusal(trainer, cache)[1]
    trainer = trainer_of(tmp_path / "stream")
    trainer.train_dataset = IterableDataset.from_generator(lambda: iter(ragged_rows()))
    assert "needs numbered rows and a length" in refusal(trainer, cache)[1]
    trainer = trainer_of(tmp_path / "inputs")
    trainer.data_collator = lambda rows: {"pixels": torch.zeros(len(rows), 3), "labels": torch.zeros(len(rows))}
    kind, line = refusal(trainer, cache)
    assert kind is CannotPrecompute
    assert "no input_ids" in line
    with pytest.raises(InputError, match="dtype is one of auto.*Did you mean \"float16\".* Received: 'float61'"):
        report_of(tmp_path, dtype="float61")


def test_a_gradual_unfreezing_that_begins_with_all_layers_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, 0, callbacks=[GradualUnfreezing(by="epoch")])
    assert "No block of layers is frozen" in refusal(trainer, tmp_path / "cache")[1]


def test_where_plans_keep_it(monkeypatch, tmp_path):
    monkeypatch.setenv("ULMFIT_TOOLS_CACHE", str(tmp_path))
    assert activation_cache() == tmp_path / "activations"
    monkeypatch.delenv("ULMFIT_TOOLS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert activation_cache() == tmp_path / "x/ulmfit_tools/activations"


def test_two_processes_share_the_pass_and_have_the_losses_of_the_layers(tmp_path):
    done = launch_worker("feature_cache_worker.py", tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for group in ("-1", "-3"):
        for through, cached, _ in (rank[group] for rank in ranks):
            assert cached == pytest.approx(through, rel=1e-5)
        counted = [rank[group][2] for rank in ranks]
        assert sorted(counted) != [min(counted)] * 2  # three parts of 256 rows: two for one, one for the other
        assert sum(counted) < 600 + 2 * 600  # and not all of them in both
