# Every target uses VENV, which is made from constraints.txt if it is missing or older than its inputs.

PYTHON ?= python3
ARGS ?=
VENV ?= .venv
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test gpu gpu2 lint format docs clean

help: ## show this help
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo 'ARGS="..." is passed on to demo or pytest; PYTHON=python3.12 makes .venv with another Python.'
	@echo 'PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu takes the small CPU build of torch on Linux.'

venv: $(INSTALLED) ## make .venv: the package, editable, with what demo, test and lint need

demo: $(INSTALLED) ## train a small mixture-of-experts model in bf16 and FP8
	$(BIN)/python -m grouped_gemm demo $(ARGS)

test: $(INSTALLED) ## run the tests
	$(BIN)/python -m pytest $(ARGS)

gpu: $(INSTALLED) ## run the tests on a GPU, on 12 workers in parallel
	.ci/gpu

gpu2: $(INSTALLED) ## run the tests that need two GPUs
	.ci/gpu2

lint: $(INSTALLED) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## build the API pages from docstrings: build/api/index.html
	$(BIN)/python docs/api.py build/api

clean: ## remove .venv, caches and build outputs
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Without build isolation, the build uses the pinned setuptools, and pip fetches only what constraints.txt pins.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) setuptools
	$(BIN)/python -m pip install --no-build-isolation -c $(CONSTRAINTS) -e '.[demo,test]'
	touch $@
