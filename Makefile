# Everything runs in .venv; `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
# Three workers keep two cores busy, because some wait for a command. A file's tests stay together: they share models.
PYTEST := -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: help install dev demo test test-all lint check format docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: .venv/installed  ## make .venv with the package

dev: .venv/installed-dev  ## the same with the tools for tests and docs

demo: install  ## distil on this Python's own standard library, in minutes
	$(BIN)/taid demo

test: dev  ## run the tests, but for the slow ones
	$(BIN)/python -m pytest $(PYTEST)

test-all: test  ## run the slow ones too: several processes, long runs that are killed
	$(BIN)/python -m pytest $(PYTEST) -m slow

lint: dev  ## format, style, types, imports, dead code, dependencies, spelling, documentation
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/vulture
	$(BIN)/deptry src
	$(BIN)/codespell
	$(BIN)/python scripts/check_prose.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir .venv/site

check: lint test  ## both

format: dev  ## format and mend what can be mended
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: dev  ## serve the documentation at http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:  ## remove .venv and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis site

# torch goes first and alone, so that no other package's range draws a CUDA build of several gigabytes.
.venv/torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("taid needs Python 3.11 or later; say make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	touch $@

.venv/installed: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/vision torchvision==0.28.0 # tests/torchvision_cpu.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/deepspeed deepspeed==0.19.8 einops hjson msgpack ninja py-cpuinfo # tests/test_engines.py
	touch $@
