"""Training from precomputed activations gives the numbers of training through the frozen layers."""

import errno
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import datasets
import pytest
import torch
from runs import copy_until, differences
from test_distributed import launch_worker
from tiny import pad_rows, ragged_rows, tiny_bert
from tiny_text import tiny_tokenizer
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.bert.modeling_bert import BertIntermediate

from ulmfit_tools import activation_store, frozen_pass
from ulmfit_tools.activation_store import remove_cache
from ulmfit_tools.callbacks import GradualUnfreezing
from ulmfit_tools.errors import InputError
from ulmfit_tools.feature_cache import CannotPrecompute, activation_cache, precomputed
from ulmfit_tools.freeze_boundary import find_boundary
from ulmfit_tools.freezing import freeze_to, keep_in_eval_mode
from ulmfit_tools.lr_range import lr_range_test
from ulmfit_tools.replay_check import relative_error, same_vectors
from ulmfit_tools.trainer import ULMFiTTrainer, ULMFiTTrainingArguments, optimizer_of_arguments

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HEAD, TOP = -1, 3  # what trains: the classifier and pooler; the two upper blocks with them


def make_trainer(folder, n=TOP, *, plain=False, kind=None, model=None, callbacks=None, **settings):
    """Two epochs of ten steps with a log of each; what is below group `n` is frozen."""
    model = tiny_bert(**NO_DROPOUT) if model is None else model
    freeze_to(model, n)
    arguments, trainer_class = (TrainingArguments, Trainer) if plain else (ULMFiTTrainingArguments, ULMFiTTrainer)
    defaults = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1}
    defaults |= {"eval_strategy": "epoch", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    args = arguments(str(folder), report_to="none", **(defaults | settings))
    trainer = (kind or trainer_class)(
        model=model,
        args=args,
        train_dataset=ragged_rows(),
        eval_dataset=ragged_rows(12, seed=1),
        data_collator=pad_rows,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=None if plain else optimizer_of_arguments(args, trainable_only=not callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def outcome(trainer):
    """Every logged loss and gradient norm, and the final weights."""
    names = ("loss", "grad_norm", "eval_loss")
    history = [{name: entry[name] for name in names if name in entry} for entry in trainer.state.log_history[:-1]]
    return {"history": history, "weights": {k: v.clone() for k, v in trainer.model.state_dict().items()}}


def assert_same_numbers(ours, expected, rel=1e-6):
    assert len(ours["history"]) == len(expected["history"])
    for mine, other in zip(ours["history"], expected["history"], strict=True):
        assert mine == pytest.approx(other, rel=rel)
    for name, weights in expected["weights"].items():
        if name.endswith("self.key.bias"):  # its gradient is 0 but for rounding, which Adam blows up; it has no effect
            continue
        torch.testing.assert_close(ours["weights"][name], weights, rtol=rel, atol=rel * float(weights.abs().max()))


def train(folder, cached, n=TOP, *, change=lambda trainer: None, dtype="auto", **settings):
    """Train with the cache or without; `change` is applied to the trainer first."""
    trainer = make_trainer(folder / ("cached" if cached else "direct"), n, **settings)
    change(trainer)
    with precomputed(trainer, cache_dir=folder / "cache", dtype=dtype) if cached else nullcontext() as report:
        trainer.train()
    return outcome(trainer), report


def compare(folder, n=TOP, *, rel=1e-6, **settings):
    """Assert that both give the same numbers, and return the report."""
    expected, _ = train(folder, False, n, **settings)
    ours, report = train(folder, True, n, **settings)
    assert_same_numbers(ours, expected, rel)
    return report


# ---- The same numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [True, False], ids=["Trainer", "ULMFiTTrainer"])
@pytest.mark.parametrize(("n", "form", "path"), [(HEAD, "vector", 3), (TOP, "sequence", 1)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.1},
        {"train_sampling_strategy": "group_by_length"},
        {"activation_checkpointing": True},
        {"dataloader_num_workers": 1},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 6},
    ],
    ids=["simple", "accumulation", "smoothing", "grouping", "checkpointing", "worker", "drop_last"],
)
def test_losses_and_weights_are_those_of_the_layers(tmp_path, plain, n, form, path, settings):
    report = compare(tmp_path, n, plain=plain, **settings)
    assert (report.form, report.boundary) == (form, f"bert.encoder.layer.{path}")
    assert report.dtype == "float32"
    assert report.error == 0
    assert not report.reused


@pytest.mark.parametrize("n", [HEAD, TOP])
def test_in_mixed_precision(tmp_path, n):
    report = compare(tmp_path, n, bf16=True, rel=2e-2)  # bfloat16 has 8 bits: units of 4e-3
    assert report.error == 0  # stored as the layers give them


@pytest.mark.parametrize("n", [HEAD, TOP])
def test_dropout_of_what_trains_draws_the_same_numbers(tmp_path, n):
    """With dropout on, the frozen part runs in eval mode and takes no random numbers from the rest."""

    def in_eval_mode(trainer):
        names = find_boundary(trainer.model).steps
        keep_in_eval_mode(trainer.model, names)

    expected, _ = train(tmp_path, False, n, model=tiny_bert(), change=in_eval_mode)
    ours, _ = train(tmp_path, True, n, model=tiny_bert())
    assert_same_numbers(ours, expected)


def hub_rows(rows):
    columns = [{**row, "text": "as it was", "length": len(row["input_ids"])} for row in rows]
    return datasets.Dataset.from_list(columns)


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize("plain", [True, False], ids=["Trainer", "ULMFiTTrainer"])
@pytest.mark.parametrize("n", [HEAD, TOP])
def test_a_hugging_face_dataset_with_columns_that_are_not_used(tmp_path, n, plain, strategy):
    def change(trainer):
        trainer.train_dataset = hub_rows(trainer.train_dataset)
        trainer.eval_dataset = {"one": hub_rows(trainer.eval_dataset), "two": hub_rows(ragged_rows(8, seed=2))}

    compare(tmp_path, n, plain=plain, change=change, train_sampling_strategy=strategy)


@pytest.mark.parametrize("n", [HEAD, TOP])
def test_rows_that_are_padded_already(tmp_path, n):
    def change(trainer):
        rows = [{**row, "input_ids": row["input_ids"] + [0] * (16 - len(row["input_ids"]))} for row in ragged_rows()]
        trainer.train_dataset = rows

    compare(tmp_path, n, change=change, train_sampling_strategy="group_by_length")


def test_rows_with_keys_that_the_model_does_not_take(tmp_path):
    def collate(rows):
        assert set(rows[0]) == {"input_ids", "labels"}  # Trainer removes the others before it collates
        return pad_rows(rows)

    def change(trainer):
        trainer.train_dataset = [{**row, "text": "as it was"} for row in trainer.train_dataset]
        trainer.data_collator = collate

    compare(tmp_path, change=change)


@pytest.mark.parametrize("n", [HEAD, TOP])
def test_rows_that_are_no_mappings(tmp_path, n):
    def change(trainer):
        trainer.train_dataset = [tuple(row.values()) for row in trainer.train_dataset]
        trainer.eval_dataset = [tuple(row.values()) for row in trainer.eval_dataset]
        trainer.data_collator = lambda rows: pad_rows([{"input_ids": ids, "labels": label} for ids, label in rows])

    compare(tmp_path, n, change=change, train_sampling_strategy="random")


def test_counted_tokens_are_those_of_the_texts(tmp_path):
    seen = []
    for cached in (False, True):
        settings = {"include_num_input_tokens_seen": "all", "num_train_epochs": 1}
        trainer = make_trainer(tmp_path / str(cached), HEAD, **settings)
        with precomputed(trainer, cache_dir=tmp_path / "cache") if cached else nullcontext():
            trainer.train()
        seen.append(trainer.state.num_input_tokens_seen)
    assert seen[0] == seen[1] > 40 * 3


class NamesItsInputs(Trainer):
    """Hands on what the model reads, and so not the activations that are in the batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"], label_smoothing=0.2)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("n", [HEAD, TOP])
def test_a_loss_of_the_trainers_own_that_leaves_the_activations_out(tmp_path, n):
    assert compare(tmp_path, n, plain=True, kind=NamesItsInputs).form == "sequence"


def test_a_loss_of_outputs_and_labels_does_with_a_vector(tmp_path):
    def change(trainer):
        def of_both(outputs, labels, num_items_in_batch=None):
            return torch.nn.functional.cross_entropy(outputs["logits"], labels, label_smoothing=0.2)

        trainer.compute_loss_func = of_both

    assert compare(tmp_path, HEAD, plain=True, change=change).form == "vector"


class WithAnotherLoss(BertForSequenceClassification):
    """Adds to its loss something of all tokens, which the logits are not made of."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        output = super().forward(input_ids, attention_mask, labels=labels, output_hidden_states=True)
        if labels is not None:
            tokens = self.bert.pooler(output.hidden_states[-1][:, 1:2])
            output["loss"] = output.loss + tokens.pow(2).mean()
        return {name: output[name] for name in ("loss", "logits") if name in output}


def test_a_loss_of_the_models_own_that_reads_more_than_the_logits(tmp_path):
    def model():
        torch.manual_seed(0)
        return WithAnotherLoss(tiny_bert(**NO_DROPOUT).config)

    expected, _ = train(tmp_path, False, HEAD, model=model())
    ours, report = train(tmp_path, True, HEAD, model=model())
    assert report.form == "sequence"
    assert_same_numbers(ours, expected)


def loss_of_hidden_states(number):
    def change(trainer):
        def loss(outputs, labels, num_items_in_batch):
            read = outputs["hidden_states"][number][:, 1].abs().sum(1).mean()
            return torch.nn.functional.cross_entropy(outputs["logits"], labels) + read

        trainer.model.config.output_hidden_states = True
        trainer.compute_loss_func = loss

    return change


def test_a_loss_function_that_reads_other_tokens(tmp_path):
    assert compare(tmp_path, HEAD, plain=True, change=loss_of_hidden_states(-1)).form == "sequence"


def test_a_loss_that_draws_random_numbers_leaves_them_as_they_were(tmp_path):
    def change(trainer):
        def smoothed(outputs, labels, num_items_in_batch):
            loss = torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
            return loss * (1 + torch.rand(())) / num_items_in_batch

        trainer.compute_loss_func = smoothed

    assert compare(tmp_path, HEAD, plain=True, change=change).form == "vector"


# ---- The store's type ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "unit"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_half_precision_is_smaller_and_its_error_told(tmp_path, dtype, unit):
    expected, whole = train(tmp_path, True)
    ours, half = train(tmp_path, True, dtype=dtype)
    assert half.nbytes * 2 == whole.nbytes
    assert half.dtype == dtype
    assert 0 < half.error < 16 * unit
    assert_same_numbers(ours, expected, rel=64 * unit)
    assert differences(ours["weights"], expected["weights"])


@pytest.mark.parametrize(
    ("n", "layer", "line"),
    [
        (TOP, 1, "float16 cannot hold what leaves bert.encoder.layer.1: use bfloat16 or float32"),  # a few rows tell
        (HEAD, 3, "is not finite in float16"),  # the pooler's tanh makes 1 of it
    ],
)
def test_a_type_that_cannot_hold_them_is_refused(tmp_path, n, layer, line):
    model = tiny_bert(**NO_DROPOUT)
    with torch.no_grad():
        model.bert.encoder.layer[layer].output.LayerNorm.weight[3] *= 1e5
        for above in model.bert.encoder.layer[
            layer + 1 :
        ]:  # which do not look at it, or rounding decides what they see
            above.attention.self.query.weight[:, 3] = above.attention.self.key.weight[:, 3] = 0
    trainer = make_trainer(tmp_path / "run", n, model=model)
    with (
        pytest.raises(CannotPrecompute, match=line),
        precomputed(trainer, cache_dir=tmp_path / "cache", dtype="float16"),
    ):
        pass
    assert list(tmp_path.glob("cache/*")) == []


def test_a_head_of_zeros_is_moved_by_nothing(tmp_path):
    def change(trainer):
        torch.nn.init.zeros_(trainer.model.classifier.weight)

    assert train(tmp_path, True, HEAD, change=change, dtype="float16")[1].error == 0


def test_the_error_is_a_share_of_the_largest():
    assert relative_error(torch.tensor([1.0, -3.5]), torch.tensor([1.0, -4.0])) == 0.125
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")


def test_unknown_type(tmp_path):
    with (
        pytest.raises(InputError, match="Did you mean \"float16\"\\? Received: 'floar16'"),
        precomputed(make_trainer(tmp_path), cache_dir=tmp_path, dtype="floar16"),
    ):
        pass


# ---- Found again ---------------------------------------------------------------------------------------------------


def run(trainer, folder, **settings):
    with precomputed(trainer, cache_dir=folder / "cache", **settings) as report:
        pass
    return report


def test_found_again_after_training_and_saving(tmp_path):
    """A first loss and a first saving write into the configuration; neither changes the layers."""
    trainer = make_trainer(tmp_path / "one")
    with precomputed(trainer, cache_dir=tmp_path / "cache") as first:
        trainer.train()
        trainer.save_model(tmp_path / "model")
    assert not first.reused
    again = run(trainer, tmp_path)
    assert again.reused
    assert again.seconds == 0
    loaded = type(trainer.model).from_pretrained(tmp_path / "model")
    assert run(make_trainer(tmp_path / "two", model=loaded), tmp_path).reused
    other_labels = make_trainer(tmp_path / "three")
    other_labels.train_dataset = [{**row, "labels": 0} for row in other_labels.train_dataset]
    assert run(other_labels, tmp_path).reused
    assert len(list((tmp_path / "cache").glob("*/entry.json"))) == 2  # training and evaluation rows


@pytest.mark.parametrize("n", [HEAD, TOP])
@pytest.mark.parametrize("dtype", ["auto", "float16", "bfloat16"])
@pytest.mark.parametrize("bf16", [False, True])
def test_rounding_is_not_taken_for_other_layers(tmp_path, n, dtype, bf16):
    assert [run(make_trainer(tmp_path / name, n, bf16=bf16), tmp_path, dtype=dtype).reused for name in "ab"] == [
        False,
        True,
    ]


def test_what_is_multiplied_in_half_precision_is_compared_in_it():
    """Layers put out float32 there, and another padding moved MiniLM's by 1.2e-3 of the largest."""
    computed = torch.tensor([[1.0, -2.0]])
    kept = computed + 2.4e-3
    assert same_vectors(kept, computed, torch.bfloat16)
    assert same_vectors(kept, computed, torch.float16)
    assert not same_vectors(kept, computed, torch.float32)
    assert same_vectors(kept.bfloat16(), computed, torch.float32)  # it was rounded to be stored
    assert not same_vectors(kept + 0.5, computed, torch.bfloat16)


def change_weight(trainer):
    trainer.model.bert.encoder.layer[1].output.dense.bias.data[0] += 1e-3


def change_embedding(trainer):
    trainer.model.bert.embeddings.LayerNorm.bias.data[0] += 1e-3


def change_token(trainer):
    trainer.train_dataset[3]["input_ids"][0] += 1


def change_order(trainer):
    trainer.train_dataset = trainer.train_dataset[::-1]


def change_config(trainer):
    trainer.model.config.layer_norm_eps = 1e-5


def change_precision(trainer):
    trainer.args.bf16 = True


def change_head(trainer):
    trainer.model.classifier.weight.data += 1
    trainer.model.bert.encoder.layer[3].output.dense.bias.data[0] += 1


@pytest.mark.parametrize(
    ("change", "reused"),
    [
        (change_weight, False),
        (change_embedding, False),
        (change_token, False),
        (change_order, False),
        (change_config, False),
        (change_precision, False),
        (change_head, True),
    ],
)
def test_what_changes_the_activations_makes_them_anew(tmp_path, change, reused):
    run(make_trainer(tmp_path / "one"), tmp_path)
    other = make_trainer(tmp_path / "two")
    change(other)
    assert run(other, tmp_path).reused == reused


def adapted():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "dense"], init_lora_weights=False)
    model = get_peft_model(tiny_bert(**NO_DROPOUT), config, adapter_name="first")
    model.add_adapter("second", config)
    return model


