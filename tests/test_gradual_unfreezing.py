import copy
import gc
import json
import weakref

import pytest
import torch
from tiny import tiny_bert, token_rows
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from unfreezing_runs import LETTERS, Watch, trainer_of, watched

from ulmfit_tools.callbacks import GradualUnfreezing, LogGroupRates, StopWhenOverfit
from ulmfit_tools.errors import InputError
from ulmfit_tools.evaluations import best_step
from ulmfit_tools.freezing import freeze_to, unfreeze
from ulmfit_tools.gradual_unfreezing import undo_unfreezing
from ulmfit_tools.layers import layer_groups
from ulmfit_tools.trainer import ULMFiTTrainer, ULMFiTTrainingArguments

# ---- Which layers train, and when ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({}, ["h"] * 3 + ["3h"] * 3 + ["23h"] * 3 + ["123h"] * 3),
        ({"every": 0.5}, ["h"] * 2 + ["3h"] + ["23h"] * 2 + ["123h"] + ["0123h"] * 2 + ["e0123h"] * 4),
        ({"start": 3, "groups_per_stage": 2}, ["23h"] * 3 + ["0123h"] * 3 + ["e0123h"] * 6),
        ({"by": "step", "every": 5}, ["h"] * 5 + ["3h"] * 5 + ["23h"] * 2),
        ({"by": "fraction"}, ["h", "h", "3h", "3h", "23h", "23h", "123h", "123h", "0123h", "0123h"] + ["e0123h"] * 2),
        ({"by": "fraction", "every": 0.5, "groups_per_stage": 2}, ["h"] * 6 + ["23h"] * 6),
        ({"order": "chain_thaw", "by": "step", "every": 2}, [g for g in ["h", *"e0123"] for _ in (0, 1)]),
        ({"num_groups": 2}, ["h"] * 3 + ["e0123h"] * 9),
        ({"start": 6}, ["e0123h"] * 12),
    ],
)  # fmt: skip
def test_the_groups_that_train_in_each_step(tmp_path, settings, trained):
    _, watch = watched(tmp_path, GradualUnfreezing(**settings))
    assert watch.trained == trained


def test_by_plateau_a_stage_lasts_until_the_metric_stops_improving(tmp_path):
    values = iter([0.5, 0.6, 0.55, 0.7, 0.7, 0.7])  # after steps 2, 4, 6, 8, 10, 12
    settings = {"by": "plateau", "metric": "accuracy", "greater_is_better": True}
    watch = Watch()
    trainer = trainer_of(tmp_path, GradualUnfreezing(**settings), watch, eval_strategy="steps", eval_steps=2)
    trainer.compute_metrics = lambda prediction: {"accuracy": next(values)}
    trainer.train()
    assert watch.trained == ["h"] * 6 + ["3h"] * 4 + ["23h"] * 2


def test_epochs_are_counted_as_trainer_counts_them(tmp_path):
    """Seven batches of which two are accumulated make four steps, the last one with a single batch."""
    rows = token_rows(28)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    trainer, watch = watched(tmp_path, GradualUnfreezing(), train_dataset=rows, **settings)
    assert trainer.state.global_step == 8
    assert watch.trained == ["h"] * 4 + ["3h"] * 4


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
def test_what_is_frozen_stays_as_it_is_and_what_is_thawed_moves(tmp_path, optim):
    settings = {"optim": optim, "weight_decay": 0.5, "adam_epsilon": 1e-8}
    trainer, watch = watched(tmp_path, GradualUnfreezing(every=1), **settings)  # ends with e and 0 frozen
    weights = {**watch.weights, 12: trainer.model.state_dict()}
    groups = layer_groups(trainer.model)
    for step, trained in enumerate(watch.trained):
        for name in dict(trainer.model.named_parameters()):
            moved = not torch.equal(weights[step][name], weights[step + 1][name])
            assert moved is (LETTERS[groups.index_of(name)] in trained) or never_moves(name), (step, name)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    with_state = {LETTERS[groups.index_of(names[id(p)])] for p in trainer.optimizer.optimizer.state}
    assert with_state == (set() if optim == "sgd" else set("123h"))


def never_moves(name):
    """The key's bias has no effect on attention: its gradient is rounding noise, or nothing."""
    return name.endswith("key.bias")


