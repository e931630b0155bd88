# `make help` lists the targets. PYTHON chooses the interpreter that .venv is made with: make demo PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
# Named after what was installed: a changed requirement has another stamp, a fresh checkout of the same has not.
STAMP := .venv/setup-$(shell cat pyproject.toml .ci/constraints.txt | cksum | cut -d ' ' -f 1)

SHELL := bash
.SHELLFLAGS := -o pipefail -c

.PHONY: help setup demo test check format ui
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with everything that users and developers need; nothing to do while it is current

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: raychat needs Python 3.11 or newer, and $(PYTHON) is none." \
	    "Install one and name it: make setup PYTHON=python3.12" >&2; exit 2; }
	@echo "setup: creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@echo "setup: installing torch, Ray, MLflow and what they need into .venv; this takes a minute or two, once"
	@$(BIN)/python -m pip install --disable-pip-version-check -c .ci/constraints.txt -e '.[test]' | awk ' \
	  /^Collecting/ { if (++n % 20 == 0) { print "setup: " n " packages found"; fflush() } } \
	  /^Installing collected/ { print "setup: unpacking " n " packages"; fflush() }'
	@rm -f .venv/setup-*
	@touch $@
	@echo "setup: done"

demo: setup ## train a small model to its end on the text of this Python installation
	@$(BIN)/python jobs/pretrain.py --preset demo

test: setup ## run all tests
	@$(BIN)/python -m pytest -n 2

check: setup ## format, lint, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports --no-logo

format: setup ## format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ui: setup ## show the recorded runs in MLflow, on this machine only
	@$(BIN)/python -m raychat.tracking.mlflow_ui
