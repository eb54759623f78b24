# Layerwise: every command of the project. `make` alone lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := torch==2.13.0
# A process for each core; a file's tests stay together, for some share what they compute. tests/conftest.py says which
# files start first: those of few tests, which xdist would leave for the end, may take long.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder
# Tests start a hundred processes that import the library: it is compiled once.
unexport PYTHONDONTWRITEBYTECODE

# The first of these that runs and is Python 3.11 or newer; `make PYTHON=... test` overrides it.
IS_RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	"$$p" -c '$(IS_RECENT)' 2>/dev/null && { echo "$$p"; break; }; done)

# Data sets that lie beside the checkout are used; otherwise benchmarks/data.py downloads them.
ifndef LAYERWISE_DATA
ifneq ($(wildcard ../shared/data/.),)
export LAYERWISE_DATA := $(CURDIR)/../shared/data
endif
endif

.PHONY: help demo test test-all lint format support ecosystem docs reproduce-locoprop overhead device-check benchmarks clean

help:  ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(INSTALLED)  ## Train an autoencoder with five methods side by side; writes demo/
	$(BIN)/layerwise demo

test: lint  ## Lint, check types, and run the tests (what .ci/run calls)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: lint  ## Run all tests, the slow ones too, with a new seed each time (LAYERWISE_SEED=... repeats one)
	@export LAYERWISE_SEED="$${LAYERWISE_SEED:-$$(( $$(date +%s) % 100000 ))}"; \
	echo "LAYERWISE_SEED=$$LAYERWISE_SEED"; \
	$(BIN)/python -m pytest $(PARALLEL) --hypothesis-seed="$$LAYERWISE_SEED"

lint: $(INSTALLED)  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## Mend style and format where that is automatic
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

support: $(INSTALLED)  ## Write docs/support.md and docs/calls.md, what works with what, from a run of the tests
	$(BIN)/python -m pytest -q tests/test_matrix.py tests/test_every_name.py --write-support

ecosystem: $(INSTALLED)  ## Install the packages of docs/trainers.md and docs/ecosystem.md, and run the tests with them
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/ecosystem.txt
	$(BIN)/python -m pytest tests/test_trainers_page.py tests/test_ecosystem.py

# Torch and all else that lock.txt names stay as they are; the site is made from the checkout, and asks no host.
docs: $(INSTALLED)  ## Build the documentation into site/, every page run; open site/index.html
	$(BIN)/python -m pip install --quiet -r requirements/docs.txt -c requirements/lock.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

reproduce-locoprop: $(INSTALLED)  ## Train the LocoProp paper's autoencoder on MNIST beside the authors' curve
	$(BIN)/python -m benchmarks.papers.reproduce_locoprop

overhead: $(INSTALLED)  ## Measure costs beside the peers that are installed (hours; goes on where it stopped)
	$(BIN)/python -m benchmarks.speed.overhead

device-check: $(INSTALLED)  ## Show on this machine's GPU what works and what it costs (8 minutes; goes on where it stopped)
	$(BIN)/python -m benchmarks.device

benchmarks: $(INSTALLED)  ## Install what benchmarks/training needs (Benchopt, pytorch_optimizer); show its estimate
	$(BIN)/python -m pip install --quiet -r requirements/benchmarks.txt -c requirements/lock.txt
	$(BIN)/python -m benchmarks.training --dry-run

clean:  ## Remove what the commands write, except .venv
	rm -rf demo site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		benchmarks/training/outputs benchmarks/training/__cache__
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch goes first and alone, so that plain pip takes whichever build it is set up to find.
$(INSTALLED): requirements/lock.txt requirements/peers.txt pyproject.toml
	@if ! test -x $(BIN)/pip; then \
		"$(PYTHON)" -c '$(IS_RECENT)' 2>/dev/null || { \
			echo "layerwise needs Python 3.11 or newer; found: $(or $(PYTHON),none on the PATH)." \
				"Install it, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }; \
		echo "Making $(VENV) with $(PYTHON)"; \
		"$(PYTHON)" -m venv --clear $(VENV); \
	fi
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet -r requirements/lock.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/peers.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@