def test_afterwards_everything_is_as_trainable_as_before(tmp_path):
    model = tiny_bert()
    trainer, _ = watched(tmp_path, GradualUnfreezing(eval_mode_for_frozen=True), model=model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "train" not in vars(model)
    assert {module.training for module in model.train().modules()} == {True}
    trainer.train()  # a second run begins at the head again
    watch = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Watch))
    assert watch.trained[12:] == watch.trained[:12]


class Interrupt(TrainerCallback):
    """Ctrl-C in the fifth step, in which a block and the head train."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def interrupted(tmp_path, model, kind=Trainer):
    kinds = {Trainer: TrainingArguments, ULMFiTTrainer: ULMFiTTrainingArguments}
    settings = {"per_device_train_batch_size": 16, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    callbacks = [GradualUnfreezing(eval_mode_for_frozen=True), Interrupt()]
    trainer = kind(model, kinds[kind](str(tmp_path), **settings), train_dataset=token_rows(48), callbacks=callbacks)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_an_interrupted_ulmfit_trainer_leaves_the_model_as_it_was(tmp_path):
    model = tiny_bert()
    model.bert.pooler.dense.bias.requires_grad_(False)
    before = flags(model)
    interrupted(tmp_path, model, ULMFiTTrainer)
    assert flags(model) == before
    assert "train" not in vars(model)
    assert all(module.training for module in model.modules())


def test_a_plain_trainer_made_after_an_interrupted_one_trains_all_layers(tmp_path):
    """The same cells of a notebook again: the optimizer is made before anything is thawed in mid-run."""
    model = tiny_bert()
    interrupted(tmp_path, model)
    assert not all(flags(model).values())  # nothing tells a callback of an exception
    _, watch = watched(tmp_path, GradualUnfreezing(), model=model)
    assert watch.trained[0] == "h"
    assert watch.trained[-1] == "123h"
    assert all(flags(model).values())
    assert "train" not in vars(model)


def test_a_model_can_be_freed_by_hand_after_an_interrupt(tmp_path):
    model = tiny_bert()
    interrupted(tmp_path, model)
    undo_unfreezing(model)
    assert all(flags(model).values())
    assert "train" not in vars(model)
    freeze_to(model, -1)
    undo_unfreezing(model)
    assert not any(parameter.requires_grad for parameter in model.bert.encoder.parameters())


def test_a_callback_that_was_interrupted_serves_another_model(tmp_path):
    callback = GradualUnfreezing()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path, callback, Interrupt()).train()
    other = tiny_bert(num_hidden_layers=2)
    trainer_of(tmp_path, callback, model=other, num_train_epochs=1).train()
    assert all(flags(other).values())


def test_an_interrupted_model_is_not_kept_alive(tmp_path):
    model = tiny_bert()
    interrupted(tmp_path, model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_run_that_follows_one_that_raised_begins_anew(tmp_path):
    class Raise(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyError("the fifth step never comes")

    watch, stop = Watch(), Raise()
    trainer = trainer_of(tmp_path, GradualUnfreezing(eval_mode_for_frozen=True), LogGroupRates(), watch, stop)
    with pytest.raises(KeyError):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.train()
    assert watch.trained == ["h"] * 3 + ["3h"] + ["h"] * 3 + ["3h"] * 3 + ["23h"] * 3 + ["123h"] * 3
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert "train" not in vars(trainer.model)


def test_groups_that_the_run_is_too_short_for_are_named(tmp_path, caplog):
    watched(tmp_path, GradualUnfreezing())
    assert "These 12 steps reach stage 4 of 6; never thawed: embeddings, layer.0" in caplog.text


# ---- Frozen layers in eval mode ------------------------------------------------------------------------------------


def test_frozen_layers_sleep_and_wake(tmp_path):
    _, watch = watched(tmp_path, GradualUnfreezing(eval_mode_for_frozen=True), eval_strategy="epoch")
    assert watch.sleeping == ["e0123"] * 3 + ["e012"] * 3 + ["e01"] * 3 + ["e0"] * 3
    _, watch = watched(tmp_path, GradualUnfreezing())
    assert watch.sleeping == [""] * 12


def test_frozen_layers_without_dropout_give_the_same_losses_as_a_model_that_has_none_there(tmp_path):
    """While only the head trains, switching the frozen layers' dropout off in the config is the same."""
    without, with_dropout = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), tiny_bert()
    for model in (without, with_dropout):
        model.dropout.p = 0.0
    by = {"by": "step", "every": 99}
    plain, _ = watched(tmp_path / "a", GradualUnfreezing(**by), model=without)
    asleep, _ = watched(tmp_path / "b", GradualUnfreezing(**by, eval_mode_for_frozen=True), model=with_dropout)
    dropping, _ = watched(tmp_path / "c", GradualUnfreezing(**by), model=tiny_bert())
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (plain, asleep, dropping)]
    assert losses[0] == losses[1] != losses[2]


