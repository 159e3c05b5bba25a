"""Five ways in which freezing and resuming go wrong in plain `Trainer`, each shown there and then here.

The tests of plain `Trainer` fail when upstream mends it.
"""

import pytest
import torch
from runs import KillAt, Killed, copy_until, differences, make_trainer, outcome
from test_checkpoints import damage
from tiny import tiny_bert
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ulmfit_tools.checkpoints import CheckpointError
from ulmfit_tools.freezing import freeze_to, unfreeze
from ulmfit_tools.trainer import optimizer_of_arguments

LAYER = "bert.encoder.layer.{}.output.dense.weight"


def model_with(trainable: list[int], head: bool = True):
    """Two layers and a head, of which some train; the same weights each time."""
    model = tiny_bert(num_hidden_layers=2)
    model.requires_grad_(False)
    for layer in trainable:
        model.bert.encoder.layer[layer].requires_grad_(True)
    model.classifier.requires_grad_(head)
    return model


def trainer_of(folder, plain, model, callbacks=None, trainable_only=False, **settings):
    settings = {"save_steps": 4, "max_steps": 8, "eval_strategy": "no", "lr_scheduler_type": "linear"} | settings
    trainer = make_trainer(folder, plain=plain, model=model, callbacks=callbacks, **settings)
    if trainable_only:
        trainer.optimizer_cls_and_kwargs = optimizer_of_arguments(trainer.args, trainable_only=True)
    return trainer


def changed(model, name: str) -> bool:
    return not torch.equal(model.state_dict()[name], tiny_bert(num_hidden_layers=2).state_dict()[name])


def moments(trainer, name: str) -> torch.Tensor:
    """Adam's mean of the gradient of a parameter."""
    return trainer.optimizer.state[dict(trainer.model.named_parameters())[name]]["exp_avg"]


def stop_at(folder, step, plain, model, **settings):
    trainer = trainer_of(folder, plain, model, [KillAt("on_save", step)], **settings)
    with pytest.raises(Killed):
        trainer.train()
    return trainer


