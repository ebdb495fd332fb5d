# Two commands for a newcomer: `make study` and `make test`. Each sets up .venv if it is not there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: study test test-slow differs-on-jax differs-on-tensorflow test-jax test-tensorflow test-benchmarks fuzz mutants lint resolves format bench clean help

help:
	@echo "make study   train networks with and without batch normalization on images, speech and text, write a report"
	@echo "make test    the test suite; make test-slow: what it leaves out of large grids, and what takes long;"
	@echo "             make test-jax, make test-tensorflow: all tests of Keras on another backend;"
	@echo "             make test-benchmarks: that the measurements run"
	@echo "make fuzz    any call of any layer against the reference, and damaged files: FUZZ_CASES of them (20000), by FUZZ_SEED"
	@echo "make mutants what the suite catches: mistakes made in the code by rule, 14 in each part of it; half an hour"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make resolves  what users and developers install has a solution on every platform, by the registry's metadata"
	@echo "make bench   the measurements behind the figures in README and docs"
	@echo "make format  let ruff format the code"
	@echo "make clean   remove .venv, caches and runs"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("batchnorm needs Python 3.11 or newer, and this is %s: run make PYTHON=python3.12" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.study: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[study]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.study

study: $(VENV)/.study
	$(BIN)/batchnorm study $(ARGS)

# Kernels stay on disk, beside their source, until it changes.
$(VENV)/.kernels: $(VENV)/.dev $(wildcard src/batchnorm/kernels/cpu/*.py)
	$(BIN)/python -m tests.support.kernels
	@touch $@

test: $(VENV)/.kernels
	$(BIN)/pytest -n auto --ignore tests/benchmarks $(ARGS)
	$(MAKE) --jobs 2 differs-on-jax differs-on-tensorflow

# What differs between the backends of Keras: a process each, as starting one is most of its time.
differs-on-jax differs-on-tensorflow: differs-on-%: $(VENV)/.kernels
	KERAS_BACKEND=$* $(BIN)/pytest --quiet -m "on_every_backend and not slow" tests/keras

test-slow: $(VENV)/.kernels
	$(BIN)/pytest -n auto -m slow --ignore tests/benchmarks $(ARGS)

test-jax test-tensorflow: test-%: $(VENV)/.kernels
	KERAS_BACKEND=$* $(BIN)/pytest -n auto -m "not one_backend" tests/keras $(ARGS)

test-benchmarks: $(VENV)/.kernels
	$(BIN)/pytest -n auto tests/benchmarks $(ARGS)

# What a seed finds, `make fuzz FUZZ_SEED=...` finds again, as long as FUZZ_CASES is the same.
FUZZ_CASES ?= 20000
FUZZ_SEED  ?= $(shell date +%s)

fuzz: $(VENV)/.dev
	@echo "make fuzz FUZZ_CASES=$(FUZZ_CASES) FUZZ_SEED=$(FUZZ_SEED)"
	HYPOTHESIS_PROFILE=fuzz FUZZ_CASES=$(FUZZ_CASES) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/pytest -n auto tests/fuzz $(ARGS)

# The same tree and seed give the same mutants; ARGS: --room NAME, --count, --seed, --against an earlier JSON.
mutants: $(VENV)/.kernels
	$(BIN)/python -m tests.mutants $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

resolves: $(VENV)/.dev
	$(BIN)/python scripts/resolves.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.run $(ARGS)

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
