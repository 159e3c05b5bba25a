import inspect
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import peft
import pytest
import torch
from runs import STEPS_PER_EPOCH, KillAt, Killed, copy_until, differences, make_trainer, outcome
from safetensors.torch import load_file
from test_checkpoints import damage
from tiny import tiny_bert
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from ulmfit_tools import checkpoints
from ulmfit_tools.best_weights import weights_file
from ulmfit_tools.checkpoints import CheckpointError, list_checkpoints, step_of, verify
from ulmfit_tools.trainer import TrainingInterrupted, optimizer_of_arguments

# Kinds of runs: what is set, and after how many steps it is over.
KINDS = {
    "evaluated by epoch": {},
    "best by steps": {
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_steps": 5,
        "load_best_model_at_end": True,
        "logging_steps": 4,
    },
    "gradient accumulation": {"gradient_accumulation_steps": 3, "logging_strategy": "epoch"},
    "cut short by max_steps": {"max_steps": 13},
    "part of an epoch": {"num_train_epochs": 1.5, "logging_steps": 4},
    "saved when best": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "best",
        "metric_for_best_model": "loss",
        "logging_strategy": "epoch",
    },
    "a worker": {"dataloader_num_workers": 1},
    "mixed precision": {"bf16": True, "activation_checkpointing": True},
    "one-cycle": {"lr_scheduler_type": "one_cycle", "optim": "sgd"},
    "sgdr, random order": {"lr_scheduler_type": "sgdr", "train_sampling_strategy": "random"},
    "trainer's schedule, evaluated at the start": {"lr_scheduler_type": "cosine", "eval_on_start": True},
}


@pytest.fixture(scope="module", params=KINDS)
def whole_run(request, tmp_path_factory):
    """An uninterrupted run with all its checkpoints, its outcome and its settings."""
    folder, settings = tmp_path_factory.mktemp("whole"), KINDS[request.param]
    trainer = make_trainer(folder, **settings)
    output = trainer.train()
    return folder, outcome(trainer), settings, output


def test_resumed_after_any_step_it_ends_the_same_to_the_bit(whole_run, tmp_path):
    """The first step, the middle of an epoch, an epoch's end and the last step among them; the folder has moved."""
    run, expected, settings, output = whole_run
    steps = [step_of(path) for path in list_checkpoints(run)]
    assert steps[-1] == expected["step"][0] or "save_strategy" in settings
    some = {steps[0], 7, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1, *steps[-2:]}
    for step in steps if settings == {} else some.intersection(steps):
        folder = copy_until(run, tmp_path / str(step), step)
        trainer = make_trainer(folder, **settings)
        resumed = trainer.train(resume_from_checkpoint=True)
        assert differences(expected, outcome(trainer)) == [], f"resumed from step {step}"
        assert resumed.training_loss == output.training_loss
        assert [step_of(path) for path in list_checkpoints(folder)] == steps
        best = trainer.state.best_model_checkpoint
        assert best is None or Path(best).parent == folder