# ---- Resuming ------------------------------------------------------------------------------------------------------

RESUMED = {
    "epoch": {"by": "epoch", "eval_mode_for_frozen": True},
    "step": {"by": "step", "every": 2, "warmup_steps": 3},
    "fraction": {"by": "fraction"},
    "plateau": {"by": "plateau"},
    "chain_thaw": {"by": "step", "every": 2, "order": "chain_thaw"},
    "best": {"by": "step", "every": 3, "restore_best": True},
    "plateau_best": {"by": "plateau", "restore_best": True, "eval_mode_for_frozen": True},
}


@pytest.mark.parametrize(
    ("kind", "optim"),
    [
        *((kind, "adamw_torch") for kind in RESUMED),
        ("step", "adamw_torch_fused"),
        ("plateau_best", "adamw_torch_fused"),
    ],
)
def test_a_run_resumed_at_any_step_ends_with_the_same_weights(tmp_path, kind, optim):
    settings = {
        "optim": optim, "factory": True, "num_train_epochs": 3, "learning_rate": 0.05,
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
    }  # fmt: skip
    whole, watch = watched(tmp_path, GradualUnfreezing(**RESUMED[kind]), **settings)
    assert len(set(watch.trained)) > 2
    for step in (1, 3, 6, 8):
        resume = str(tmp_path / f"checkpoint-{step}")
        resumed, rest = watched(
            tmp_path, GradualUnfreezing(**RESUMED[kind]), resume=resume, **settings | {"save_strategy": "no"}
        )
        assert (rest.steps, rest.trained) == (watch.steps[step:], watch.trained[step:])
        assert rest.sleeping == watch.sleeping[step:]
        assert rest.rates == watch.rates[step:]
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, resumed.model.state_dict()[name]), (step, name)


