# Everything runs in .venv. The first target that needs it sets it up; later ones find it ready, until
# the pins or the project file change. Only Python 3.11 or newer with pip, and make, must be there.
PYTHON ?= python3
PYTEST_FLAGS ?=
BIN := .venv/bin
READY := .venv/.ready
# Many images set it. Every process would compile all that it imports anew, which takes longer than most tests.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run test test-slow test-federation test-others lint types docs check clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1:/p' Makefile | awk -F: '{ printf "make %-15s %s\n", $$1, $$2 }'

run: $(READY) ## Fine-tune the embedded model on unequal simulated clients, and write the report
	OMP_NUM_THREADS=1 $(BIN)/fedflame run --overwrite --workers 2 # its products are too small to share by threads

test: $(READY) ## Run the tests but those marked federation or slow (PYTEST_FLAGS="-k name" picks some)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m "not federation and not slow" $(PYTEST_FLAGS)

test-slow: $(READY) ## Run the tests marked slow
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m slow $(PYTEST_FLAGS)

test-federation: $(READY) ## Run the tests marked federation, one after another
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/engines -m federation $(PYTEST_FLAGS)

test-others: $(READY) ## Run the tests but those marked federation, the slow ones among them
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m "not federation" $(PYTEST_FLAGS)

lint: $(READY) ## Check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY) ## Check types
	$(BIN)/mypy

docs: $(READY) ## Build the documentation site, docs/_build/html/index.html
	$(BIN)/sphinx-build -W --keep-going -q -c docs -d docs/_build/doctrees . docs/_build/html

# Federations mostly wait, so that they run beside all the rest. What is slow runs with the others: every process
# that runs tests imports all of them first.
check: $(READY) ## Everything that CI checks: style, types, the documentation site, all tests
	$(MAKE) --keep-going --jobs=2 --output-sync=target test-federation test-others lint types docs

clean: ## Remove .venv, caches and builds; runs/ stays
	rm -rf .venv dist build docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The pinned pip comes first: it takes half of the time that the one of Python 3.11 takes. --no-compile: most modules
# of the packages are never imported, and compiling all of them takes longer than what is left.
# --no-build-isolation: the build back end is pinned beside everything else, so nothing unpinned is fetched.
$(READY): requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found=$$($(PYTHON) --version 2>&1) || found="not there"; \
		echo "fedflame needs Python 3.11 or newer, $(PYTHON) is $$found; try: make PYTHON=python3.11" >&2; exit 1; }
	@echo "Setting up .venv (once, a few minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check "$$(grep '^pip==' requirements-dev.txt)"
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -r requirements-dev.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
