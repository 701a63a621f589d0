# Two commands matter: `make demo` and `make test`. Each does its own set-up, and is fast when it is done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-faults slow lint format size lock clean help

help:
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile

install: $(STAMP) ## the environment in .venv, with pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python >= 3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 -e '.[dev]'
	@touch $@

demo: install ## fine-tune the embedded model and see what it learnt
	@$(BIN)/maese demo

test: install ## the tests, without a network
	@$(BIN)/python -m pytest -n logical

slow: install ## the tests that take minutes or many gigabytes
	@$(BIN)/python -m pytest -m slow

test-faults: install ## kills, full disks, broken files: what was saved stays whole
	@$(BIN)/python -m pytest -n logical -m faults tests/faults

lint: install ## style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: install
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

size: install ## files, lines, longest functions, dependencies
	@$(BIN)/python scripts/size.py

lock: ## write constraints.txt from what is installed now
	@$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
