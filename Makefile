# Two commands do everything on a machine with Python >= 3.11 and make:  `make demo`  and  `make test`.
# Set-up is done once, and again when pyproject.toml changes. Pick an interpreter with `make demo PYTHON=python3.12`.

SHELL := /bin/bash
VENV ?= .venv
VENV_OLDEST ?= .venv-5.17
TORCH ?= torch==2.13.0
OLDEST_TRANSFORMERS ?= transformers==5.17.0
BIN := $(VENV)/bin
# Two processes of one thread each: several threads in each would wait for one another.
ONE_THREAD := OMP_NUM_THREADS=1
PYTEST := -m pytest -q -n 2
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1 && { echo $$p; break; }; done)
PIP := -m pip install --quiet --disable-pip-version-check

# The tests of what depends on the transformers version: all but those of the packaging, the command line and the benchmarks.
CORE_TESTS = $(filter-out tests/test_packaging.py tests/test_cli%.py tests/test_bench%.py,$(wildcard tests/test_*.py))

.PHONY: help demo test test-slow test-long lint wheel-check test-oldest setup clean
help:
	@echo "make demo         set up, then answer real prompts with transformers and with hf_paged, side by side"
	@echo "make test         set up, then lint and run the tests"
	@echo "make test-slow    the tests that take long"
	@echo "make test-long    the tests that take very long: an hour or two"
	@echo "make test-oldest  the core tests with $(OLDEST_TRANSFORMERS), the oldest version supported"
	@echo "make wheel-check  build the wheel, install it elsewhere and generate with it"
	@echo "make lint         ruff alone"
	@echo "make clean        remove everything made here"

demo: $(VENV)/.ready
	$(BIN)/hf-paged demo

test: lint
	$(ONE_THREAD) $(BIN)/python $(PYTEST) -m "not slow and not long"

# pytest ends with 5 where no test is marked slow: not a failure here.
test-slow: $(VENV)/.ready
	$(ONE_THREAD) $(BIN)/python $(PYTEST) -m "slow and not long" || test $$? -eq 5

test-long: $(VENV)/.ready
	$(ONE_THREAD) $(BIN)/python $(PYTEST) -m long

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

wheel-check: $(VENV)/.ready
	TORCH="$(TORCH)" .ci/wheel-check $(BIN)/python

test-oldest: $(VENV_OLDEST)/.ready
	$(ONE_THREAD) $(VENV_OLDEST)/bin/python $(PYTEST) -m "not slow and not long" -p no:cacheprovider $(CORE_TESTS)

setup: $(VENV)/.ready

# torch first and pinned: development and CI use one version, the package itself asks for a range.
$(VENV)/.ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "hf_paged needs Python 3.11 to 3.14; none was found. Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON) (a few minutes, once)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) "$(TORCH)"
	$(BIN)/python $(PIP) -e ".[dev]"
	touch $@

$(VENV_OLDEST)/.ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "hf_paged needs Python 3.11 to 3.14; none was found." >&2; exit 1; }
	test -x $(VENV_OLDEST)/bin/python || $(PYTHON) -m venv $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/python $(PIP) "$(TORCH)"
	$(VENV_OLDEST)/bin/python $(PIP) -e ".[dev]" "$(OLDEST_TRANSFORMERS)"
	touch $@

clean:
	rm -rf $(VENV) $(VENV_OLDEST) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