def other_adapter(model):
    model.set_adapter("second")


def other_scaling(model):
    model.base_model.model.bert.encoder.layer[0].attention.self.query.scaling["first"] *= 2


def no_adapter(model):
    model.base_model.model.bert.encoder.layer[0].attention.self.query.enable_adapters(False)


@pytest.mark.parametrize("change", [other_adapter, other_scaling, no_adapter])
def test_other_adapters_in_use_make_them_anew(tmp_path, monkeypatch, change):
    monkeypatch.setattr(frozen_pass, "same_vectors", lambda *compared: True)  # the key alone tells them apart
    model = adapted()
    run(make_trainer(tmp_path / "one", HEAD, model=model), tmp_path)
    assert run(make_trainer(tmp_path / "two", HEAD, model=model), tmp_path).reused
    change(model)
    assert not run(make_trainer(tmp_path / "three", HEAD, model=model), tmp_path).reused


def stop_after(parts, monkeypatch):
    """Interrupt the pass once, when so many parts are written; the list of them goes on."""
    write, written, stopped = activation_store.Entry.write, [], []

    def stops(self, part, *more):
        if len(written) == parts and not stopped:
            stopped.append(part)
            raise KeyboardInterrupt
        write(self, part, *more)
        written.append(part)

    monkeypatch.setattr(activation_store.Entry, "write", stops)
    return written


