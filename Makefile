PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
OLDEST ?= .venv-oldest
NIGHTLY ?= .venv-nightly
CLIENTS ?= .venv-clients
RELEASE ?= .venv-release

.PHONY: demo test test-ray test-bench test-oldest test-clients test-gpu test-nightly build bench bench-gpu paper lint docs clean

## Train on real handwritten digits with ddp, adpsgd and adpsgd_int4, print a table, draw a picture (under a minute once installed)
demo: $(VENV)/.installed-examples
	$(BIN)/python examples/demo.py

## Run the tests of the package and its examples
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore=tests/benchmarks --ignore=tests/clients --ignore=tests/ray

## Run the tests of Ray Train, with a local Ray of two workers
test-ray: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/ray

## Run the tests of the benchmarks (those on links need Linux and root, and are skipped otherwise)
test-bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/benchmarks

## Run the whole test suite with the oldest supported versions, in an environment of its own (about 5.5 GB)
test-oldest: $(OLDEST)/.installed-dev
	$(OLDEST)/bin/python -m pytest --ignore=tests/clients

## Train other people's projects under ddp and adpsgd, and write docs/clients.md, in an environment of its own (about 6 GB)
SEEDS ?= 1
test-clients: $(CLIENTS)/.installed
	$(CLIENTS)/bin/python -m pytest tests/clients --seeds "$(SEEDS)"

# On a machine without a network, with the folder that .ci/pack_offline.py has packed: make test-gpu OFFLINE=offline
OFFLINE ?=
GPU_PYTHON = $(if $(OFFLINE),PYTHONPATH=$(abspath $(OFFLINE)/site):$(CURDIR) $(PYTHON),$(BIN)/python)

## Run the tests that need a GPU (skipped where there is none)
test-gpu: $(if $(OFFLINE),,$(VENV)/.installed-dev)
	$(GPU_PYTHON) -m pytest tests/gpu

## Measure on one GPU, and write logs/gpu.json and a page, logs/gpu.md
bench-gpu: $(if $(OFFLINE),,$(VENV)/.installed-bench)
	mkdir -p logs
	$(GPU_PYTHON) -m benchmarks.gpu --json logs/gpu.json > logs/gpu.md; status=$$?; cat logs/gpu.md; exit $$status

## Run the package's tests with PyTorch's nightly build and Lightning's main branch, in an environment of its own
test-nightly: $(NIGHTLY)/.installed-dev
	$(NIGHTLY)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore=tests/benchmarks --ignore=tests/clients

## Build the sdist and the wheel into dist/ and check them, the wheel in an empty folder
build: $(RELEASE)/.installed $(VENV)/.installed-dev
	rm -rf dist
	$(RELEASE)/bin/python -m build
	$(RELEASE)/bin/twine check --strict dist/*
	$(BIN)/python .ci/check_distribution.py dist

## Run short benchmarks that need no GPU and print one page (about six minutes; those on links run only as root)
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
	rm -rf $(VENV) $(OLDEST) $(NIGHTLY) $(CLIENTS) $(RELEASE) site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/pip $(OLDEST)/bin/pip $(NIGHTLY)/bin/pip $(CLIENTS)/bin/pip $(RELEASE)/bin/pip:
	$(PYTHON) -m venv $(@:/bin/pip=)

# One stamp per extra: a second call installs nothing, a changed pyproject.toml installs again.
$(VENV)/.installed-%: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

$(OLDEST)/.installed-%: pyproject.toml tests/oldest.txt | $(OLDEST)/bin/pip
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check --constraint tests/oldest.txt -e '.[$*]'
	touch $@

# PyTorch first, so that what needs it takes the nightly build that is there.
PYTORCH_NIGHTLY ?= https://download.pytorch.org/whl/nightly/cpu
LIGHTNING_MAIN  ?= https://github.com/Lightning-AI/pytorch-lightning/archive/refs/heads/master.zip
$(NIGHTLY)/.installed-%: pyproject.toml | $(NIGHTLY)/bin/pip
	$(NIGHTLY)/bin/pip install --quiet --disable-pip-version-check --pre --index-url $(PYTORCH_NIGHTLY) torch torchvision
	$(NIGHTLY)/bin/pip install --quiet --disable-pip-version-check -e '.[$*]' 'lightning @ $(LIGHTNING_MAIN)'
	touch $@

# Their lowest versions with `make test-clients CLIENTS=.venv-clients-oldest CONSTRAINTS=tests/clients/oldest.txt`.
CONSTRAINTS ?=
$(CLIENTS)/.installed: pyproject.toml tests/clients/requirements.txt $(CONSTRAINTS) | $(CLIENTS)/bin/pip
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check $(addprefix --constraint ,$(CONSTRAINTS)) -r tests/clients/requirements.txt
	touch $@

# Apart from the others: twine brings rich, with which Lightning shows other tables and progress bars.
$(RELEASE)/.installed: Makefile | $(RELEASE)/bin/pip
	$(RELEASE)/bin/pip install --quiet --disable-pip-version-check 'build>=1.2' 'twine>=6.1'
	touch $@