def adam_averages(model, optimizer):
    """Adam's first moments by the name of the parameter that they are kept for."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: values["exp_avg"].clone() for p, values in optimizer.optimizer.state.items()}


@pytest.mark.parametrize("factory", [False, True])
def test_resuming_with_another_order_keeps_every_state_with_its_layer(tmp_path, factory):
    """Failures B and C: the optimizer holds all layers from the start, so its groups never change."""
    loaded = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            loaded.update(adam_averages(model, optimizer))

    settings = {"factory": factory, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 6}
    first, _ = watched(tmp_path, GradualUnfreezing(), num_train_epochs=2, **settings)
    before = adam_averages(first.model, first.optimizer)
    assert {LETTERS[layer_groups(first.model).index_of(name)] for name in before} == set("3h")
    watch = Watch()
    otherwise = GradualUnfreezing(by="step", every=1, order="chain_thaw")  # in step 6 everything trains
    trainer = trainer_of(tmp_path, otherwise, Look(), watch, max_steps=7, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert watch.trained == ["e0123h"]
    assert loaded.keys() == before.keys()
    assert all(torch.equal(average, before[name]) for name, average in loaded.items())


@pytest.mark.parametrize("kind", ["epoch", "plateau_best"])
def test_the_packages_own_trainer_resumes_it_too(tmp_path, kind):
    """The step that ends an epoch is saved before the epoch's evaluation, which the resumed run must not miss."""
    args = ULMFiTTrainingArguments(
        str(tmp_path), num_train_epochs=4, per_device_train_batch_size=16, learning_rate=0.05, use_cpu=True,
        report_to=[], disable_tqdm=True, logging_steps=1, eval_strategy="epoch", save_steps=1, save_total_limit=0,
    )  # fmt: skip

    def run(resume=None):
        watch = Watch()
        trainer = ULMFiTTrainer(
            tiny_bert(), args, train_dataset=token_rows(48), eval_dataset=token_rows(32, seed=1),
            callbacks=[GradualUnfreezing(**RESUMED[kind]), watch],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict(), watch

    whole, watch = run()
    for step in (9, 6, 5):  # from the last one down: the runs write over the checkpoints after it
        weights, rest = run(str(tmp_path / f"checkpoint-{step}"))
        assert rest.trained == watch.trained[step:]
        assert all(torch.equal(tensor, whole[name]) for name, tensor in weights.items()), step


def test_nothing_is_left_in_checkpoints_but_what_trainer_writes(tmp_path):
    """The scheduler and the optimizer know nothing of the warm-up, and no callback state must be restored."""
    settings = {"factory": True, "save_strategy": "steps", "save_steps": 5}
    for folder, warmup_steps in (("with", 4), ("without", 0)):
        unfreezing = GradualUnfreezing(by="step", every=2, warmup_steps=warmup_steps)
        watched(tmp_path / folder, unfreezing, **settings)
    rates = [
        [group["lr"] for group in torch.load(tmp_path / folder / "checkpoint-5" / "optimizer.pt")["param_groups"]]
        for folder in ("with", "without")
    ]
    assert rates[0] == rates[1]
    scheduler = [torch.load(tmp_path / folder / "checkpoint-5" / "scheduler.pt") for folder in ("with", "without")]
    assert scheduler[0] == scheduler[1]
    state = json.loads((tmp_path / "with" / "checkpoint-5" / "trainer_state.json").read_text())
    assert set(state["stateful_callbacks"]) == {"TrainerControl"}


# ---- Layers that would never train ---------------------------------------------------------------------------------


class NaiveUnfreezing(TrainerCallback):
    """What many write: freeze before `train()`, set `requires_grad` in a callback."""

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        if state.epoch >= 1:
            unfreeze(model)


def test_layers_frozen_before_a_plain_run_never_train_and_here_that_is_refused(tmp_path):
    """Failure A: `create_optimizer` leaves out what is frozen, and the thawed layers get gradients in vain."""
    model = tiny_bert()
    freeze_to(model, -1)
    before = copy.deepcopy(model.state_dict())
    trainer_of(tmp_path, NaiveUnfreezing(), model=model).train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    moved = {
        name.split(".")[1] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert moved == {"pooler", "weight", "bias"}  # the head and nothing else

    freeze_to(model, -1)
    with pytest.raises(InputError, match=r"holds none of 69 parameters that are to be thawed.*embeddings.*, frozen"):
        trainer_of(tmp_path, GradualUnfreezing(), model=model).train()


def test_the_optimizer_of_an_earlier_phase_is_refused(tmp_path):
    """Failure D: a second `train()` keeps the optimizer of the first, which lacks the layers thawed since."""
    model = tiny_bert()
    freeze_to(model, -1)
    trainer = trainer_of(tmp_path, model=model, max_steps=1)
    trainer.train()
    unfreeze(model)
    trainer.train()  # silently goes on with the head alone
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == 4
    trainer.add_callback(GradualUnfreezing())
    with pytest.raises(InputError, match="holds none of 69"):
        trainer.train()


def test_an_optimizer_that_holds_everything_makes_freezing_beforehand_harmless(tmp_path):
    model = tiny_bert()
    freeze_to(model, -1)
    _, watch = watched(tmp_path, GradualUnfreezing(), model=model, factory=True)
    assert watch.trained == ["h"] * 3 + ["3h"] * 3 + ["23h"] * 3 + ["123h"] * 3
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 4  # as before


# ---- PEFT ----------------------------------------------------------------------------------------------------------


# PEFT 0.21 reads a property that transformers 5.23 has deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("factory", [False, True])
def test_adapters_are_thawed_by_depth(tmp_path, factory):
    """Stages go over the groups that hold adapters: blocks 1 to 3 and the head."""
    import peft

    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], layers_to_transform=[1, 2, 3])
    model = peft.get_peft_model(tiny_bert(), config)
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}

    class Names(TrainerCallback):
        trained = []

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            names = [name for name, p in model.named_parameters() if p.grad is not None]
            assert all("lora_" in name or "classifier.modules_to_save" in name for name in names)
            blocks = {name.split("layer.")[1][0] if "layer." in name else "h" for name in names}
            self.trained.append("".join(sorted(blocks)))

    trainer_of(tmp_path, GradualUnfreezing(), Names(), model=model, factory=factory).train()
    assert Names.trained == ["h"] * 3 + ["3h"] * 3 + ["23h"] * 3 + ["123h"] * 3
    Names.trained.clear()
    assert all(torch.equal(dict(model.named_parameters())[name], tensor) for name, tensor in base.items())