def edit_the_code(monkeypatch):
    own = BertIntermediate.forward
    monkeypatch.setattr(BertIntermediate, "forward", lambda self, hidden: 1.1 * own(self, hidden))


@pytest.mark.parametrize("n", [HEAD, TOP])
def test_other_code_under_the_same_names_makes_them_anew(tmp_path, caplog, monkeypatch, n):
    run(make_trainer(tmp_path / "before", n), tmp_path)
    edit_the_code(monkeypatch)
    assert not compare(tmp_path, n).reused
    assert caplog.text.count("not what the layers put out now: it is computed anew") == 2  # training and evaluation
    assert run(make_trainer(tmp_path / "again", n), tmp_path).reused


def test_a_pass_does_not_begin_at_what_other_code_made(tmp_path, caplog, monkeypatch):
    run(make_trainer(tmp_path / "low", 2), tmp_path)
    edit_the_code(monkeypatch)
    compare(tmp_path, 4)
    assert "The pass begins" not in caplog.text


def test_a_pass_does_not_go_on_with_what_other_code_made(tmp_path, monkeypatch):
    monkeypatch.setattr(activation_store, "ROWS_IN_A_PART", 10)
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(make_trainer(tmp_path / "before"), tmp_path)
    edit_the_code(monkeypatch)
    compare(tmp_path)


