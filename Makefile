# Both targets set up everything they need in .venv; only Python 3.11+, make, git and a C++ compiler must be there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := demo
PROMPT := Generate an image with a large polyp.
TRAIN  :=

.PHONY: demo test lint format clean

demo: $(VENV)/installed
	DEMO=$(DEMO) PROMPT="$(PROMPT)" TRAIN="$(TRAIN)" BIN=$(BIN) bash docs/demo.sh

test: lint
	$(BIN)/pytest -q -n 2 --dist loadgroup -m "not slow"
	$(BIN)/pytest -q -n 2 --dist loadgroup -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "medsynth needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
