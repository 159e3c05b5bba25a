# `make demo` and `make test` need only Python 3.10 or newer, git and make: they build their own virtual environment.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
RUN ?= runs/demo
# The tests compute in one thread each, so there is one process for each core; eight hold some six gigabytes.
PARALLEL ?= --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: install demo test test-fast lint types notebooks clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt torch
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[demo,plot,peft,benchmark,test]"
	touch $@

# The main job on the embedded default: fine-tune MiniLM on the standard library's docstrings. 64 tokens hold most of
# them whole; with these and three of the plan's five epochs it takes minutes on two slow cores. --resume goes on where
# an interrupted demo stopped.
demo: install
	$(VENV)/bin/ulmfit-tools train --model minilm --dataset stdlib-docs --plan gradual_unfreezing --max_length 64 \
		--num_train_epochs 3 --output_dir $(RUN) --resume

# Everything: unit tests, the sweep over all architectures, slow tests, and the real data where it is at hand.
test: install
	$(PY) -m pytest tests $(PARALLEL)

test-fast: install
	$(PY) -m pytest tests -m "not slow and not real_data" $(PARALLEL)

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: install
	$(PY) -m mypy

# Executes every notebook from top to bottom; they are stored without outputs.
notebooks: install
	$(PY) -m pytest tests/test_notebooks.py

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
