# make demo   tune the shipped backbone on two ranks, before and after (minutes, two CPU cores or GPUs)
# make test   all tests
# make check  style, types, formatting
# Each makes .venv and installs what it needs first. PYTHON=… chooses the interpreter (3.10 or newer).

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test check
demo: $(INSTALLED)
	$(BIN)/ptd quickstart --output quickstart --overwrite

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