def zero(file):
    file.write_bytes(bytes(file.stat().st_size))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("n", [HEAD, TOP])
@pytest.mark.parametrize("damage", [zero, truncate, flip_a_bit, Path.unlink])
def test_damaged_files_are_made_anew(tmp_path, n, damage):
    expected, first = train(tmp_path, True, n)
    for file in (tmp_path / "cache").glob("*/activations.bin"):
        damage(file)
    ours, again = train(tmp_path, True, n)
    assert (first.reused, again.reused) == (False, False)
    assert differences(ours["weights"], expected["weights"]) == []
    assert run(make_trainer(tmp_path / "again", n), tmp_path).reused


# ---- Several phases ------------------------------------------------------------------------------------------------


def names_from(model, n):
    names = freeze_to(model, n)
    freeze_to(model, HEAD)
    return names


def test_one_pass_serves_the_phases_to_come(tmp_path, caplog):
    trainer = make_trainer(tmp_path / "head", HEAD)
    to_come = [names_from(trainer.model, n) for n in (4, 3)]
    with precomputed(trainer, cache_dir=tmp_path / "cache", to_come=to_come) as first:
        trainer.train()
    assert first.form == "vector"
    assert "keeps what leaves bert.encoder.layer.2" in caplog.text
    assert "keeps what leaves bert.encoder.layer.1" in caplog.text
    for n in (4, 3):
        report = run(make_trainer(tmp_path / str(n), n, model=trainer.model), tmp_path)
        assert (report.reused, report.form, report.boundary) == (True, "sequence", f"bert.encoder.layer.{n - 2}")


def test_a_phase_to_come_in_which_all_layers_train(tmp_path):
    trainer = make_trainer(tmp_path / "head", HEAD)
    to_come = [names_from(trainer.model, n) for n in (TOP, 0)]
    with precomputed(trainer, cache_dir=tmp_path / "cache", to_come=to_come) as report:
        pass
    assert report.form == "vector"
    assert run(make_trainer(tmp_path / "top", TOP), tmp_path).reused


def test_boundaries_to_come_are_left_out_where_the_disk_is_small(tmp_path, caplog, monkeypatch):
    trainer = make_trainer(tmp_path / "head", HEAD)
    free = 52 * 16 * 4 * 2  # the vectors of 52 rows, twice
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with precomputed(trainer, cache_dir=tmp_path / "cache", to_come=[names_from(trainer.model, TOP)]) as report:
        pass
    assert report.form == "vector"
    assert "no room" in caplog.text
    monkeypatch.undo()
    assert not run(make_trainer(tmp_path / "top", TOP), tmp_path).reused


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    trainer = make_trainer(tmp_path / "top")
    with pytest.raises(InputError, match="The activations need"), precomputed(trainer, cache_dir=tmp_path / "cache"):
        pass
    assert list((tmp_path / "cache").glob("*/*")) == []
    assert trainer.data_collator is pad_rows


