import json
from pathlib import Path

import pytest
import torch
from unfreezing_runs import EPOCH, trainer_of

from ulmfit_tools.callbacks import GradualUnfreezing, LogGroupRates, StopWhenOverfit, group_rates, has_overfit
from ulmfit_tools.errors import InputError
from ulmfit_tools.evaluations import best_step

# ---- Until it overfits ---------------------------------------------------------------------------------------------


def overfitting(folder, values, resume=None, callbacks=(), **settings):
    """A run whose validation loss takes these values, one an epoch."""
    trainer = trainer_of(
        folder, *callbacks, num_train_epochs=8, eval_strategy="epoch", save_strategy="epoch",
        metric_for_best_model="loss", load_best_model_at_end=True, **settings
    )  # fmt: skip
    left, evaluate = iter(values), trainer.evaluation_loop

    def with_values(*args, **kwargs):
        output = evaluate(*args, **kwargs)
        output.metrics["eval_loss"] = next(left)
        return output

    trainer.evaluation_loop = with_values
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("values", "settings", "epochs", "best"),
    [
        ([1.0, 0.8, 0.9], {}, 3, 2),
        ([1.0, 0.8, 0.9, 0.7, 0.8, 0.9], {"patience": 2}, 6, 4),
        ([1.0, 0.8, 0.79], {"min_delta": 0.05}, 3, 3),
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], {}, 8, 8),
    ],
)
def test_training_ends_when_the_validation_loss_turns_up(tmp_path, values, settings, epochs, best):
    trainer = overfitting(tmp_path, values, callbacks=[StopWhenOverfit(**settings)])
    assert trainer.state.epoch == epochs
    assert trainer.state.best_global_step == best_step(trainer.state.log_history) == best * EPOCH
    saved = trainer_of(tmp_path).model
    trainer_best = Path(trainer.state.best_model_checkpoint)
    assert trainer_best.name == f"checkpoint-{best * EPOCH}"
    saved = saved.from_pretrained(trainer_best).state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_run_that_has_overfit_stays_ended_when_it_is_resumed(tmp_path):
    values = [1.0, 0.8, 0.9]
    first = overfitting(tmp_path, values, callbacks=[StopWhenOverfit()])
    assert first.state.global_step == 9
    last = tmp_path / "checkpoint-9"
    assert has_overfit(json.loads((last / "trainer_state.json").read_text())["log_history"])
    again = overfitting(tmp_path, [0.95], resume=str(last), callbacks=[StopWhenOverfit()])
    assert again.state.global_step == 10  # plain Trainer looks at `should_training_stop` after a step only
    assert again.state.best_global_step == 6
    forever = overfitting(tmp_path, [0.9] * 9, resume=str(last))
    assert forever.state.global_step == 24  # without it, the run would go on


def test_overfitting_settings_that_are_impossible(tmp_path):
    with pytest.raises(InputError, match="Received: patience=0, min_delta=0"):
        StopWhenOverfit(patience=0)
    with pytest.raises(InputError, match="Received: patience=1, min_delta=-1"):
        StopWhenOverfit(min_delta=-1)
    with pytest.raises(InputError, match="StopWhenOverfit needs evaluations"):
        trainer_of(tmp_path, StopWhenOverfit()).train()


# ---- Rates in the logs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_the_rate_of_each_group_is_logged(tmp_path, first):
    """Whatever the order of the callbacks: the rate with which the step was taken, 0 for what is frozen."""
    callbacks = [GradualUnfreezing(by="step", every=4, warmup_steps=2), LogGroupRates()]
    trainer = trainer_of(tmp_path, *callbacks[:: -1 if first else 1], factory=True)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["lr/embeddings"] for entry in logs] == [0] * 12
    assert [entry["lr/head"] for entry in logs] == pytest.approx([entry["learning_rate"] * 10 for entry in logs])
    third = [entry["lr/layer.3"] for entry in logs]
    assert third[:4] == [0] * 4
    ratio = [rate / entry["lr/head"] for rate, entry in zip(third[4:], logs[4:], strict=True)]
    factor = 10 ** (1 / 5)  # ten times from end to end of six groups
    assert ratio == pytest.approx([1 / factor / 2, *[1 / factor] * 7])
    assert json.dumps(trainer.state.log_history)


def test_rates_of_groups_without_names(tmp_path):
    trainer = trainer_of(tmp_path, LogGroupRates(), num_train_epochs=1)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert (
        [entry["lr/0"] for entry in logs]
        == [entry["lr/1"] for entry in logs]
        == pytest.approx([0.01, 2 / 300, 1 / 300])
    )
    assert not any("lr/0" in entry for entry in trainer.state.log_history if "train_runtime" in entry)


def test_group_rates_take_tensors_and_tell_what_is_frozen():
    frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    open_ = torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [open_], "name": "a", "lr": torch.tensor(0.5)}, {"params": [frozen], "name": "b"}]
    assert group_rates(torch.optim.SGD(groups, lr=0.1)) == {"a": 0.5, "b": 0.0}
