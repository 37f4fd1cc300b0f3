# Set-up, training, tests and checks. Every target makes .venv first (tools/venv.sh), from the
# hash-locked requirements; `make PYTHON=/path/to/python3.12 TARGET` chooses the interpreter.

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all test-newest lint format types lock ci clean distclean

PY := .venv/bin/python
SOURCES := fsn_jax train configs tests benchmarks examples tools
CONFIG ?= configs/quickstart.py
ARGS ?=
UV := uv==0.13.9
LOCK_FLAGS := --universal --generate-hashes --python-version 3.11 --fork-strategy fewest \
  --no-header --no-emit-index-url --no-annotate --quiet $(if $(UPGRADE),--upgrade)

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'
	@echo
	@echo "  make train CONFIG=configs/enwik8.py:fsn_1m ARGS=--config.model.num_layers=4   another run"
	@echo "  make test ARGS='-k causal'                                                 some tests"

setup:  ## Make .venv from the lock files (does nothing if it is up to date)
	@PYTHON='$(PYTHON)' tools/venv.sh

train: setup  ## Train configs/quickstart.py on enwik8, or go on where it stopped
	$(PY) -m train --config=$(CONFIG) $(ARGS)

test: setup  ## Run the default tests
	$(PY) -m pytest -n 2 --dist worksteal $(ARGS)

test-all: setup  ## Run the slow tests too (they fetch enwik8)
	$(PY) -m pytest -m "not gpu" $(ARGS)

test-newest:  ## Run the default tests on the newest packages (PYTHON=/path/to/python3.13)
	$(or $(PYTHON),python3) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet -e '.[train,dev]'
	.venv-newest/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: setup  ## Check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: setup  ## Mend style and formatting
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: setup  ## Check types
	$(PY) -m mypy

lock: setup  ## Bring the lock files in line with pyproject.toml (UPGRADE=1: to the newest versions)
	$(PY) -m pip install --quiet $(UV)
	$(PY) -m uv pip compile $(LOCK_FLAGS) --extra train --extra dev --output-file requirements.lock pyproject.toml
	echo setuptools | $(PY) -m uv pip compile $(LOCK_FLAGS) --constraint requirements.lock --output-file requirements-build.lock -

ci:  ## Run everything that continuous integration runs
	.ci/run

clean:  ## Remove caches and build products (keeps .venv, runs and prepared data)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## Remove .venv too
	rm -rf .venv .venv-newest
