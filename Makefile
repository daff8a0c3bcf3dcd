# make demo   train the quickstart recipe and print its table     make test   everything that has to pass
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
STAMP := $(VENV)/.installed
# Peers that tests compare with; their pins conflict with everybody's, so they come without dependencies.
PEERS := torchattacks foolbox eagerpy GitPython gitdb smmap requests urllib3 idna certifi charset-normalizer scipy

.PHONY: setup demo test test-slow bench lint clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[demo,dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps $(PEERS)
	touch $(STAMP)

setup: $(STAMP)

demo: setup
	$(BIN)/lightning-robust fit quickstart --beside standard

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

bench: setup
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf $(VENV) runs build dist .mypy_cache .pytest_cache .ruff_cache
