# `make demo` and `make test` need nothing but Python 3.11 or 3.12; everything goes into the folder .venv.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3 python,$(shell \
	$(name) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $(name))))
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help: ## this list
	@awk -F ' *## *' '/^[a-z]+:.*## / { sub(":.*", "", $$1); printf "make %-6s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## worlds, training, clips with and without memory, and a report to look at
	$(BIN)/python -m experiments.demo

test: $(INSTALLED) lint ## lint, then every test
	$(BIN)/python -m pytest -q -n 2

lint: $(INSTALLED) ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean: ## forget the environment and what was built
	rm -rf $(VENV) build

$(INSTALLED): pyproject.toml constraints.txt
ifeq ($(PYTHON),)
	$(error Python 3.11 or 3.12 is needed and neither is on the PATH; name one: make PYTHON=/path/to/python3.12)
endif
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints.txt
	touch $@
