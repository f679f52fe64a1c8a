# `make demo` and `make test` do all their own set-up; each can be repeated.
# pip's own settings are honoured: PIP_EXTRA_INDEX_URL for a CPU build of torch, for instance.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# The recipe of the README on a small model that is trained here: under 15 minutes.
.PHONY: setup demo study test lint format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "tomexport needs Python 3.10 or newer; set PYTHON=…"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py

study: $(STAMP)
	$(BIN)/python -m benchmarks.study

test: $(STAMP) lint
	$(BIN)/python -m pytest -n logical --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo study .pytest_cache .mypy_cache .ruff_cache .hypothesis
