# Everything here builds .venv by itself. Needs Python 3.11 or later, nothing else; no GPU, no account.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One process per core and one thread in each: two threads share tiny tensors worse than one alone works on them.
# Files in their order, integration before unit: the other way round, long ones would end alone in one process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder --maxprocesses 4 \
	--numprocesses $$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-all check format bench clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/.installed  ## Build .venv

demo: install  ## Train, predict, evaluate and report on artificial scans; prints the report's path last
	@$(BIN)/medvisionllama demo

test: install  ## The fast tests
	$(PYTEST)

test-all: install  ## All tests: slow and golden ones too
	$(PYTEST) -m ''

check: install  ## Lint, format, types
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

format: install  ## Fix what the formatter can
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

test-slow: install  ## Only the slow tests
	$(PYTEST) -m slow

bench: install  ## Speed, memory, and Dice of all hippocampi (hours; see benchmarks/README.md)
	$(BIN)/python benchmarks/block.py
	$(BIN)/python benchmarks/block_source.py
	$(BIN)/python benchmarks/paper_step.py
	$(BIN)/python benchmarks/experiment_scan.py
	$(BIN)/python benchmarks/io_check.py
	$(BIN)/python benchmarks/io_predict.py
	$(BIN)/python benchmarks/io_preprocess.py --data $${MEDVISIONLLAMA_DATA:-../shared/data}
	$(BIN)/python benchmarks/few_shot.py --rows hippocampus-all --arms block,no-block,no-tokens --seeds 0

clean:  ## Remove what `make` built
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
