# `make demo` and `make test` do all the set-up from a fresh clone: they need Python 3.11 or newer and nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3 python,$(if $(shell command -v $(name)),$(name))))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BROWSER := $(VENV)/.browser
DEMO := demo

# The model of the demo: Mistral's shape with an active window. 2,048 tokens take seconds, 4,096 are the benchmark.
TOKENS ?= 2048
WINDOW ?= 256
POLICY ?= sparse

# Test processes.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: help demo test lint format typecheck clean

help:
	@echo "make demo    set up, export a model, compile it, print the report"
	@echo "make test    set up, lint, type-check, run the tests"
	@echo "make lint    ruff and mypy;  make format: ruff format;  make clean: remove what was built"

# torch is pinned in pyproject.toml, so that pip installs that one and not whatever is newest. Triton needs no torch, and
# a torch for CUDA asks for a Triton of its own version: hence no dependencies there.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "setuptools>=77"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps 'timm>=1.0.31,<1.1'
	$(BIN)/python -m pip install --quiet --no-deps 'triton>=3.9,<3.10'
	touch $(STAMP)

$(DEMO)/mistral-$(TOKENS)-$(WINDOW).onnx: $(STAMP)
	mkdir -p $(DEMO)
	$(BIN)/python -m attncompile.models mistral --size bench --tokens $(TOKENS) --window $(WINDOW) --out $@

# Tests look at report.html with it; the demo does without 260 MB.
$(BROWSER): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[browser]' && touch $(BROWSER) || \
		echo "the browser was not installed: its tests are skipped" >&2

# The compiler refuses to write over results, so that the demo removes its own from the last time.
demo: $(DEMO)/mistral-$(TOKENS)-$(WINDOW).onnx
	rm -rf $(DEMO)/out
	$(BIN)/attncompile $< --policy $(POLICY) --fp16 --out $(DEMO)/out

# The contract tests take TensorRT's Python package from wheels of its bindings; without them they are skipped (CI: fail).
test: lint $(BROWSER)
	-$(BIN)/python tools/tensorrt_bindings.py
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

typecheck: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
