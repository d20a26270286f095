# One command each: `make demo`, `make test`. Everything installs into .venv and contracts/node_modules.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LLAMA_STAMP := $(VENV)/.llama
NPM_STAMP := contracts/node_modules/.installed
export HF_HUB_OFFLINE := 1

.PHONY: help setup prerequisites demo test test-fast check bench bench-engine audit-bench format clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

prerequisites:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is missing: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	@command -v gcc >/dev/null || { echo "gcc is missing (fastecdsa is compiled at installation): apt-get install gcc"; exit 1; }
	@echo '#include <gmp.h>' | gcc -E - >/dev/null 2>&1 || \
	  { echo "gmp.h is missing (fastecdsa needs it): apt-get install libgmp-dev"; exit 1; }
	@echo '#include <Python.h>' | gcc -E $$($(PYTHON) -c 'import sysconfig; print("-I" + sysconfig.get_path("include"))') - >/dev/null 2>&1 || \
	  { echo "Python.h is missing (fastecdsa needs it): apt-get install python3-dev"; exit 1; }
	@command -v node >/dev/null && node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)' || \
	  { echo "Node.js 20 or newer is missing: https://nodejs.org, or apt-get install nodejs npm where that is 20"; exit 1; }
	@command -v npm >/dev/null || { echo "npm is missing: apt-get install npm"; exit 1; }

$(STAMP): pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory prerequisites
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(LLAMA_STAMP): $(STAMP)
	@command -v g++ >/dev/null || { echo "g++ is missing (llama.cpp is compiled for tests and bench-engine): apt-get install g++"; exit 1; }
	@echo "compiling llama.cpp for this processor, for tests and bench-engine: five minutes on two cores, once"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[llama]'
	@touch $@

$(NPM_STAMP): contracts/package.json contracts/package-lock.json
	@$(MAKE) --no-print-directory prerequisites
	cd contracts && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@

setup: $(STAMP) $(NPM_STAMP) ## install everything; a second run does nothing

demo: setup ## a market on this machine: a kill -9, a cheat caught and slashed, every wei checked
	@$(BIN)/tally devnet demo

check: setup ## ruff, mypy strict, import-linter, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m contracts.generate --check
	$(BIN)/python -m contracts.audit_vectors --check

test-fast: setup ## unit and property tests, under 2 minutes
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile

test: check $(LLAMA_STAMP) ## everything that CI runs
	$(BIN)/pytest -n 2 --dist loadfile

bench: setup ## ratios against the bare engine, gas, signatures; JSON in bench-results/
	$(BIN)/python -m devnet.bench

bench-engine: setup $(LLAMA_STAMP) ## our engine against llama.cpp and transformers over the same weights
	$(BIN)/python -m devnet.bench.engine

audit-bench: setup ## how soon each cheat is caught, that no honest work is, what auditing costs; JSON in bench-results/
	$(BIN)/python -m devnet.bench.audit

format: setup ## rewrite in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what was installed or generated
	rm -rf $(VENV) contracts/node_modules contracts/cache contracts/out .mypy_cache .ruff_cache bench-results
