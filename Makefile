.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test check format reproduce reproduce-all bench lds peers clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# Each stamp is made once, and again when the requirements change.
.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/dev: .venv/core
	$(BIN)/pip install --quiet -c constraints.txt -e . --group dev
	@touch $@

demo: .venv/core  ## Explain, audit and prove a model of handwritten digits (about a minute)
	$(BIN)/upweight demo

test: .venv/dev  ## Run all tests
	$(BIN)/pytest -n auto

check: .venv/dev  ## Format, lint, types, tests and documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto

format: .venv/dev  ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

reproduce: .venv/dev  ## The paper but for its long experiments (half an hour; needs data), and docs/paper.md
	$(BIN)/python -m reproduce quick --jobs 2

reproduce-all: .venv/dev  ## The long ones too: network retraining and attacks (hours; a killed run goes on)
	$(BIN)/python -m reproduce all --jobs 2

bench: .venv/dev  ## Cost and error of all tasks, with the peers of `make peers` (hours; BENCH=--resume goes on)
	$(BIN)/python -m benchmarks.harness $(BENCH)

lds: .venv/dev  ## Scores judged by stored retrainings, with the peers of `make peers` (runs what has no scores yet)
	$(BIN)/python -m benchmarks.lds $(LDS)

peers: .venv/dev  ## Install peers for `make bench` into environments of their own
	bash benchmarks/setup_peers.sh

clean:  ## Remove environments and caches
	rm -rf .venv .venv-peers* .pytest_cache .mypy_cache .ruff_cache .hypothesis
