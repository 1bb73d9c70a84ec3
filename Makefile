# Everything from a bare machine: `make demo` and `make test` create .venv, install torch and the
# rest at the versions in constraints.txt, build fastreg in place and run it. Later calls reuse that.
#
#   PYTHON=python3.12   interpreter that creates the environment
#   VENV=path           where the environment is (default .venv)
#   VENV=               no environment: use PYTHON's own packages as they are, for instance a torch
#                       built for this GPU; only fastreg itself is built and installed there
#   WORKERS=2           processes that share the tests, a file and a thread each at a time
#   ARGS="..."          passed on to `fastreg train`, `fastreg bench`, pytest, ruff, mypy, sphinx or bench/suite.py

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2

ifeq ($(strip $(VENV)),)
BIN_PYTHON := $(PYTHON)
READY := build/.ready
TEST_READY := build/.test-ready
PEERS_READY := build/.peers-ready
DOCS_READY := build/.docs-ready
LINT_READY := build/.lint-ready
TYPES_READY := build/.types-ready
else
BIN_PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
TEST_READY := $(VENV)/.test-ready
PEERS_READY := $(VENV)/.peers-ready
DOCS_READY := $(VENV)/.docs-ready
LINT_READY := $(VENV)/.lint-ready
TYPES_READY := $(VENV)/.types-ready
endif

PIP := $(BIN_PYTHON) -m pip --disable-pip-version-check
INPUTS := constraints.txt setup.py pyproject.toml fastreg/_version.py $(wildcard csrc/*)

.PHONY: help demo test lint types bench suite docs build env clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train on real data and plot the comparison (about two minutes)"
	@echo "make test    run the tests"
	@echo "make lint    check the sources with ruff (rules in pyproject.toml)"
	@echo "make types   check the types of the package with mypy (strict; settings in pyproject.toml)"
	@echo "make bench   time a training step against its peers"
	@echo "make suite   the whole benchmark, half an hour; ARGS=--quick: minutes"
	@echo "make docs    build the documentation into docs/_build/html; warnings are errors"
	@echo "make build   create the environment and build fastreg in place"
	@echo "make env     show what is installed, what is missing and why"
	@echo "make clean   remove what the build made (keeps $(VENV))"
	@echo "variables: PYTHON VENV ARGS WORKERS FASTREG_CUDA=auto|0|1 (see the top of the Makefile)"

demo: $(READY)
	$(BIN_PYTHON) -m fastreg train $(ARGS)

test: $(TEST_READY) $(PEERS_READY)
	OMP_NUM_THREADS=1 $(BIN_PYTHON) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# ruff alone: it needs neither torch nor a build.
lint: $(LINT_READY)
	$(BIN_PYTHON) -m ruff check $(ARGS)

# mypy reads torch's types. In a checkout the kernels are another folder than their place in the package.
types: $(TYPES_READY)
	@mkdir -p build/types/fastreg && touch build/types/fastreg/__init__.py
	@ln -sfn ../../../kernels build/types/fastreg/kernels
	$(BIN_PYTHON) -m mypy $(ARGS)

bench: $(READY) $(PEERS_READY)
	$(BIN_PYTHON) -m fastreg bench $(ARGS)

suite: $(READY) $(PEERS_READY)
	$(BIN_PYTHON) bench/suite.py $(ARGS)

docs: $(DOCS_READY)
	$(BIN_PYTHON) -m sphinx -W --keep-going -d docs/_build/doctrees docs docs/_build/html $(ARGS)

env: $(READY)
	$(BIN_PYTHON) -m fastreg env $(ARGS)

# While working on csrc: `python setup.py build_ext --inplace` recompiles only what changed.
build: $(READY)

ifeq ($(strip $(VENV)),)
# No dependency is installed, so that no resolver touches the torch that is there.
$(READY): $(INPUTS)
	$(BIN_PYTHON) -c "import numpy, pybind11, setuptools, torch"
	$(PIP) install --no-build-isolation --no-deps --editable .
	@mkdir -p $(@D) && touch $@

$(TEST_READY): $(READY)
	$(BIN_PYTHON) -c "import hypothesis, pytest, pytest_benchmark, xdist"
	@touch $@

# Of the packages that are compared with, those that are there are measured; the others are skipped by name.
$(PEERS_READY): $(READY)
	@touch $@

$(DOCS_READY): $(READY)
	$(BIN_PYTHON) -c "import furo, latex2mathml, myst_parser, sphinx"
	@touch $@

$(LINT_READY):
	$(BIN_PYTHON) -c "import ruff"
	@mkdir -p $(@D) && touch $@

$(TYPES_READY): $(READY)
	$(BIN_PYTHON) -c "import mypy"
	@touch $@
else
# torch first and alone: what comes after finds it there and cannot pull in another one.
$(READY): $(INPUTS) | $(VENV)/bin/pip
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt setuptools wheel pybind11
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[demo]'
	@touch $@

# fastreg is there already, so these install the extra's packages and nothing else.
$(TEST_READY): $(READY)
	$(PIP) install --quiet --constraint constraints.txt 'fastreg[test]'
	@touch $@

$(PEERS_READY): $(READY) bench/peers.txt
	$(PIP) install --quiet --no-deps --requirement bench/peers.txt
	@touch $@

$(DOCS_READY): $(READY)
	$(PIP) install --quiet --constraint constraints.txt 'fastreg[docs]'
	@touch $@

$(LINT_READY): constraints.txt | $(VENV)/bin/pip
	$(PIP) install --quiet --constraint constraints.txt ruff
	@touch $@

$(TYPES_READY): $(READY)
	$(PIP) install --quiet --constraint constraints.txt mypy
	@touch $@

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)
endif

clean:
	rm -rf build dist *.egg-info docs/_build fastreg/*.so fastreg/_build_info.json .ruff_cache
	rm -f $(READY) $(TEST_READY) $(PEERS_READY) $(DOCS_READY) $(LINT_READY) $(TYPES_READY)
