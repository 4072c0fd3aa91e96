# Two commands: `make train` and `make test`. Both make the environment they need in .venv, from the
# versions in constraints.txt. `make lock` renews those; `make test-newest` tests the newest versions
# that pyproject.toml admits, in an environment of its own.
PYTHON ?= python3
VENV   ?= .venv
LOCK   ?= constraints.txt
BIN    := $(VENV)/bin
# Ranks of `make train`: two, or one where there is a single GPU.
NPROC  ?= $(shell [ "$$(nvidia-smi -L 2>/dev/null | wc -l)" = 1 ] && echo 1 || echo 2)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The build takes its tools from the environment, where they are locked as well (LOCK= locks nothing).
PINNED  = $(if $(LOCK),-c $(LOCK))
INSTALL = $(BIN)/pip install -q $(PINNED) 'setuptools>=70.1' && \
          $(BIN)/pip install -q $(PINNED) --no-build-isolation -e

.PHONY: train test test-cluster test-newest lock links lint types clean
train: $(VENV)/.ready-train
	$(BIN)/colonnade train quickstart --nproc $(NPROC)

test: lint types
	$(BIN)/python -m pytest

# On hosts and a SLURM cluster that the tests start on this machine. It takes root and Debian's
# packages slurm-wlm, munge and iproute2; without them the tests are skipped, and say why.
test-cluster: $(VENV)/.ready-test
	$(BIN)/python -m pytest tests/cluster --timeout 900

test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest LOCK=

# A folder of links shows the rooms on disk as they are installed, as packages of colonnade.
SRC = $(VENV)/src
links:
	mkdir -p $(SRC)/colonnade
	ln -sfn $(CURDIR)/verbs/__init__.py $(SRC)/colonnade/__init__.py
	for room in bench launcher parallel models kernels slurm; do ln -sfn $(CURDIR)/$$room $(SRC)/colonnade/$$room; done

lint: $(VENV)/.ready-test links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(SRC) && $(abspath $(BIN))/lint-imports --config $(CURDIR)/pyproject.toml

types: $(VENV)/.ready-test links
	MYPYPATH=$(SRC) $(BIN)/mypy -p colonnade

# Public versions alone (torch 2.13.0, not 2.13.0+cpu): each machine takes its own build of them.
lock:
	rm -rf .venv-lock
	$(MAKE) .venv-lock/.ready-test VENV=.venv-lock LOCK=
	{ echo "# What the tests were written with. Made by \`make lock\`."; \
	  .venv-lock/bin/pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+.*//'; } > constraints.new
	mv constraints.new constraints.txt
	rm -rf .venv-lock

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "colonnade needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-train: pyproject.toml $(LOCK) | $(VENV)/bin/python
	$(INSTALL) '.[plot]'
	touch $@

$(VENV)/.ready-test: pyproject.toml $(LOCK) | $(VENV)/bin/python
	$(INSTALL) '.[test]'
	touch $@ $(VENV)/.ready-train

clean:
	rm -rf $(VENV) .venv-newest .venv-lock build *.egg-info runs
