"""The public surface: every promised name is there, importing costs and prints nothing."""

import subprocess
import sys

import pytest

import ulmfit_tools

PROMISED = """
layer_groups discriminative_param_groups discriminative_optimizer get_slanted_triangular_schedule
get_cyclical_schedule get_sgdr_schedule get_one_cycle_schedule freeze_to unfreeze GradualUnfreezing
ULMFiTTrainer ULMFiTTrainingArguments Phase FineTuningPlan run_plan
""".split()


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("name", PROMISED)
def test_promised_name_exists_and_is_exported(name):
    assert name in ulmfit_tools.__all__
    assert callable(getattr(ulmfit_tools, name))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        ulmfit_tools.nonsense


def test_import_is_silent_and_loads_nothing_heavy():
    code = "import ulmfit_tools, sys; print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    done = python(code)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_no_plotting_library_is_loaded_by_the_whole_package():
    modules = "callbacks, checkpoints, cli, freezing, inference, layers, metrics, param_groups, schedules, trainer"
    code = f"import sys; from ulmfit_tools import {modules}, data, plans; print('matplotlib' in sys.modules)"
    assert python(code).stdout == "False\n"


def test_importing_every_module_leaves_the_random_state_and_settings_alone():
    code = (
        # What others do when they are imported is theirs: they come first.
        "import random, os, torch, transformers.trainer, datasets, evaluate, sklearn.linear_model, sklearn.metrics;"
        "import sklearn.feature_extraction.text, rich.table; env = dict(os.environ);"
        "torch.manual_seed(3); random.seed(3); before = torch.random.get_rng_state(), random.getstate();"
        "from ulmfit_tools import cli, plans, trainer, data, callbacks;"
        "assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == random.getstate();"
        "assert dict(os.environ) == env; print('same')"
    )
    done = python(code)
    assert done.stdout == "same\n"
