PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

.PHONY: demo test lint docs clean

## Train on real handwritten digits with two workers, print the summary, draw the plot (about two minutes from nothing)
demo: $(VENV)/.installed-examples
	$(BIN)/python examples/digits.py

## Run the whole test suite
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

## Check format, lint and types
lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

## Build the documentation into site/
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# One stamp per extra: a second call installs nothing, a changed pyproject.toml installs again.
$(VENV)/.installed-%: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@