# ---- Warm-up of thawed groups --------------------------------------------------------------------------------------


def test_a_thawed_group_warms_up_from_its_own_start(tmp_path):
    settings = {"factory": True, "lr_scheduler_type": "constant", "weight_decay": 0.0}
    trainer, watch = watched(tmp_path, GradualUnfreezing(by="step", every=4, warmup_steps=3), **settings)
    names = [group["name"] for group in trainer.optimizer.param_groups]
    full = [group["lr"] for group in trainer.optimizer.param_groups]
    shares = [[rate / whole for rate, whole in zip(rates, full, strict=True)] for rates in watch.rates]
    assert names == ["embeddings", "layer.0", "layer.1", "layer.2", "layer.3", "head"]
    assert [share[5] for share in shares] == [1] * 12  # the head trains from the start
    assert [share[4] for share in shares][4:] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1])
    assert [share[3] for share in shares][8:] == pytest.approx([1 / 3, 2 / 3, 1, 1])


@pytest.mark.parametrize("scheduler", ["linear", "cosine_with_restarts", "inverse_sqrt"])
def test_warm_up_leaves_the_schedule_alone(tmp_path, scheduler):
    settings = {"factory": True, "lr_scheduler_type": scheduler, "warmup_steps": 2}
    after = []
    for warmup_steps in (0, 5):
        trainer, _ = watched(tmp_path, GradualUnfreezing(by="step", every=2, warmup_steps=warmup_steps), **settings)
        after.append([e["learning_rate"] for e in trainer.state.log_history if "loss" in e])
    assert after[0] == after[1]


def test_warm_up_with_a_schedule_that_goes_on_from_the_last_rate(tmp_path):
    """ExponentialLR multiplies the rate that it finds in the group, so a rate left behind would stay in it."""
    model = tiny_bert()
    groups = [{"params": group.parameters(model), "name": group.name} for group in layer_groups(model)]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    watch = Watch()
    trainer = trainer_of(tmp_path, GradualUnfreezing(by="step", every=2, warmup_steps=3), watch, model=model)
    trainer.optimizer, trainer.lr_scheduler = optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    trainer.train()
    assert [rates[5] for rates in watch.rates] == pytest.approx([0.01 * 0.5**step for step in range(12)])
    block = [rates[4] for rates in watch.rates][2:]
    assert block == pytest.approx([0.01 * 0.5**step * min(1, (step - 1) / 3) for step in range(2, 12)])


def test_warm_up_wants_optimizer_groups_that_do_not_mix_layers(tmp_path):
    with pytest.raises(InputError, match=r"discriminative_optimizer\(args\).*optimizer group 0 with parameters of 6"):
        trainer_of(tmp_path, GradualUnfreezing(warmup_steps=2)).train()


# ---- Best weights between stages -----------------------------------------------------------------------------------


def test_each_stage_begins_from_the_best_weights_so_far(tmp_path):
    values = [0.5, 0.9, 0.7, 0.6, 0.8, 0.95]  # after steps 2, 4, ..., 12; the stages begin at 0, 6 and 12
    watch, left = Watch(), iter(values)
    unfreezing = GradualUnfreezing(
        by="step", every=6, groups_per_stage=3, restore_best=True, metric="accuracy", greater_is_better=True
    )
    trainer = trainer_of(
        tmp_path, unfreezing, watch, eval_strategy="steps", eval_steps=2, num_train_epochs=5, learning_rate=0.05
    )
    trainer.compute_metrics = lambda prediction: {"accuracy": next(left, 0.0)}
    trainer.train()
    at = watch.weights
    assert best_step(trainer.state.log_history, metric="accuracy", greater_is_better=True) == 12
    same = [
        all(torch.equal(at[a][name], at[b][name]) for name in at[a]) for a, b in ((6, 4), (6, 5), (12, 4), (12, 11))
    ]
    assert same == [True, False, False, False]  # 6 goes back to 4; 12 is itself the best
    assert [path.name for path in (tmp_path / "_best-weights").iterdir()] == ["step-000000012.safetensors"]


