# make quickstart is all that a stranger needs. `make help` lists the rest.
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
	@echo "make quickstart   set up $(VENV), then train, evaluate and ask a small visual language model"
	@echo "make test         the default tests (no GPU, no network)"
	@echo "make test-slow    the tests that take minutes or fetch something"
	@echo "make check        ruff, mypy, import-linter, codespell"
	@echo "make docs         the documentation, in site/"
	@echo "make clean        remove caches and build results; $(VENV) and runs/ stay"
	@echo ""
	@echo "ARGS=...          passed on: make quickstart ARGS='--minutes 3 --output runs/short', make test ARGS='-k chat'"
	@echo "JOBS=2           test processes of make test; 0 runs the tests in one process, as a debugger needs"
	@echo "PYTHON=...        the Python (3.11 or newer) that $(VENV) is made from; now $(PYTHON)"
	@echo "TORCH_INDEX=...   one more package index for PyTorch. On Linux without a GPU, the CPU build saves"
	@echo "                  gigabytes: TORCH_INDEX=https://download.pytorch.org/whl/cpu"

quickstart: $(VENV)/.runtime
	$(RUN)/vila quickstart $(ARGS)

# Two workers, a test file at a time: files share fixtures, and blocks of a page build on each other.
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

# The Python is checked when the environment is made; after that it has done its part. pip comes last into a new
# environment, so an environment with pip is whole.
$(RUN)/pip:
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))' \
		2>/dev/null) || { \
		echo "vila needs Python 3.11 or newer, but '$(PYTHON)' is $${version:-no Python that runs}." >&2; \
		echo "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp says that pip has finished with this pyproject.toml and these constraints: a second run calls no pip.
$(VENV)/.runtime: pyproject.toml constraints.txt | $(RUN)/pip
	@echo "Installing vila and what it needs into $(VENV); PyTorch is large, this can take minutes."
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(RUN)/pip
	@echo "Installing vila and its development tools into $(VENV); PyTorch is large, this can take minutes."
	@$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.runtime $@