def test_a_higher_boundary_is_computed_from_a_lower_one(tmp_path, caplog):
    run(make_trainer(tmp_path / "low", 2), tmp_path)
    trainer = make_trainer(tmp_path / "high", 4)
    calls = []
    trainer.model.bert.encoder.layer[0].attention.register_forward_pre_hook(lambda module, args: calls.append(args))
    expected, _ = train(tmp_path, False, 4)
    with precomputed(trainer, cache_dir=tmp_path / "cache"):
        probed = len(calls)
        trainer.train()
    assert "begins at what leaves bert.encoder.layer.0" in caplog.text
    assert len(calls) == probed  # and no batch of the training went through it
    assert_same_numbers(outcome(trainer), expected)


def test_all_that_is_written_is_locked_meanwhile(tmp_path, monkeypatch, caplog):
    write, said, taken = activation_store.Entry.write, [], []
    locked = frozen_pass.locked

    def removes(self, *more):
        said.append(remove_cache(tmp_path / "cache"))
        write(self, *more)

    monkeypatch.setattr(activation_store.Entry, "write", removes)
    monkeypatch.setattr(frozen_pass, "locked", lambda folder, say: taken.append(folder) or locked(folder, say))
    trainer = make_trainer(tmp_path / "head", HEAD)
    with precomputed(trainer, cache_dir=tmp_path / "cache", to_come=[names_from(trainer.model, TOP)]):
        trainer.train()
    assert said == [0] * 4
    assert taken == sorted(set(taken))  # in one order in all runs, so that no two wait for each other
    assert len(taken) == 4
    assert "are in use and were left" in caplog.text


def test_the_cache_in_use_is_not_removed(tmp_path):
    """Nor need it be there any more afterwards."""
    trainer = make_trainer(tmp_path / "head", HEAD)
    with precomputed(trainer, cache_dir=tmp_path / "cache"):
        assert remove_cache(tmp_path / "cache") == 0
        trainer.train()
    assert remove_cache(tmp_path / "cache") > 0
    trainer.train()


def test_windows_trains_through_the_layers(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "head", HEAD)
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(CannotPrecompute, match="on Linux and macOS"), precomputed(trainer, cache_dir=tmp_path):
        pass


def test_rows_that_are_there_twice(tmp_path):
    def change(trainer):
        trainer.eval_dataset = ragged_rows()

    compare(tmp_path, change=change)
    assert len(list((tmp_path / "cache").glob("*/entry.json"))) == 1


# ---- In the midst of a training ------------------------------------------------------------------------------------


def state_of(trainer):
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in trainer.model.modules()]
    own = [name for name, module in trainer.model.named_modules() if {"forward", "train"} & vars(module).keys()]
    data = [
        trainer.train_dataset,
        trainer.eval_dataset,
        trainer.data_collator,
        list(trainer.callback_handler.callbacks),
    ]
    trained = [parameter.requires_grad for parameter in trainer.model.parameters()]
    return [hooks, own, data, trained, trainer.args.to_dict(), trainer.model.training]


@pytest.mark.parametrize("n", [HEAD, TOP])
def test_all_is_put_back_also_after_an_error(tmp_path, n):
    trainer = make_trainer(tmp_path, n)
    before, random = state_of(trainer), torch.get_rng_state()
    with precomputed(trainer, cache_dir=tmp_path / "cache"):
        assert torch.equal(torch.get_rng_state(), random)
    assert state_of(trainer) == before
    with pytest.raises(InputError), precomputed(trainer, cache_dir=tmp_path / "cache"):
        lr_range_test(trainer, num_steps=1)
    assert state_of(trainer) == before


class Write(TrainerCallback):
    """Writes to a frozen weight in the middle of the second epoch, as an average of weights does."""

    def __init__(self, factor):
        self.factor = factor

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 15:
            with torch.no_grad():
                model.bert.encoder.layer[0].output.dense.weight *= self.factor


@pytest.mark.parametrize(("factor", "drops"), [(1, 0), (3, 1)])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("n", [HEAD, TOP])
def test_frozen_weights_that_are_written_to_end_the_replay(tmp_path, caplog, n, workers, factor, drops):
    def change(trainer):
        trainer.add_callback(Write(factor))

    compare(tmp_path, n, change=change, dataloader_num_workers=workers)
    assert caplog.text.count("Weights of the frozen part were changed: training goes on") == drops


def test_frozen_weights_that_are_written_to_before_an_evaluation(tmp_path):
    trainer = make_trainer(tmp_path)
    with precomputed(trainer, cache_dir=tmp_path / "cache"):
        before = trainer.evaluate()["eval_loss"]
        with torch.no_grad():
            trainer.model.bert.encoder.layer[0].output.dense.weight *= 3
        after = trainer.evaluate()["eval_loss"]
    assert after == trainer.evaluate()["eval_loss"] != before


