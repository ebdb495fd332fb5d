# Two commands for a newcomer: `make study` and `make test`. Each sets up .venv if it is not there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: study test test-slow differs-on-jax differs-on-tensorflow test-jax test-tensorflow test-benchmarks test-oldest test-newest fuzz mutants browser lint resolves docs docs-serve dist format bench clean help

help:
	@echo "make study   train networks with and without batch normalization on images, speech and text, write a report"
	@echo "make test    the test suite; make test-slow: what it leaves out of large grids, and what takes long;"
	@echo "             make test-jax, make test-tensorflow: all tests of Keras on another backend;"
	@echo "             make test-benchmarks: that the measurements run;"
	@echo "             make test-oldest, make test-newest: with other versions of what it needs"
	@echo "make fuzz    any call of any layer against the reference, and damaged files: FUZZ_CASES of them (20000), by FUZZ_SEED"
	@echo "make mutants what the suite catches: mistakes made in the code by rule, 14 in each part of it; half an hour"
	@echo "make browser a browser for the tests of reports, on Debian as root"
	@echo "make lint    ruff, mypy, pyright on what users write, import-linter"
	@echo "make resolves  what users and developers install has a solution on every platform, by the registry's metadata"
	@echo "make docs    the documentation as pages that can be read offline; make docs-serve: at http://127.0.0.1:8000"
	@echo "make dist    the wheel and the source distribution of a release, checked and tried in empty environments"
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
	$(PIP) --upgrade 'pip>=25.1'  # the first that knows dependency groups
	$(PIP) --editable '.[cluster,keras]' --group dev
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

# The suite by the lower bounds of what users install, and by the newest releases, whatever constraints.txt says.
test-oldest test-newest: test-%: $(VENV)/.dev
	$(PYTHON) -m venv --clear $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/uv pip compile pyproject.toml --extra cluster --extra keras --quiet --no-header --no-annotate \
	  --resolution $(if $(filter oldest,$*),lowest-direct,highest) --python $(BIN)/python > $(VENV)-$*/versions.txt
	$(VENV)-$*/bin/python -m pip install --quiet --constraint $(VENV)-$*/versions.txt --editable '.[cluster,keras]' --group test
	$(VENV)-$*/bin/python -m pytest -n auto --ignore tests/benchmarks $(ARGS)

# What a seed finds, `make fuzz FUZZ_SEED=...` finds again, as long as FUZZ_CASES is the same.
FUZZ_CASES ?= 20000
FUZZ_SEED  ?= $(shell date +%s)

fuzz: $(VENV)/.dev
	@echo "make fuzz FUZZ_CASES=$(FUZZ_CASES) FUZZ_SEED=$(FUZZ_SEED)"
	HYPOTHESIS_PROFILE=fuzz FUZZ_CASES=$(FUZZ_CASES) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/pytest -n auto tests/fuzz $(ARGS)

# The same tree and seed give the same mutants; ARGS: --room NAME, --count, --seed, --against an earlier JSON.
mutants: $(VENV)/.kernels
	$(BIN)/python -m tests.mutants $(ARGS)

# For the tests of the reports in a browser, which are skipped without one: Debian's, where one may install it.
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	    timeout 300 sh -c 'apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium' >/dev/null; } || \
	  echo "no browser was found or installed: the tests of reports in a browser are skipped"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python tests/typing/usage.py
	$(BIN)/lint-imports

resolves: $(VENV)/.dev
	$(BIN)/python scripts/resolves.py

$(VENV)/.docs: $(VENV)/.kernels
	$(PIP) --group docs
	@touch $@

# Warnings are errors: a link that leads nowhere, a name that is not there, a notebook that fails.
docs: $(VENV)/.docs
	KERAS_BACKEND=torch $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

docs-serve: docs
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/docs 8000

# What is released: built, its files and metadata checked, and tried in environments without this checkout.
dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist
	$(BIN)/python scripts/check_dist.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.run $(ARGS)

clean:
	rm -rf $(VENV) runs dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
