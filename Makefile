# Start with `make quickstart`. `make help` lists all targets.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 2
TORCH_INDEX ?=

RUN := $(VENV)/bin
INSTALL = $(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help quickstart test test-slow check docs clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   set up $(VENV), then train and evaluate a small visual language model"
	@echo "make test         the default tests (no GPU, no network)"
	@echo "make test-slow    tests that take minutes or download files"
	@echo "make check        ruff, mypy, import-linter, codespell"
	@echo "make docs         the documentation site, in site/"
	@echo "make clean        remove caches and build results; $(VENV) and runs/ stay"
	@echo ""
	@echo "ARGS=...          passed to the command: make quickstart ARGS='--minutes 3 --output runs/short', make test ARGS='-k chat'"
	@echo "JOBS=2           worker processes of make test; 0 runs the tests in one process, for a debugger"
	@echo "PYTHON=...        Python interpreter for $(VENV), 3.11 or newer; now $(PYTHON)"
	@echo "TORCH_INDEX=...   additional package index for PyTorch. On Linux without a GPU, the CPU build saves"
	@echo "                  gigabytes: TORCH_INDEX=https://download.pytorch.org/whl/cpu"

quickstart: $(VENV)/.runtime
	$(RUN)/vila quickstart $(ARGS)

# Two workers, one test file at a time: tests of a file share fixtures, and blocks of a page depend on each other.
test: $(VENV)/.dev
	$(RUN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-slow: $(VENV)/.dev
	$(RUN)/python -m pytest -m "slow and not gpu" $(ARGS)

check: $(VENV)/.dev
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports --no-logo
	$(RUN)/codespell

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The Python version is checked when the environment is created. pip is installed last, so an environment with pip is complete.
$(RUN)/pip:
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))' \
		2>/dev/null) || { \
		echo "vila needs Python 3.11 or newer, but '$(PYTHON)' is $${version:-not a working Python}." >&2; \
		echo "Use another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamp file records that pip finished for this pyproject.toml and constraints.txt, so a second run does not call pip.
$(VENV)/.runtime: pyproject.toml constraints.txt | $(RUN)/pip
	@echo "Installing vila and its dependencies into $(VENV); PyTorch is large, this can take minutes."
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(RUN)/pip
	@echo "Installing vila and its development tools into $(VENV); PyTorch is large, this can take minutes."
	@$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.runtime $@
