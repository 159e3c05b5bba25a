"""The weights between phases: damage is seen on resume, and what a killed process was deleting is deleted."""

import shutil

import pytest
from tiny_plans import TWO_PHASES, Stop, StopAt, run, same, weights
from tiny_text import model_folder

from ulmfit_tools import FineTuningPlan, InputError, Phase, checkpoints
from ulmfit_tools.plans import run as run_module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(model_folder(tmp_path_factory.mktemp("model"), hidden_dropout_prob=0.1))


THREE_PHASES = FineTuningPlan(
    name="three",
    settings=TWO_PHASES.settings,
    phases=[
        Phase(name="head", train="head", epochs=1),
        Phase(name="top", train=3, epochs=1),
        Phase(name="all", epochs=2),
    ],
)


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(THREE_PHASES, model, data, folder)
    return folder


@pytest.fixture(scope="module")
def stopped(model, data, tmp_path_factory):
    """Runs that were stopped in the second and in the third phase."""
    root = tmp_path_factory.mktemp("stopped")
    for phase in ("02-top", "03-all"):
        with pytest.raises(Stop):
            run(THREE_PHASES, model, data, root / phase, callbacks=[StopAt(phase, 2)])
    return root


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def change_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("damage", "words"),
    [(truncate, "bytes"), (change_a_bit, "has other content than was written"), (lambda f: f.unlink(), "is missing")],
)
def test_the_first_phase_is_trained_again_where_its_weights_are_damaged(
    damage, words, stopped, whole, model, data, tmp_path, caplog
):
    folder = shutil.copytree(stopped / "02-top", tmp_path / "run")
    damage(folder / "phases/01-head/model/model.safetensors")
    run(THREE_PHASES, model, data, folder, resume=True)
    assert f"model is damaged: model.safetensors {words}".split(words)[0] in caplog.text
    assert words in caplog.text
    assert "Phase 'head' is trained again." in caplog.text
    assert same(weights(folder), weights(whole))


def test_damaged_weights_whose_forerunners_are_gone_end_the_run(stopped, model, data, tmp_path):
    folder = shutil.copytree(stopped / "03-all", tmp_path / "run")
    change_a_bit(folder / "phases/02-top/model/model.safetensors")
    before = files(folder)
    with pytest.raises(
        InputError, match=r"02-top/model is damaged: model.safetensors has other.*--overwrite"
    ) as error:
        run(THREE_PHASES, model, data, folder, resume=True)
    assert "\n" not in str(error.value)
    assert files(folder) == before
    assert run(THREE_PHASES, model, data, folder, overwrite=True).plan == "three"


def test_damaged_weights_are_trained_again_from_those_before_where_these_are_still_there(
    stopped, whole, model, data, tmp_path, caplog
):
    folder = shutil.copytree(stopped / "03-all", tmp_path / "run")
    shutil.copytree(stopped / "02-top/phases/01-head/model", folder / "phases/01-head/model")
    truncate(folder / "phases/02-top/model/model.safetensors")
    run(THREE_PHASES, model, data, folder, resume=True)
    assert "Phase 'top' is trained again." in caplog.text
    assert same(weights(folder), weights(whole))


def test_damaged_weights_of_the_last_phase_are_not_taken_for_the_result(model, data, tmp_path, monkeypatch):
    def stop(*args):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_finish", stop)
        with pytest.raises(Stop):
            run(TWO_PHASES, model, data, tmp_path)
    truncate(tmp_path / "phases/02-all/model/model.safetensors")
    with pytest.raises(InputError, match="02-all/model is damaged"):
        run(TWO_PHASES, model, data, tmp_path, resume=True)


@pytest.mark.parametrize("nth", range(4))
def test_what_a_killed_process_was_deleting_is_gone_after_a_resume(nth, whole, model, data, tmp_path, monkeypatch):
    """Killed at the deletion of a checkpoint of the first phase, of the second, of weights, of a checkpoint again."""
    folder, deletions = tmp_path / "run", []

    def killed(path, **options):
        if ".deleted-" in str(path) and path.exists():
            deletions.append(path)
            if len(deletions) > nth:
                raise Stop
        remove(path, **options)

    remove = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", killed)
        with pytest.raises(Stop):
            run(THREE_PHASES, model, data, folder)
    assert deletions[-1].exists()
    run(THREE_PHASES, model, data, folder, resume=True)
    names = {path.relative_to(folder) for path in folder.rglob("*")}
    assert names == {path.relative_to(whole) for path in whole.rglob("*")}
    assert same(weights(folder), weights(whole))


def test_leftovers_of_a_complete_run_and_of_an_overwriting_one_are_removed(whole, model, data, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    before = files(folder).keys()
    for name in ("phases/03-all/.deleted-model", "phases/03-all/model", "phases/01-head/.incomplete-model/model"):
        (folder / name).mkdir(parents=True)
    run(THREE_PHASES, model, data, folder, resume=True)
    assert files(folder).keys() == before
    (folder / "phases").rename(folder / ".deleted-phases")  # killed while it deleted the old run
    (folder / "results.json").unlink()
    run(THREE_PHASES, model, data, folder, resume=True)
    assert files(folder).keys() == before