@pytest.fixture(scope="module")
def run_by_fours(tmp_path_factory):
    """An uninterrupted run with a checkpoint after every fourth step, and its outcome."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(folder, save_steps=4)
    trainer.train()
    return folder, outcome(trainer)


class TestDamagedCheckpoints:
    """The newest checkpoint, of step 12, is damaged: the run goes on from step 8 and ends as if nothing had been."""

    @pytest.mark.parametrize("how", ["missing", "half", "empty", "bit"])
    @pytest.mark.parametrize(
        "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    )
    def test_goes_on_from_the_last_good_one(self, run_by_fours, tmp_path, caplog, name, how):
        run, expected = run_by_fours
        folder = copy_until(run, tmp_path / "run", 12)
        damage(folder / "checkpoint-12" / name, how)
        trainer = make_trainer(folder, save_steps=4)
        trainer.train(resume_from_checkpoint=True)
        assert f"Passed over {folder / 'checkpoint-12'}: {name}" in caplog.text
        assert differences(expected, outcome(trainer)) == []
        assert verify(folder / "checkpoint-12") == []

    def test_one_that_is_asked_for_by_name_is_refused(self, run_by_fours, tmp_path):
        folder = copy_until(run_by_fours[0], tmp_path / "run", 12)
        damage(folder / "checkpoint-12" / "scheduler.pt", "half")
        with pytest.raises(CheckpointError) as caught:
            make_trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-12"))
        assert "scheduler.pt has" in str(caught.value)
        assert str(caught.value).endswith(f"The last good checkpoint of this run is {folder / 'checkpoint-8'}.")

    def test_none_is_good(self, run_by_fours, tmp_path):
        folder = copy_until(run_by_fours[0], tmp_path / "run", 4)
        damage(folder / "checkpoint-4" / "optimizer.pt", "missing")
        with pytest.raises(CheckpointError, match=r"no whole checkpoint .* checkpoint-4: optimizer.pt is missing"):
            make_trainer(folder).train(resume_from_checkpoint=True)

    def test_there_is_none(self, tmp_path):
        with pytest.raises(CheckpointError, match="There is no whole checkpoint in"):
            make_trainer(tmp_path / "run").train(resume_from_checkpoint=True)

    def test_goes_on_from_one_of_plain_trainer_and_says_so(self, tmp_path, caplog):
        settings = {"optim": "adamw_torch", "lr_scheduler_type": "linear", "train_sampling_strategy": "random"}
        plain = make_trainer(tmp_path / "run", plain=True, save_steps=8, callbacks=[KillAt("on_save", 16)], **settings)
        with pytest.raises(Killed):
            plain.train()
        optimizer = plain.get_optimizer_cls_and_kwargs(plain.args)
        ours = make_trainer(tmp_path / "run", save_steps=8, **settings)
        ours.optimizer_cls_and_kwargs = optimizer
        ours.train(resume_from_checkpoint=True)
        assert "has no manifest" in caplog.text
        undisturbed = make_trainer(tmp_path / "other", plain=True, save_steps=8, **settings)
        undisturbed.train()
        assert differences(outcome(undisturbed)["weights"], outcome(ours)["weights"]) == []


class TestKilled:
    def resumes(self, folder, expected, **settings):
        trainer = make_trainer(folder, **settings)
        trainer.train(resume_from_checkpoint=True)
        assert differences(expected, outcome(trainer)) == []
        assert all(path.name.startswith("checkpoint-") for path in folder.iterdir())

    @pytest.mark.parametrize(
        ("event", "step"),
        [
            ("on_step_begin", 4),
            ("on_pre_optimizer_step", 9),
            ("on_step_end", 8),
            ("on_evaluate", 10),
            ("on_epoch_end", 10),
            ("on_epoch_begin", 10),
            ("on_save", 20),
            ("on_train_end", 20),
        ],
    )
    def test_at_any_event(self, tmp_path, run_by_fours, event, step):
        with pytest.raises(Killed):
            make_trainer(tmp_path / "run", save_steps=4, callbacks=[KillAt(event, step)]).train()
        self.resumes(tmp_path / "run", run_by_fours[1], save_steps=4)

    @pytest.mark.parametrize("moment", ["_save_scaler", "save_model", "_save_rng_state"])
    def test_while_a_checkpoint_is_written(self, tmp_path, run_by_fours, moment, monkeypatch):
        trainer = make_trainer(tmp_path / "run", save_steps=4)

        def die(*args, **kwargs):
            if trainer.state.global_step == 8:
                monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a dead process clears nothing up
                raise Killed
            return real(*args, **kwargs)

        real = getattr(trainer, moment)
        monkeypatch.setattr(trainer, moment, die)
        with pytest.raises(Killed):
            trainer.train()
        monkeypatch.undo()
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
            ".incomplete-checkpoint-8",
            "checkpoint-4",
        ]
        self.resumes(tmp_path / "run", run_by_fours[1], save_steps=4)

    def test_during_rotation(self, tmp_path, run_by_fours, monkeypatch):
        def die(folder):
            checkpoints._set_aside(Path(folder))
            raise Killed

        monkeypatch.setattr(checkpoints, "delete_folder", die)
        with pytest.raises(Killed):
            make_trainer(tmp_path / "run", save_steps=4, save_total_limit=2).train()
        monkeypatch.undo()
        names = [".deleted-checkpoint-4", "checkpoint-12", "checkpoint-8"]
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
        self.resumes(tmp_path / "run", run_by_fours[1], save_steps=4, save_total_limit=2)
        assert [step_of(path) for path in list_checkpoints(tmp_path / "run")] == [16, 20]

    def test_again_and_again(self, tmp_path, run_by_fours):
        for step in (2, 5, 9, 13, 14, 18):
            trainer = make_trainer(tmp_path / "run", save_steps=4, callbacks=[KillAt("on_step_end", step)])
            with pytest.raises(Killed):
                trainer.train(resume_from_checkpoint=(tmp_path / "run" / "checkpoint-4").exists())
        self.resumes(tmp_path / "run", run_by_fours[1], save_steps=4)

    def test_a_full_disk(self, tmp_path, run_by_fours, monkeypatch):
        trainer = make_trainer(tmp_path / "run", save_steps=4)

        def full(folder):
            if trainer.state.global_step == 12:
                raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

        monkeypatch.setattr(trainer, "_save_scaler", full)
        with pytest.raises(CheckpointError, match=r"checkpoint-12: it needs at least 0\.\d MB, and .* MB are free"):
            trainer.train()
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-4", "checkpoint-8"]
        self.resumes(tmp_path / "run", run_by_fours[1], save_steps=4)


class TestAnotherRunsFolder:
    """A run that starts afresh where another one has left its checkpoints, of steps 15 and 20."""

    @pytest.fixture
    def folder(self, tmp_path):
        make_trainer(tmp_path / "run", save_steps=5, save_total_limit=2, seed=1).train()
        return tmp_path / "run"

    def start(self, folder, killed_at):
        callbacks = [KillAt("on_step_begin", killed_at)]
        with pytest.raises(Killed):
            make_trainer(folder, save_steps=4, save_total_limit=2, callbacks=callbacks).train()

    def test_resumed_it_goes_on_with_its_own(self, folder, run_by_fours, caplog):
        self.start(folder, killed_at=6)
        aside = folder / "_earlier-run-1"
        assert f'give output_dir="{aside}" and resume_from_checkpoint=True' in caplog.text
        assert [step_of(path) for path in list_checkpoints(folder)] == [4]
        assert [(step_of(path), verify(path)) for path in list_checkpoints(aside)] == [(15, []), (20, [])]
        trainer = make_trainer(folder, save_steps=4, save_total_limit=2)
        trainer.train(resume_from_checkpoint=True)
        assert differences(run_by_fours[1], outcome(trainer)) == []

    def test_killed_before_its_first_checkpoint_there_is_none_to_resume(self, folder):
        self.start(folder, killed_at=2)
        with pytest.raises(CheckpointError, match="no whole checkpoint"):
            make_trainer(folder).train(resume_from_checkpoint=True)

    def test_the_other_run_can_go_on_from_where_it_is_now(self, folder):
        self.start(folder, killed_at=6)
        other = make_trainer(folder / "_earlier-run-1", save_steps=5, save_total_limit=2, seed=1, num_train_epochs=3)
        other.train(resume_from_checkpoint=True)
        assert [step_of(path) for path in list_checkpoints(folder / "_earlier-run-1")] == [25, 30]

    def test_the_other_run_is_not_pushed_to_the_hub(self, folder):
        """Without the underscore it would be: Trainer leaves out what begins so, or with "checkpoint-"."""
        aside = checkpoints.set_aside_run(folder)
        assert 'ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"]' in inspect.getsource(Trainer.push_to_hub)
        assert aside.name.startswith("_")
        assert weights_file(folder, 1).parent.name.startswith("_")  # nor are copies of this run's own weights

    def test_one_trainer_that_trains_twice(self, tmp_path):
        trainer = make_trainer(tmp_path, save_steps=5, save_total_limit=2)
        trainer.train()
        trainer.train()
        folders = (tmp_path, tmp_path / "_earlier-run-1")
        assert [[step_of(path) for path in list_checkpoints(folder)] for folder in folders] == [[15, 20]] * 2

    def test_a_run_that_goes_on_from_a_checkpoint_elsewhere(self, folder, run_by_fours, tmp_path):
        checkpoint = copy_until(run_by_fours[0], tmp_path / "elsewhere", 8) / "checkpoint-8"
        trainer = make_trainer(folder, save_steps=4, save_total_limit=2)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert [step_of(path) for path in list_checkpoints(folder)] == [16, 20]
        assert [step_of(path) for path in list_checkpoints(folder / "_earlier-run-1")] == [15, 20]

    def test_best_weights_of_unfreezing_go_with_its_checkpoints(self, tmp_path):
        make_trainer(tmp_path, save_steps=5).train()
        weights_file(tmp_path, 10).parent.mkdir()
        weights_file(tmp_path, 10).touch()
        assert checkpoints.set_aside_run(tmp_path) == tmp_path / "_earlier-run-1"
        assert weights_file(tmp_path / "_earlier-run-1", 10).is_file()
        assert checkpoints.set_aside_run(tmp_path) is None


class TestEarlyStopping:
    """A threshold that nothing meets: the first evaluation sets the best, two more end the run."""

    SETTINGS = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    }

    def trainer(self, folder, **settings):
        stopping = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=100.0)
        return make_trainer(folder, callbacks=[stopping], **(self.SETTINGS | settings))

    def test_stops_at_the_same_step_when_resumed_anywhere(self, tmp_path):
        whole = self.trainer(tmp_path / "whole")
        whole.train()
        assert whole.state.global_step == 6
        for step in (2, 4, 6):
            resumed = self.trainer(copy_until(tmp_path / "whole", tmp_path / str(step), step))
            resumed.train(resume_from_checkpoint=True)
            assert differences(outcome(whole), outcome(resumed)) == [], step

    def test_plain_trainer_trains_on_after_it(self, tmp_path):
        whole = self.trainer(tmp_path / "whole", plain=True)
        whole.train()
        assert whole.state.global_step == 6
        resumed = self.trainer(tmp_path / "whole", plain=True)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step > 6

    def test_more_epochs_are_trained_after_a_run_that_came_to_its_end(self, tmp_path):
        make_trainer(tmp_path, num_train_epochs=1, save_steps=5).train()
        trainer = make_trainer(tmp_path, num_train_epochs=2, save_steps=5)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 2 * STEPS_PER_EPOCH


class TestPlainTrainer:
    """What it does in the same places; these fail when upstream changes, and then ours can be made simpler."""

    def resumed(self, tmp_path, step, **settings):
        whole = make_trainer(tmp_path / "whole", plain=True, **settings)
        whole.train()
        trainer = make_trainer(copy_until(tmp_path / "whole", tmp_path / "part", step), plain=True, **settings)
        trainer.train(resume_from_checkpoint=True)
        return outcome(whole), outcome(trainer)

    def test_sees_other_rows_when_resumed_in_mid_epoch(self, tmp_path):
        expected, got = self.resumed(tmp_path, 13)
        assert differences(expected["weights"], got["weights"]) != []

    def test_takes_one_step_more_when_resumed_after_the_last(self, tmp_path):
        expected, got = self.resumed(tmp_path, 13, max_steps=13)
        assert (expected["step"][0], got["step"][0]) == (13, 14)

    def test_forgets_the_evaluation_of_an_epoch_when_resumed_from_its_last_step(self, tmp_path):
        expected, got = self.resumed(tmp_path, 10)
        evaluated = [[e["step"] for e in run["history"] if "eval_loss" in e] for run in (expected, got)]
        assert evaluated == [[10, 20], [20]]

    def test_loads_the_best_model_from_where_the_folder_was(self, tmp_path):
        settings = KINDS["best by steps"]
        make_trainer(tmp_path / "whole", plain=True, **settings).train()
        os.rename(tmp_path / "whole", tmp_path / "moved")
        trainer = make_trainer(tmp_path / "moved", plain=True, **settings)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.best_model_checkpoint is None


class SignalAt(TrainerCallback):
    """Sends the process itself a SIGTERM in an event of a step."""

    def __init__(self, event: str, step: int):
        def send(args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        setattr(self, event, send)


class TestSIGTERM:
    @pytest.mark.parametrize(
        ("event", "step", "saved"), [("on_step_begin", 4, 5), ("on_step_end", 10, 10), ("on_evaluate", 10, 11)]
    )
    def test_writes_a_checkpoint_after_the_step_and_stops(self, tmp_path, event, step, saved):
        whole = make_trainer(tmp_path / "whole", save_strategy="no")
        whole.train()
        handler = signal.getsignal(signal.SIGTERM)
        trainer = make_trainer(tmp_path / "run", save_strategy="no", callbacks=[SignalAt(event, step)])
        with pytest.raises(TrainingInterrupted) as caught:
            trainer.train()
        assert caught.value.checkpoint == tmp_path / "run" / f"checkpoint-{saved}"
        assert caught.value.exit_code == 143
        assert str(caught.value.checkpoint) in str(caught.value)
        assert signal.getsignal(signal.SIGTERM) is handler
        assert [step_of(path) for path in list_checkpoints(tmp_path / "run")] == [saved]
        resumed = make_trainer(tmp_path / "run", save_strategy="no")
        resumed.train(resume_from_checkpoint=True)
        assert differences(outcome(whole), outcome(resumed)) == []

    def test_in_the_last_step_the_run_is_complete_when_resumed(self, tmp_path):
        trainer = make_trainer(tmp_path / "run", save_strategy="no", callbacks=[SignalAt("on_step_begin", 19)])
        with pytest.raises(TrainingInterrupted):
            trainer.train()
        resumed = make_trainer(tmp_path / "run", save_strategy="no")
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 20
        assert differences(outcome(trainer)["weights"], outcome(resumed)["weights"]) == []

    def test_one_that_comes_too_late_is_not_swallowed(self, tmp_path):
        received = []
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
        try:
            make_trainer(tmp_path, save_strategy="no", callbacks=[SignalAt("on_train_end", 20)]).train()
        finally:
            signal.signal(signal.SIGTERM, before)
        assert received == [signal.SIGTERM]

    def test_training_in_another_thread_leaves_the_handler_alone(self, tmp_path):
        class Note(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                handlers.append(signal.getsignal(signal.SIGTERM))

        handlers, before = [], signal.getsignal(signal.SIGTERM)
        trainer = make_trainer(tmp_path, save_strategy="no", max_steps=1, callbacks=[Note()])
        thread = threading.Thread(target=trainer.train)
        thread.start()
        thread.join()
        assert handlers == [before]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
class TestAdapters:
    """PEFT: a checkpoint holds the adapters alone."""

    def trainer(self, folder):
        torch.manual_seed(3)
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=0.1, target_modules=["query", "value"])
        return make_trainer(folder, model=peft.get_peft_model(tiny_bert(num_hidden_layers=2), config), save_steps=7)

    def test_resumed_run_ends_the_same(self, tmp_path):
        whole = self.trainer(tmp_path / "whole")
        whole.train()
        folder = copy_until(tmp_path / "whole", tmp_path / "part", 14)
        damage(folder / "checkpoint-14" / "adapter_model.safetensors", "half")
        resumed = self.trainer(folder)
        resumed.train(resume_from_checkpoint=True)
        assert differences(outcome(whole), outcome(resumed)) == []


class TestPushing:
    def test_to_the_hub_goes_the_whole_checkpoint(self, tmp_path, monkeypatch):
        pushed = []
        monkeypatch.setattr(
            Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append((folder, verify(folder)))
        )
        trainer = make_trainer(tmp_path, max_steps=2)
        trainer.args.push_to_hub = True
        trainer.train()
        assert pushed == [(str(tmp_path / f"checkpoint-{step}"), []) for step in (1, 2)]


class TestWhatACheckpointHolds:
    def test_it_is_a_trainers_checkpoint_with_two_files_more(self, tmp_path):
        make_trainer(tmp_path / "ours", max_steps=1).train()
        make_trainer(tmp_path / "plain", plain=True, max_steps=1).train()
        ours, plain = ({p.name for p in (tmp_path / k / "checkpoint-1").iterdir()} for k in ("ours", "plain"))
        assert ours == plain | {"manifest.json", "ulmfit_state.json"}

    def test_plain_trainer_can_go_on_from_it(self, tmp_path):
        settings = {"lr_scheduler_type": "linear", "save_steps": 8, "train_sampling_strategy": "random"}
        whole = make_trainer(tmp_path / "whole", **settings)
        whole.train()
        folder = copy_until(tmp_path / "whole", tmp_path / "part", 8)
        trainer = make_trainer(folder, plain=True, **settings)
        trainer.optimizer_cls_and_kwargs = optimizer_of_arguments(whole.args)
        trainer.train(resume_from_checkpoint=True)
        assert differences(outcome(whole)["weights"], outcome(trainer)["weights"]) == []

    def test_names_of_the_parameters_in_the_order_of_the_optimizers_state(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=1)
        trainer.train()
        record = json.loads((tmp_path / "checkpoint-1" / "ulmfit_state.json").read_text())
        named = dict(trainer.model.named_parameters())
        groups = trainer.optimizer.param_groups
        assert [len(names) for names in record["optimizer_groups"]] == [len(group["params"]) for group in groups]
        for names, group in zip(record["optimizer_groups"], groups, strict=True):
            assert all(named[name] is parameter for name, parameter in zip(names, group["params"], strict=True))

    def test_the_best_checkpoint_by_its_final_path(self, tmp_path):
        make_trainer(tmp_path, **KINDS["best by steps"]).train()
        for checkpoint in list_checkpoints(tmp_path):
            state = json.loads((checkpoint / "trainer_state.json").read_text())
            best = tmp_path / f"checkpoint-{state['best_global_step']}"
            assert state["best_model_checkpoint"] == str(best)
            assert best.is_dir()

    def test_the_best_weights_are_those_of_the_best_checkpoint(self, tmp_path):
        trainer = make_trainer(tmp_path, **KINDS["best by steps"], save_total_limit=1)
        trainer.train()
        best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
        assert all(torch.equal(best[name], value) for name, value in trainer.model.state_dict().items())
