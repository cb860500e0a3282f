# `make demo`, `make test` and `make lint` set up .venv by themselves.
# PYTHON picks another interpreter (3.10 or newer): make test PYTHON=python3.12

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -euc
.DEFAULT_GOAL := help

# All paths are relative to the Makefile's folder, so `make -f path/to/Makefile`
# and `make -C` work the same.
ROOT := $(abspath $(dir $(lastword $(MAKEFILE_LIST))))
PYTHON ?= python3
VENV := $(ROOT)/.venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One thread per process in tests: tensors are tiny, and DDP tests start several
# processes, whose OpenMP pools would compete for the same cores.
TEST_THREADS ?= 1
# Processes: "auto" is one for each core, 0 is pytest's own process only.
TEST_PROCESSES ?= auto
# Options for pytest: make test PYTEST="-k reversible -x"
PYTEST ?=

.PHONY: help demo test lint format clean

help:
	@echo "make demo    train a reversible ResNet and a transducer on synthetic speech (CPU, about 10 minutes)"
	@echo "make test    lint, then the test suite        PYTEST=\"-k name -x\" narrows it"
	@echo "make lint    ruff check, ruff format --check and types (pyrefly)"
	@echo "make format  let ruff rewrite the files"
	@echo "make clean   remove .venv and caches (results/ and data/ stay)"

# pip prints one 'Location ... is ignored' warning for each index folder that
# lacks a package; --quiet does not silence warnings, a second one does. Errors
# still show. The stamp comes last, so a broken install is tried again.
$(STAMP): $(ROOT)/pyproject.toml
	@echo "Setting up $(VENV) (about 2 minutes, 5 GB, once) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "sb_memeff needs Python 3.10 or newer: make PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@cd $(ROOT) && $(BIN)/python -m pip install -qq \
		--disable-pip-version-check --editable ".[test,demo]"
	@touch $@

demo: $(STAMP)
	@cd $(ROOT) && $(BIN)/python demo/run_demo.py

lint: $(STAMP)
	@cd $(ROOT) && $(BIN)/ruff check --quiet . && \
		$(BIN)/ruff format --quiet --check . && \
		{ found=$$($(BIN)/pyrefly check --output-format min-text \
			--python-interpreter-path $(BIN)/python 2>&1) || \
			{ echo "$$found" >&2; exit 1; }; } && echo "lint: ok"

test: lint
	@cd $(ROOT) && OMP_NUM_THREADS=$(TEST_THREADS) MKL_NUM_THREADS=$(TEST_THREADS) \
		PATH="$(BIN):$$PATH" \
		$(BIN)/python -m pytest -q -ra --durations=10 \
		-n $(TEST_PROCESSES) --dist worksteal $(PYTEST)

format: $(STAMP)
	@cd $(ROOT) && $(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(ROOT)/.pytest_cache $(ROOT)/.ruff_cache $(ROOT)/*.egg-info
	find $(ROOT)/sb_memeff $(ROOT)/tests $(ROOT)/demo $(ROOT)/recipes \
		-name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
