# `make demo` and `make test` need nothing but Python 3.11 or 3.12; everything goes into the folder .venv.
# `make peers` needs Python 3.11, and has a folder of its own, since torch is large.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3 python,$(shell \
	$(name) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $(name))))
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PEERS := .venv-peers
PYTHON_3_11 := $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null)
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt -e

.DEFAULT_GOAL := help
.PHONY: help demo test peers peers-installed lint clean

help: ## this list
	@awk -F ' *## *' '/^[a-z]+:.*## / { sub(":.*", "", $$1); printf "make %-6s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## worlds, training, clips with and without memory, and a report to look at
	$(BIN)/python -m experiments.demo

test: $(INSTALLED) lint ## lint, then every test
	$(BIN)/python -m pytest -q -n 2

peers: peers-installed ## tests against models of diffusers and transformers, with torch, and of the TPU compiler, in Python 3.11
ifneq ($(PYTHON_3_11),)
	$(PEERS)/bin/python -m pytest -q tests/convert/test_peers.py tests/convert/test_pth.py tests/test_aot.py
else
	@echo "The tests with torch need python3.11 on the PATH: none were run"
endif

lint: $(INSTALLED) ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean: ## forget the environment and what was built
	rm -rf $(VENV) $(PEERS) build

$(INSTALLED): pyproject.toml constraints.txt
ifeq ($(PYTHON),)
	$(error Python 3.11 or 3.12 is needed and neither is on the PATH; name one: make PYTHON=/path/to/python3.12)
endif
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) '.[test]'
	touch $@

peers-installed: $(if $(PYTHON_3_11),$(PEERS)/installed)

$(PEERS)/installed: pyproject.toml constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON_3_11) -m venv $(PEERS)
	$(PEERS)/bin/python $(INSTALL) '.[test,parity]'
	touch $@