class Thaw(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 5:
            freeze_to(model, 1)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("n", [HEAD, TOP])
def test_thawed_layers_end_the_replay(tmp_path, caplog, n, workers):
    settings = {"plain": True, "dataloader_num_workers": workers, "optim": "sgd", "learning_rate": 0.1}

    def with_all_parameters(trainer):  # plain Trainer leaves out those that are frozen when it makes its optimizer
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
        trainer.add_callback(Thaw())

    compare(tmp_path, n, change=with_all_parameters, **settings)
    assert caplog.text.count("training goes on through the layers") == 1


def test_gradual_unfreezing_in_one_run(tmp_path, caplog):
    """It thaws one group an epoch; the cache serves the first epoch."""

    def run_it(cached):
        unfreezing = GradualUnfreezing(by="epoch", eval_mode_for_frozen=True)
        trainer = make_trainer(tmp_path / str(cached), HEAD, callbacks=[unfreezing], num_train_epochs=3)
        with precomputed(trainer, cache_dir=tmp_path / "cache") if cached else nullcontext():
            trainer.train()
        return outcome(trainer)

    assert_same_numbers(run_it(True), run_it(False), rel=1e-5)
    assert caplog.text.count("training goes on through the layers") == 1


def test_a_checkpoint_with_other_frozen_weights_ends_the_replay(tmp_path, caplog):
    def resumed(cached):
        trainer = make_trainer(tmp_path / "run", plain=True)
        with precomputed(trainer, cache_dir=tmp_path / "cache") if cached else nullcontext():
            trainer.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-10"))
        return outcome(trainer)

    model = tiny_bert(**NO_DROPOUT)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight += 0.1
    make_trainer(tmp_path / "other", plain=True, model=model, save_strategy="epoch").train()
    assert_same_numbers(resumed(True), resumed(False))
    assert "The checkpoint has other weights in the frozen layers" in caplog.text


@pytest.mark.parametrize("plain", [True, False], ids=["Trainer", "ULMFiTTrainer"])
@pytest.mark.parametrize("n", [HEAD, TOP])
@pytest.mark.parametrize("step", [2, 4])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, caplog, plain, n, step):
    settings = {"plain": plain, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 0, "logging_steps": 2}
    whole = make_trainer(tmp_path / "whole", n, model=tiny_bert(), **settings)
    with precomputed(whole, cache_dir=tmp_path / "cache"):
        whole.train()
    folder = copy_until(tmp_path / "whole", tmp_path / "stopped", step)
    again = make_trainer(folder, n, model=tiny_bert(), **settings)
    with precomputed(again, cache_dir=tmp_path / "cache") as report:
        again.train(resume_from_checkpoint=True)
    assert report.reused
    assert differences(outcome(whole), outcome(again)) == []
    assert "goes on through the layers" not in caplog.text


@pytest.mark.parametrize("n", [HEAD, TOP])
def test_special_tokens_of_the_tokenizer_do_not_end_it(tmp_path, caplog, n):
    """`Trainer.train` writes them into the model's configuration."""
    trainer = make_trainer(tmp_path, n)
    trainer.processing_class = tiny_tokenizer()
    trainer.processing_class.bos_token, trainer.processing_class.eos_token = "[CLS]", "[SEP]"
    assert trainer.model.config.eos_token_id is None
    calls = []
    with precomputed(trainer, cache_dir=tmp_path / "cache") as report:
        attention = trainer.model.bert.encoder.layer[0].attention
        attention.register_forward_pre_hook(lambda module, args: calls.append(args))
        trainer.model.config.update({"note": "not a weight"})  # weights are what is compared when a training begins
        trainer.train()
    assert trainer.model.config.eos_token_id == trainer.processing_class.eos_token_id is not None
    assert (report.reused, calls) == (False, [])
    assert "goes on through the layers" not in caplog.text
    del trainer.model.config.note
    assert run(trainer, tmp_path).reused


@pytest.mark.parametrize("n", [HEAD, TOP])
@pytest.mark.parametrize("eval_batches", [0, 2])
def test_range_test_inside(tmp_path, n, eval_batches):
    curves = []
    for cached in (False, True):
        trainer = make_trainer(tmp_path / str(cached), n)
        with precomputed(trainer, cache_dir=tmp_path / "cache") if cached else nullcontext():
            curves.append(lr_range_test(trainer, num_steps=20, end_lr=1.0, eval_batches=eval_batches))
            trainer.train()
            curves.append(outcome(trainer))
    assert curves[2].losses == pytest.approx(curves[0].losses, rel=1e-5)
    assert_same_numbers(curves[3], curves[1])


