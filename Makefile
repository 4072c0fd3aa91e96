# Two commands: `make train` and `make test`. Both make the environment they need in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Ranks of `make train`: two, or one where there is a single GPU.
NPROC  ?= $(shell [ "$$(nvidia-smi -L 2>/dev/null | wc -l)" = 1 ] && echo 1 || echo 2)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: train test lint types clean
train: $(VENV)/.ready-train
	$(BIN)/colonnade train quickstart --nproc $(NPROC)

test: lint types
	$(BIN)/python -m pytest

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# mypy wants the package names on disk: a folder of links shows it the rooms as colonnade.*
types: $(VENV)/.ready-test
	mkdir -p $(VENV)/src/colonnade
	for room in launcher parallel models kernels; do ln -sfn $(CURDIR)/$$room $(VENV)/src/colonnade/$$room; done
	MYPYPATH=$(VENV)/src $(BIN)/mypy -p colonnade

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "colonnade needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-train: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q -e '.[plot]'
	touch $@

$(VENV)/.ready-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q -e '.[test]'
	touch $@ $(VENV)/.ready-train

clean:
	rm -rf $(VENV) build *.egg-info runs
