"""Shared set-up of the tests."""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a network, and nothing may wait for one
# One thread: tiny models gain nothing from more, and a process that is forked from one with a pool of threads hangs.
os.environ["OMP_NUM_THREADS"] = "1"
# Plans keep activations in the user's cache; those of the tests go with them.
os.environ["ULMFIT_TOOLS_CACHE"] = tempfile.mkdtemp(prefix="ulmfit-tools-tests-")

import torch
from tiny_text import colour_folder

import ulmfit_tools.cli
import ulmfit_tools.plans  # noqa: F401

torch.set_num_threads(1)
# `Trainer.train` collects garbage each time, which walks through every object of every library imported so far: a
# second a call on a slow core. Objects that are there by now stay, so the collector may pass over them.
gc.collect()
gc.freeze()


def pytest_collection_modifyitems(items):
    """Skip what reads real data where it is not at hand, and say so."""
    folder = Path(os.environ.get("ULMFIT_TOOLS_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if folder.is_dir():
        return
    for item in items:
        if item.get_closest_marker("real_data"):
            item.add_marker(pytest.mark.skip(reason=f"needs the datasets in $ULMFIT_TOOLS_DATA; there is no {folder}"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real datasets."""
    return Path(os.environ.get("ULMFIT_TOOLS_DATA") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """A folder with a small dataset, for runs of plans."""
    return str(colour_folder(tmp_path_factory.mktemp("data")))


def pytest_sessionfinish():
    """Removes what the tests cached."""
    shutil.rmtree(os.environ["ULMFIT_TOOLS_CACHE"], ignore_errors=True)
