# make demo   train the quickstart recipe and print its table     make test   everything that has to pass
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
STAMP := $(VENV)/.installed
# Of two files that pin the same package, the first one wins.
CONSTRAINTS := constraints.txt
PIN := $(VENV)/constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(PIN)
# Peers that tests compare with; their pins conflict with everybody's, so they come without dependencies.
PEERS := torchattacks foolbox eagerpy GitPython gitdb smmap requests urllib3 idna certifi charset-normalizer scipy scikit-image lazy_loader
BENCH_PEERS := adversarial-robustness-toolbox six netcal pyro-ppl pyro-api opt_einsum pytorch-ood

.PHONY: setup demo tests test test-lowest test-slow bench lint clean

$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	awk -F== '!seen[$$1]++' $(CONSTRAINTS) > $(PIN)
	$(PIP) torch
	$(PIP) --editable ".[demo,dev]"
	$(PIP) --no-deps $(PEERS)
	touch $(STAMP)

setup: $(STAMP)

demo: setup
	$(BIN)/lightning-robust fit quickstart --beside standard

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A file to a process: what the tests of a file share is made once.
tests: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: lint tests

# The suite once more, on the lowest versions that pyproject.toml allows.
test-lowest:
	$(MAKE) tests VENV=.venv-lowest CONSTRAINTS="constraints-lowest.txt constraints.txt"

test-slow: setup
	$(BIN)/python -m pytest -m slow

bench: setup
	$(PIP) --no-deps $(BENCH_PEERS)
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf $(VENV) $(VENV)-lowest runs build dist .mypy_cache .pytest_cache .ruff_cache