class LoadedMoments(TrainerCallback):
    """Adam's state as it was right after resuming."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.found = {
            names[id(p)]: values["exp_avg"].clone() for p, values in optimizer.state.items() if "exp_avg" in values
        }


class TestALayersThawedInMidRun:
    """A. Layers that are frozen before `train()` and thawed by a callback."""

    class Thaw(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                unfreeze(model)

    def test_plain_trainer_never_trains_them(self, tmp_path):
        trainer = trainer_of(tmp_path, True, model_with([]), [self.Thaw()])
        trainer.train()
        assert changed(trainer.model, "classifier.weight")
        assert not changed(trainer.model, LAYER.format(0))

    def test_here_they_train(self, tmp_path):
        trainer = trainer_of(tmp_path, False, model_with([]), [self.Thaw()])
        trainer.train()
        assert changed(trainer.model, LAYER.format(0))


class TestBResumedWithMoreLayers:
    """B. Resuming with another frozen set than the run was stopped with."""

    def test_plain_trainer_raises_a_group_size_error(self, tmp_path):
        stop_at(tmp_path, 4, True, model_with([]))
        with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
            trainer_of(tmp_path, True, model_with([0, 1])).train(resume_from_checkpoint=True)

    def test_here_the_run_goes_on_with_every_state_in_its_place(self, tmp_path):
        stopped = stop_at(tmp_path, 4, False, model_with([]))
        loaded = LoadedMoments()
        trainer = trainer_of(tmp_path, False, model_with([0, 1]), [loaded])
        trainer.train(resume_from_checkpoint=True)
        assert loaded.found.keys() == {"classifier.weight", "classifier.bias"}
        assert torch.equal(loaded.found["classifier.weight"], moments(stopped, "classifier.weight"))
        assert changed(trainer.model, LAYER.format(0))

    def test_an_optimizer_of_the_trainable_ones_is_refused_in_a_line_that_says_why(self, tmp_path):
        stop_at(tmp_path, 4, False, model_with([]), trainable_only=True)
        trainer = trainer_of(tmp_path, False, model_with([0]), trainable_only=True)
        with pytest.raises(
            CheckpointError, match=r"layer\.0\..* and 15 more were not in the optimizer then"
        ) as caught:
            trainer.train(resume_from_checkpoint=True)
        assert "\n" not in str(caught.value)


class TestCResumedWithOtherLayersOfTheSameSize:
    """C. Resuming with another frozen set whose tensors have the same sizes."""

    def test_plain_trainer_puts_adams_state_on_the_wrong_layer(self, tmp_path):
        stopped = stop_at(tmp_path, 4, True, model_with([0]))
        loaded = LoadedMoments()
        trainer_of(tmp_path, True, model_with([1]), [loaded]).train(resume_from_checkpoint=True)
        assert torch.equal(loaded.found[LAYER.format(1)], moments(stopped, LAYER.format(0)))

    def test_here_it_stays_with_its_layer(self, tmp_path):
        stopped = stop_at(tmp_path, 4, False, model_with([0]))
        loaded = LoadedMoments()
        trainer_of(tmp_path, False, model_with([1]), [loaded]).train(resume_from_checkpoint=True)
        assert torch.equal(loaded.found[LAYER.format(0)], moments(stopped, LAYER.format(0)))
        assert LAYER.format(1) not in loaded.found

    def test_an_optimizer_of_the_trainable_ones_is_refused(self, tmp_path):
        stop_at(tmp_path, 4, False, model_with([0]), trainable_only=True)
        trainer = trainer_of(tmp_path, False, model_with([1]), trainable_only=True)
        with pytest.raises(CheckpointError, match=r"layer\.0\..* and 15 more are not in the optimizer now"):
            trainer.train(resume_from_checkpoint=True)

    def test_other_groups_of_the_same_parameters_are_refused(self, tmp_path):
        stop_at(tmp_path, 4, False, model_with([0]))
        trainer = trainer_of(tmp_path, False, model_with([0]), num_layer_groups=2)
        with pytest.raises(CheckpointError, match="the 2 parameter groups are divided otherwise than the 4 then"):
            trainer.train(resume_from_checkpoint=True)

    def test_another_schedule_is_refused(self, tmp_path):
        stop_at(tmp_path, 4, False, model_with([0]))
        trainer = trainer_of(tmp_path, False, model_with([0]), lr_scheduler_type="sgdr")
        with pytest.raises(CheckpointError, match="lr_scheduler_type=sgdr, in the checkpoint: linear"):
            trainer.train(resume_from_checkpoint=True)


class TestDTrainedAgainAfterThawing:
    """D. `train()`, thaw, `train()` on one trainer."""

    def twice(self, folder, plain, **settings):
        model = tiny_bert(num_hidden_layers=2)
        freeze_to(model, -1)
        trainer = trainer_of(folder, plain, model, **settings)
        trainer.train()
        assert not changed(model, LAYER.format(0))
        unfreeze(model)
        trainer.train()
        return model

    def test_plain_trainer_goes_on_with_the_old_optimizer(self, tmp_path):
        assert not changed(self.twice(tmp_path, True), LAYER.format(0))

    @pytest.mark.parametrize("trainable_only", [False, True])
    def test_here_the_thawed_layers_train(self, tmp_path, trainable_only):
        assert changed(self.twice(tmp_path, False, trainable_only=trainable_only), LAYER.format(0))


class TestEHalfWrittenCheckpoints:
    """E. The newest checkpoint is not whole."""

    FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]

    def test_plain_trainer_takes_a_folder_without_its_state_and_crashes(self, tmp_path):
        stop_at(tmp_path, 8, True, model_with([0]))
        damage(tmp_path / "checkpoint-8" / "trainer_state.json", "missing")
        assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-8")
        with pytest.raises(FileNotFoundError):
            trainer_of(tmp_path, True, model_with([0])).train(resume_from_checkpoint=True)

    def ten_cases(self, tmp_path, plain):
        """What becomes of runs whose newest checkpoint lacks a file or the half of one."""
        settings = {"max_steps": 12, "train_sampling_strategy": "random"}  # plain Trainer can resume this one exactly
        whole = trainer_of(tmp_path / "whole", plain, model_with([0, 1]), **settings)
        whole.train()
        ends = []
        for how in ("missing", "half"):
            for name in self.FILES:
                folder = copy_until(tmp_path / "whole", tmp_path / how / name, 8)
                damage(folder / "checkpoint-8" / name, how)
                trainer = trainer_of(folder, plain, model_with([0, 1]), **settings)
                try:
                    trainer.train(resume_from_checkpoint=True)
                except Exception:
                    ends.append("crashed")
                else:
                    same = not differences(outcome(whole), outcome(trainer))
                    ends.append("identical" if same else "silently different")
        return {end: ends.count(end) for end in set(ends)}

    def test_plain_trainer_crashes_in_seven_of_ten_cases_and_is_wrong_in_three(self, tmp_path):
        assert self.ten_cases(tmp_path, plain=True) == {"crashed": 7, "silently different": 3}

    def test_here_ten_of_ten_go_on_and_end_identical(self, tmp_path):
        assert self.ten_cases(tmp_path, plain=False) == {"identical": 10}