def test_several_trainings_inside(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    with precomputed(trainer, cache_dir=tmp_path / "cache"):
        trainer.train()
        trainer.train()
    assert "goes on through the layers" not in caplog.text


@pytest.mark.parametrize("n", [HEAD, TOP])
def test_rows_that_were_not_precomputed_go_through_the_layers(tmp_path, n):
    trainer, others = make_trainer(tmp_path, n), ragged_rows(9, seed=5)
    expected = trainer.predict(others).predictions
    with precomputed(trainer, cache_dir=tmp_path / "cache"):
        assert trainer.evaluate()["eval_loss"] > 0
        assert (trainer.predict(others).predictions == expected).all()
        assert trainer.evaluate(others)["eval_loss"] > 0


# ---- Refused -------------------------------------------------------------------------------------------------------


def augment(trainer):
    def collate(rows):
        batch = pad_rows(rows)
        batch["input_ids"][:, 1] = torch.randint(5, 60, (len(rows),))
        return batch

    trainer.data_collator = collate


def draw_for_one_row(trainer):
    rows = trainer.train_dataset

    def collate(some):
        batch = pad_rows(some)
        for place, row in enumerate(some):
            if row["input_ids"] is rows[17]["input_ids"]:
                batch["input_ids"][place, 1] = int(torch.randint(5, 10**6, ())) % 60
        return batch

    trainer.data_collator = collate


def draw_labels(trainer):
    trainer.data_collator = lambda rows: {**pad_rows(rows), "labels": torch.randint(3, (len(rows),))}


def noise_in_the_embeddings(trainer):
    trainer.args.neftune_noise_alpha = 5.0


def without_some_layers(trainer):
    tiny = dict(vocab_size=64, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=4, num_attention_heads=2)
    config = OPTConfig(**tiny, ffn_dim=32, max_position_embeddings=64, layerdrop=0.5)
    trainer.model = OPTForSequenceClassification(config)
    freeze_to(trainer.model, TOP)


def read_lower_layers(trainer):
    loss_of_hidden_states(1)(trainer)
    trainer.evaluate()  # in a first forward pass transformers adds the hooks that note hidden states


def require_labels(trainer):
    own = trainer.model.forward
    trainer.model.forward = lambda input_ids, attention_mask, labels: own(input_ids, attention_mask, labels=labels)


def lose_nothing(trainer):
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs["no such"]


def mask_in_four_dimensions(trainer):
    def collate(rows):
        batch = pad_rows(rows)
        return {**batch, "attention_mask": batch["attention_mask"][:, None, None].float()}

    trainer.data_collator = collate


def empty_row(trainer):
    tiny = dict(vocab_size=64, n_positions=32, n_embd=16, n_layer=4, n_head=2, pad_token_id=0, num_labels=3)
    trainer.model = GPT2ForSequenceClassification(GPT2Config(**tiny))
    freeze_to(trainer.model, TOP)
    trainer.train_dataset = [*trainer.train_dataset, {"input_ids": [], "labels": 1}]


def stream(trainer):
    trainer.args.max_steps = 10
    trainer.train_dataset = hub_rows(trainer.train_dataset).to_iterable_dataset()


def thaw_all(trainer):
    freeze_to(trainer.model, 0)


def remake(trainer):
    trainer.model_init = tiny_bert


def skip_connection(trainer):
    layers, seen = trainer.model.bert.encoder.layer, {}
    layers[0].attention.register_forward_hook(lambda module, args, output: seen.update(hidden=args[0]))
    layers[3].register_forward_hook(lambda module, args, output: output + seen.pop("hidden", 0))


def without_a_mask(trainer):
    trainer.data_collator = lambda rows: {name: v for name, v in pad_rows(rows).items() if name != "attention_mask"}


def evaluate_in_bfloat16(trainer):
    trainer.args.bf16_full_eval = True


def evaluate_in_float16(trainer):
    trainer.args.fp16_full_eval = True


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (without_a_mask, "pads rows of 3 tokens to 16 without an attention_mask"),
        (evaluate_in_bfloat16, "change the frozen weights for an evaluation"),
        (evaluate_in_float16, "change the frozen weights for an evaluation"),
        (augment, "another batch for the same rows"),
        (draw_for_one_row, "another batch for the same rows"),
        (draw_labels, "another batch for the same rows"),
        (noise_in_the_embeddings, "NEFTune adds noise"),
        (without_some_layers, "LayerDrop leaves whole layers out"),
        (read_lower_layers, "or the loss reads more"),
        (require_labels, "does not run on single rows or without labels: .*missing 1 required .* 'labels'"),
        (lose_nothing, "gives no loss for a few rows in eval mode: 'no such'"),
        (mask_in_four_dimensions, "no input_ids and attention_mask of the shape"),
        (empty_row, "GPT2ForSequenceClassification does not run on single rows"),
        (stream, "a length"),
        (thaw_all, "No block of layers is frozen below what trains"),
        (remake, "model_init makes a new model"),
        (skip_connection, "gives other numbers from activations at bert.encoder.layer.1"),
    ],
)
def test_what_cannot_be_precomputed_is_said_and_trains_normally(tmp_path, change, line):
    trainer = make_trainer(tmp_path, plain=True)
    change(trainer)
    before = state_of(trainer)
    with pytest.raises(CannotPrecompute, match=line) as error, precomputed(trainer, cache_dir=tmp_path / "cache"):
        pass
    assert "\n" not in str(error.value)
    assert state_of(trainer) == before


@pytest.mark.parametrize("n", [HEAD, TOP])
def test_rows_of_one_width_need_no_mask(tmp_path, n):
    def change(trainer):
        trainer.train_dataset = [{**row, "input_ids": row["input_ids"][:3]} for row in trainer.train_dataset]
        trainer.eval_dataset = [{**row, "input_ids": row["input_ids"][:3]} for row in trainer.eval_dataset]
        without_a_mask(trainer)

    compare(tmp_path, n, change=change)


def test_a_folder_that_cannot_be_is_said_in_a_line(tmp_path):
    (tmp_path / "file").touch()
    trainer = make_trainer(tmp_path / "run")
    before = state_of(trainer)
    line = "could not be computed and kept in .*file/cache: .*Not a directory"
    with pytest.raises(CannotPrecompute, match=line) as error, precomputed(trainer, cache_dir=tmp_path / "file/cache"):
        pass
    assert "\n" not in str(error.value)
    assert state_of(trainer) == before


def test_a_disk_that_fills_up_is_said_in_a_line_and_left_as_it_was(tmp_path, monkeypatch):
    def full(self, *more):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = make_trainer(tmp_path / "run", HEAD)
    to_come = [names_from(trainer.model, TOP)]
    with monkeypatch.context() as patch:
        patch.setattr(activation_store.Entry, "write", full)
        with (
            pytest.raises(CannotPrecompute, match="No space left on device") as error,
            precomputed(trainer, cache_dir=tmp_path / "cache", to_come=to_come),
        ):
            pass
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []
    assert not run(trainer, tmp_path).reused


