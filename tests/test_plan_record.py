"""What a run folder takes for its own run: the same data and model wherever they lie, and no other tool's record."""

import json
import shutil

import pytest
from tiny_plans import TWO_PHASES, Stop, StopAt, run, same, weights
from tiny_text import colour_folder, model_folder
from transformers import AutoTokenizer

from ulmfit_tools import InputError
from ulmfit_tools.cli import main


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, a dataset and a run that was stopped, for which both were named by a relative path."""
    home = tmp_path_factory.mktemp("home")
    model_folder(home / "model", hidden_dropout_prob=0.1)
    colour_folder(home / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        with pytest.raises(Stop):
            run(TWO_PHASES, "model", "data", home / "run", callbacks=[StopAt("02-all", 9)])
    return home


@pytest.fixture(scope="module")
def whole(home):
    run(TWO_PHASES, str(home / "model"), str(home / "data"), home / "whole")
    return home / "whole"


@pytest.mark.parametrize(
    ("cwd", "model", "data"),
    [
        (".", "{home}/model", "{home}/data"),
        ("data", "../model", "../data"),
        (".", "model/", "./data"),
        (".", "copy", "moved"),
    ],
)
def test_a_run_is_the_same_however_the_paths_are_spelt(cwd, model, data, home, whole, tmp_path, monkeypatch):
    shutil.copytree(home / "model", home / "copy", dirs_exist_ok=True)
    shutil.copytree(home / "data", home / "moved", dirs_exist_ok=True)
    folder = shutil.copytree(home / "run", tmp_path / "run")
    monkeypatch.chdir(home / cwd)
    run(TWO_PHASES, model.format(home=home), data.format(home=home), folder, resume=True)
    assert same(weights(folder), weights(whole))
    recorded = json.loads((folder / "run.json").read_text())
    assert (recorded["model"]["name"], recorded["data"]["source"]) == ("model", "data")  # as it was begun


def test_a_run_of_a_version_that_recorded_less_goes_on(home, whole, tmp_path):
    folder = shutil.copytree(home / "run", tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    for part, key in (("model", "config"), ("model", "tokenizer"), ("data", "label_column")):
        del record[part][key]
    (folder / "run.json").write_text(json.dumps(record))
    run(TWO_PHASES, str(home / "model"), str(home / "data"), folder, resume=True)
    assert same(weights(folder), weights(whole))


def lower_dropout(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.05}))


def add_a_word(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["teal-green"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lower_dropout, r"model.config.hidden_dropout_prob: 0.1 -> 0.05"),
        (add_a_word, "model.tokenizer"),
    ],
)
def test_the_same_weights_with_another_configuration_or_tokenizer_are_another_model(change, message, home, tmp_path):
    folder = shutil.copytree(home / "run", tmp_path / "run")
    other = shutil.copytree(home / "model", tmp_path / "other")
    change(other)
    with pytest.raises(InputError, match=message):
        run(TWO_PHASES, str(other), str(home / "data"), folder, resume=True)


@pytest.mark.parametrize("content", ["[]", "{}", "3", "null", '{"plan": {"name": "x"}}', "not JSON"])
@pytest.mark.parametrize("flags", [[], ["--resume"], ["--overwrite"]])
def test_another_tools_run_json_is_one_line_and_nothing_is_touched(content, flags, home, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(content)
    (folder / "config.json").write_text("{}")  # --overwrite deletes that of a run
    argv = [
        "train",
        "--model",
        home / "model",
        "--dataset",
        home / "data",
        "--output_dir",
        folder,
        "--use_cpu",
        *flags,
    ]
    assert main([str(part) for part in argv]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{folder / 'run.json'} " in line
    assert "elsewhere" in line
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"run.json": content, "config.json": "{}"}


@pytest.mark.parametrize("name", ["results.json", "phases/02-all/phase.json"])
def test_a_changed_record_is_one_line(name, home, tmp_path):
    folder = shutil.copytree(home / "run", tmp_path / "run")
    (folder / name).write_text("[]")
    with pytest.raises(InputError, match=f"{name} is not what this tool writes"):
        run(TWO_PHASES, str(home / "model"), str(home / "data"), folder, resume=True)
