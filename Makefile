# `make demo` and `make test` each do all of their own set-up: a virtual environment, pinned dependencies, then the job.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
UV     ?= uv==0.13.8
TORCH  ?= torch==2.13.0
OUT    ?= demo
# Real digits for the demo, where they are at hand; else it takes scikit-learn's.
MNIST  ?= $(firstword $(wildcard mnist data/mnist ../data/mnist ../shared/data/mnist))
# Where pip is configured with wheels on disk, those are used; elsewhere uv picks the torch build for the driver it finds.
LINKS  := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
SOURCE := $(if $(LINKS),$(foreach link,$(LINKS),--find-links $(link)),--torch-backend $(or $(TORCH_BACKEND),auto))
INSTALL = $(BIN)/uv pip install -q -p $(BIN)/python $(SOURCE) -c constraints.txt $(TORCH)

.PHONY: demo test test-all bench lint format docs mutations clean

demo: $(VENV)/.demo
	$(BIN)/ddim demo --out $(OUT) $(if $(MNIST),--mnist $(MNIST))

test: $(VENV)/.dev
	$(BIN)/python -m pytest

# With the slow tests: processes that are killed, peers, notebooks, mutated files.
test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -m 'slow or not slow'

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Any warning, of the docstrings' parser too, is an error; --clean because cached pages do not warn again.
docs: $(VENV)/.docs
	$(BIN)/python scripts/equations.py
	@log=$$($(BIN)/zensical build --strict --clean --config-file mkdocs.yml 2>&1); status=$$?; echo "$$log"; \
	  test $$status -eq 0 && ! echo "$$log" | grep -q '^griffe:'
	@echo 'site: build/site/index.html'

mutations: $(VENV)/.dev
	$(BIN)/python scripts/mutations.py

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON): is older than Python 3.11; run make with PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check $(UV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/uv
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/uv
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/uv
	$(INSTALL) -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .cache *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
