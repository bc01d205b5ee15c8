# make demo   operate on a real model and print what came of it
# make test   the whole test suite
# Both make a virtual environment first, once, and again when pyproject.toml changes.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# Each process takes half of the tests in order, and from the other's when it is done: what tests of a file share, and models
# that several files trace, are made once, not once per process.
# One thread per process: the tests share the machine's cores, and small tensors do not want more.
ONE_THREAD := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest

.PHONY: help demo test quick lint bench clean distclean

help:
	@echo "make demo   compile a pretrained sentence encoder and print the report"
	@echo "make test   lint, type check and the whole test suite"
	@echo "make quick  the tests that take seconds"
	@echo "make lint   ruff and mypy only"
	@echo "make bench  the benchmarks, as ratios"
	@echo "make clean  remove what builds and tests left (distclean: the virtual environment too)"

demo: $(READY)
	$(BIN)/surgeon compile examples/minilm.yaml --force

test: lint
	$(PYTEST) -n $(WORKERS) --dist worksteal $(ARGS)

quick: $(READY)
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy -p surgeon

bench: $(READY)
	@set -e; for script in benchmarks/*.py; do \
		test -f "$$script" || { echo "benchmarks/ holds no script"; exit 1; }; \
		echo "== $$script"; $(BIN)/python "$$script" || test $$? -eq 3; done  # 3: it needs a GPU, and says so

# timm for the tests' models, without torchvision: its wheels need the very build of torch that they were made for.
# A virtual environment without a working pip (an interrupted first run) is made afresh.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "surgeon needs Python 3.11 or later; say which with make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps 'timm>=1.0.20,<2'
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