def test_best_weights_are_kept_for_each_checkpoint_that_is_left(tmp_path):
    left = iter([0.5, 0.9, 0.7, 0.6, 0.95, 0.8, 0.99])
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}
    unfreezing = GradualUnfreezing(restore_best=True, metric="accuracy", greater_is_better=True)
    trainer = trainer_of(tmp_path, unfreezing, num_train_epochs=5, **settings)
    trainer.compute_metrics = lambda prediction: {"accuracy": next(left, 0.0)}
    trainer.train()
    kept = sorted(int(path.stem[5:]) for path in (tmp_path / "_best-weights").iterdir())
    assert kept == [2, 4, 10, 14]  # of checkpoint 3; of 6 and 9; of 12; the best


def test_best_weights_that_are_gone_are_missed(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 0.5,
    }
    unfreezing = {"by": "step", "every": 4, "restore_best": True}
    trainer, _ = watched(tmp_path / "here", GradualUnfreezing(**unfreezing), num_train_epochs=1, **settings)
    checkpoint = tmp_path / "here" / "checkpoint-3"
    assert best_step(trainer.state.log_history) < 3
    with pytest.raises(InputError, match=r'put back the file. Received: ".*elsewhere._best-weights.step-00000000\d'):
        watched(tmp_path / "elsewhere", GradualUnfreezing(**unfreezing), resume=str(checkpoint), **settings)


# ---- What cannot work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"by": "epochs"}, r'epoch, step, fraction, plateau. Received: by="epochs". Did you mean "epoch"\?'),
        ({"order": "chain-thaw"}, r'top_down, chain_thaw. Received: order="chain-thaw". Did you mean "chain_thaw"\?'),
        ({"by": "step"}, "needs the number of steps"),
        ({"every": 0}, "must be positive.* Received: every=0"),
        ({"by": "step", "every": 1.5}, "Received: every=1.5"),
        ({"by": "plateau", "every": 0.5}, "Received: every=0.5"),
        ({"warmup_steps": -1}, "Received: warmup_steps=-1"),
    ],
)
def test_settings_that_are_impossible(settings, line):
    with pytest.raises(InputError, match=line):
        GradualUnfreezing(**settings)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"start": 7}, "from 1 to 6 groups. Received: start=7"),
        ({"num_groups": 7}, "num_groups"),
        ({"by": "plateau"}, r'need evaluations. Received: eval_strategy="no"'),
        ({"restore_best": True}, r'need evaluations. Received: eval_strategy="no"'),
    ],
)
def test_settings_that_do_not_fit_the_run(tmp_path, settings, line):
    with pytest.raises(InputError, match=line):
        trainer_of(tmp_path, GradualUnfreezing(**settings)).train()


def test_a_stream_has_no_epochs(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from token_rows(48)

    with pytest.raises(InputError, match="A stream has no epochs"):
        trainer_of(tmp_path, GradualUnfreezing(), train_dataset=Stream(), max_steps=6).train()
    _, watch = watched(tmp_path, GradualUnfreezing(by="fraction", every=0.5), train_dataset=Stream(), max_steps=6)
    assert watch.trained == ["h"] * 3 + ["3h"] * 3


@pytest.mark.parametrize(
    "callback", [GradualUnfreezing(by="plateau", metric="acuracy"), StopWhenOverfit(metric="acuracy")]
)
def test_a_metric_that_no_evaluation_has(tmp_path, callback):
    with pytest.raises(InputError, match='No evaluation has the metric "acuracy"; there are eval_loss'):
        trainer_of(tmp_path, callback, eval_strategy="epoch").train()


def test_a_metric_of_one_of_several_validation_sets(tmp_path):
    callbacks = [GradualUnfreezing(by="plateau", metric="eval_second_loss"), StopWhenOverfit(metric="second_loss")]
    trainer = trainer_of(tmp_path, *callbacks, eval_strategy="epoch")
    trainer.eval_dataset = {"first": token_rows(8, seed=1), "second": token_rows(8, seed=2)}
    trainer.train()
    assert any("eval_second_loss" in entry for entry in trainer.state.log_history)
