# Everything happens in .venv; PYTHON picks the interpreter that makes it (3.11 or later).
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test
BIN := $(VENV)/bin
# A module's tests stay on one worker, with its fixtures and compiled programs.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test lint types unit parity slow faults docs env clean

demo: env
	$(BIN)/python -m experiments.quickstart

test: lint types unit

env: $(VENV)/.installed-$(EXTRAS)

$(VENV)/.installed-$(EXTRAS): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, found " + sys.version.split()[0] + "; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: env
	$(BIN)/basedpyright --pythonpath $(BIN)/python --warnings

unit: env
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Against torch; skipped, with the reason, where the extra has no torch for this Python.
parity:
	$(MAKE) env EXTRAS=test,parity
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m parity tests

# Whole experiments and notebooks at their smallest.
slow: env
	KLRLHF_SLOW=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow tests

# Kills, damages and fuzzes by seed, the slow ones too: minutes.
faults: env
	KLRLHF_FAULTS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests/faults

# The documentation, offline, warnings as errors: docs/_build/html/index.html.
docs:
	$(MAKE) env EXTRAS=test,docs
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .cache build dist results docs/_build
