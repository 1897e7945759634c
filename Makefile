PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
OLDEST ?= .venv-oldest

.PHONY: demo test test-ray test-bench test-oldest bench paper lint docs clean

## Train on real handwritten digits with two workers, print the summary, draw the plot (about two minutes from a fresh clone)
demo: $(VENV)/.installed-examples
	$(BIN)/python examples/digits.py

## Run the tests of the package and its examples
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore=tests/benchmarks --ignore=tests/ray

## Run the tests of Ray Train, with a local Ray of two workers
test-ray: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/ray

## Run the tests of the benchmarks (those on links need Linux and root, and are skipped otherwise)
test-bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/benchmarks

## Run the whole test suite with the oldest supported versions, in an environment of its own (about 5.5 GB)
test-oldest: $(OLDEST)/.installed-dev
	$(OLDEST)/bin/python -m pytest

## Run short benchmarks that need no GPU and print one page (about five minutes; those on links run only as root)
bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks

## Repeat the paper's comparison in short: one network, one seed, part of CIFAR-10 (downloaded, unless it is in DATA)
DATA ?= data
paper: $(VENV)/.installed-examples
	$(BIN)/python -m benchmarks.paper --scale short --data $(DATA)

## Check format, lint and types
lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

## Build the documentation into site/
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(OLDEST) site .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/pip $(OLDEST)/bin/pip:
	$(PYTHON) -m venv $(@:/bin/pip=)

# One stamp per extra: a second call installs nothing, a changed pyproject.toml installs again.
$(VENV)/.installed-%: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

$(OLDEST)/.installed-%: pyproject.toml tests/oldest.txt | $(OLDEST)/bin/pip
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check --constraint tests/oldest.txt -e '.[$*]'
	touch $@
