# Two commands: `make demo` shows a real model answer, `make test` checks everything. Both set up what they need.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help
.NOTPARALLEL:

# The first of these that is there and new enough; `make PYTHON=/path/to/python3.12 demo` takes another one.
PYTHON := $(shell for python in python3.11 python3 python3.12 python3.13; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
BIN := .venv/bin
WORKERS ?= 2
# The models that tests open; the others are made by `make models`.
TEST_MODELS := digits,minilm,minilm-int8,minilm-w8,resnet50,faults,packaged,tiny-llm,smollm2,smollm2-lora
# What CONTRIBUTING.md says of them.
FULL_SIZE := INFERWAY_TEST_FULL=1 INFERWAY_TEST_LARGE=1 INFERWAY_FAULTS=all INFERWAY_TEST_MUTANTS=50000 \
	INFERWAY_TEST_DEPLOYED_MUTANTS=50000 INFERWAY_REQUIRE_SERVICES=1
SOURCES := sdk gateway openapi examples deploy docs tests *.md

.PHONY: help demo serve test test-full lint unit models bench clean env-demo env-test docs

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | while IFS=$$'\t' read -r name about; do \
		printf '  make %-9s %s\n' "$$name" "$$about"; done

demo: env-demo ## See real models answer: sets up, starts a gateway, calls it, stops
	@$(BIN)/python examples/demo.py

serve: env-demo ## The same, and leave the gateway running until Ctrl+C
	@$(BIN)/python examples/demo.py --serve

test: env-test lint unit ## Check everything: linters, types and all tests, with branch coverage

test-full: env-test lint ## The same with every test at its full size, which takes hours
	@$(FULL_SIZE) $(MAKE) unit

lint: env-test ## Check style and types only
	@$(BIN)/ruff check --quiet $(SOURCES)
	@$(BIN)/ruff format --quiet --check $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/mypy tests --exclude tests/bench/
	@MYPYPATH=tests/bench $(BIN)/mypy tests/bench/run.py tests/bench/setup_rivals.py
	@MYPYPATH=examples/models $(BIN)/mypy deploy/*.py docs/*.py examples/*.py examples/models/make_models.py
	@MYPYPATH=tests/bench $(BIN)/mypy tests/bench/*.py tests/bench/harness/*.py
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

unit: env-test ## Run the tests only; ARGS="tests/sdk -k retry" picks some
	@$(BIN)/python examples/models/make_models.py --quiet --only $(TEST_MODELS)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --cov --cov-report term:skip-covered -m "not large" $(ARGS)
	@# Alone, for it keeps memory and disk busy; it is skipped where there is not enough of them.
	@[ -n "$(ARGS)" ] || $(BIN)/python -m pytest -m large tests/e2e/test_large_models.py

models: env-test ## Make all the models of examples/models, 1.2 GB, in .cache
	@$(BIN)/python examples/models/make_models.py --all

bench: env-test ## Measure speed against other servers
	@$(BIN)/python tests/bench/run.py $(ARGS)

docs: env-test ## Write the parts of docs/ that come from the code
	@$(BIN)/python -m cogapp -r -I docs '--markers={{{cog }}} {{{end}}}' \
		$$(grep -l '{{{cog' docs/*.md)

clean: ## Remove the environment, caches, models and what the demo keeps
	rm -rf .venv .cache .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# Quick when nothing changed: 0.1 s.
env-demo env-test:
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11 or newer is needed; on Debian or Ubuntu: apt install python3" >&2; exit 1; fi
	@$(PYTHON) deploy/environment.py $(@:env-%=%)