def test_a_streamed_evaluation_set_goes_through_the_layers(tmp_path):
    def change(trainer):
        trainer.eval_dataset = datasets.Dataset.from_list(ragged_rows(12, seed=1)).to_iterable_dataset()

    compare(tmp_path, HEAD, plain=True, change=change)


def test_size_and_break_even_are_said_before_it_starts(tmp_path, caplog):
    report = run(make_trainer(tmp_path), tmp_path)
    tokens = sum(len(row["input_ids"]) for row in ragged_rows() + ragged_rows(12, seed=1))
    assert report.nbytes == tokens * 16 * 4
    assert report.break_even_epochs > 0
    assert "for 52 rows: 0.0 MiB of float32 (sequences)" in caplog.text
    assert "epochs" in caplog.text


def test_break_even_counts_the_dropout_of_the_frozen_layers_and_leaves_no_trace(tmp_path):
    """Plain training runs them with it; a head with batch statistics would notice the trials."""
    model = tiny_bert()
    model.classifier = torch.nn.Sequential(torch.nn.BatchNorm1d(16), model.classifier)
    trainer = make_trainer(tmp_path, model=model)
    modes = []
    inner = model.bert.encoder.layer[0].output
    hook = inner.register_forward_pre_hook(lambda layer, args: modes.append(layer.training))
    buffers, numbers = [buffer.clone() for buffer in model.buffers()], torch.get_rng_state()
    run(trainer, tmp_path)
    hook.remove()
    assert modes.count(True) == 2  # one step, which is taken twice to be timed
    assert all(torch.equal(now, before) for now, before in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), numbers)


@pytest.mark.parametrize("n", [HEAD, TOP])
def test_padding_on_the_left(tmp_path, n):
    """As decoders are padded; they read the last token."""
    tiny = dict(vocab_size=64, n_positions=32, n_embd=16, n_layer=4, n_head=2, pad_token_id=0, num_labels=3)

    def left(rows):
        batch = pad_rows(rows)
        shifts = (batch["attention_mask"] == 0).sum(1).tolist()
        moved = {
            k: torch.stack([row.roll(s) for row, s in zip(batch[k], shifts, strict=True)])
            for k in ("input_ids", "attention_mask")
        }
        return {**batch, **moved, "position_ids": (moved["attention_mask"].cumsum(1) - 1).clamp_min(0)}

    def trained(cache):
        torch.manual_seed(0)
        model = GPT2ForSequenceClassification(GPT2Config(**tiny, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        trainer = make_trainer(tmp_path, n, model=model, optim="sgd", learning_rate=0.1)
        trainer.data_collator = left
        with precomputed(trainer, cache_dir=cache) if cache else nullcontext():
            trainer.train()
        return outcome(trainer)

    # The bias of a key has no gradient but for rounding, which Adam makes steps of.
    assert_same_numbers(trained(tmp_path / "cache"), trained(None), 1e-4)


def test_a_head_that_reads_padding_is_found_out(tmp_path):
    """BERT reads the first place of a row, which is padding where a batch is padded on the left."""
    trainer = make_trainer(tmp_path, HEAD)
    trainer.data_collator = lambda rows: {k: v.flip(1) if v.dim() == 2 else v for k, v in pad_rows(rows).items()}
    with (
        pytest.raises(CannotPrecompute, match="gives other numbers from activations"),
        precomputed(trainer, cache_dir=tmp_path / "cache"),
    ):
        pass


def report_of(tmp_path, n=HEAD, change=lambda trainer: None):
    trainer = make_trainer(tmp_path / "run", n)
    change(trainer)
    with precomputed(trainer, cache_dir=tmp_path / "cache") as report:
        return report


def test_another_head_and_other_labels_find_it_again(tmp_path):
    report_of(tmp_path)

    def other_head(trainer):
        with torch.no_grad():
            trainer.model.classifier.weight += 1
        trainer.train_dataset = [{**row, "labels": 0} for row in trainer.train_dataset]

    assert report_of(tmp_path, change=other_head).reused


def test_an_interrupted_pass_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(activation_store, "ROWS_IN_A_PART", 10)
    written = stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        report_of(tmp_path)
    written.clear()
    assert not report_of(tmp_path).reused
    assert written == [2, 3, 0, 1]  # the rest of the four parts of 40 training rows, and the two of 12 others


def test_an_interrupted_pass_goes_on_where_the_disk_holds_no_more_than_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(activation_store, "ROWS_IN_A_PART", 10)
    stop_after(3, monkeypatch)  # of four parts of the training rows, the shortest in the last
    with pytest.raises(KeyboardInterrupt):
        report_of(tmp_path, TOP)
    lengths = [sorted(len(row["input_ids"]) for row in rows) for rows in (ragged_rows(), ragged_rows(12, seed=1))]
    rest = (sum(lengths[0][:10]) + sum(lengths[1])) * 16 * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1.1 * rest}))
    assert not report_of(tmp_path, TOP).reused


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
    for said in (rank["full"] for rank in ranks):  # the disk of the second one
        assert said.endswith("[Errno 28] No space left on device")
    for said in (rank["random"] for rank in ranks):  # the collator of the second one
        assert said.startswith("The collator gives another batch")
