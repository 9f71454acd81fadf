# `make demo` and `make test` need nothing but Python 3.11 to 3.13; everything goes into the folder .venv.
# `make peers` needs Python 3.11, and has a folder of its own, since torch is large.
# So has tensorflow-io, whose TensorFlow wants an older NumPy than jax: `make tfio-env`, then
# `make tfio-shards IN='http://server/part.tfrecord more.csv' OUT=videos [MODE=decode] [FLAGS='--caption text']`.

# The first of the commands $(1) that is a Python from 3.11 to before 3.$(2).
first = $(firstword $(foreach name,$(1),$(shell \
	$(name) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, $(2)))' 2>/dev/null && echo $(name))))
PYTHON ?= $(call first,python3.11 python3.12 python3.13 python3 python,14)
PYTHON_TFIO = $(call first,$(PYTHON) python3.11 python3.12,13)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PEERS := .venv-peers
NOTEBOOKS := .venv-notebooks
TFIO := .venv-tfio
PYTHON_3_11 := $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null)
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt -e

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow notebooks peers peers-installed tfio-env tfio-shards lint docs mutants clean

help: ## this list
	@awk -F ' *## *' '/^[a-z-]+:.*## / { sub(":.*", "", $$1); printf "make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## worlds, training, clips with and without memory, and a report to look at
	$(BIN)/ditmem demo

test: $(INSTALLED) lint ## lint, then the tests that take less than three seconds each
	$(BIN)/python -m pytest -q -n 2 -m 'not slow'

test-slow: $(INSTALLED) ## the other tests: meshes, several processes, kills, whole networks
	$(BIN)/python -m pytest -q -n 2 -m slow

notebooks: $(NOTEBOOKS)/installed ## the notebooks, run at their least sizes [FLAGS=--keep writes their outputs down]
	$(NOTEBOOKS)/bin/python -m experiments.notebooks $(FLAGS)

peers: peers-installed ## tests against peers, with torch and the TPU compiler, in Python 3.11
ifneq ($(PYTHON_3_11),)
	$(PEERS)/bin/python -m pytest -q -n 2 --dist loadfile tests/convert/test_peers.py tests/convert/test_peft.py tests/convert/test_pth.py \
		tests/bank/test_sentence_transformers.py tests/bank/test_released.py tests/aot/test_compile.py tests/experiments/test_benchmarks.py \
		tests/diffusion/test_solvers.py
else
	@echo "The tests with torch need python3.11 on the PATH: none were run"
endif

tfio-env: $(TFIO)/installed ## an environment with tensorflow-io

tfio-shards: $(TFIO)/installed ## IN=... OUT=...: videos from TFRecord files, HTTP, gs:// or s3:// to input records
	@$(TFIO)/bin/python -m convert.tfio $(IN:%=--in='%') --out='$(OUT)' --mode=$(or $(MODE),pass) $(FLAGS)

lint: $(INSTALLED) ## style, imports between floors, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/basedpyright --pythonpath $(BIN)/python

mutants: $(VENV)/mutants ## faults put in one by one, each to turn a test red [MODULES='train/step ...'], under two hours
	$(BIN)/python -m tests.mutants $(MODULES)

docs: $(VENV)/docs ## the pages in build/site, from docs/ and the docstrings
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## forget the environment and what was built
	rm -rf $(VENV) $(NOTEBOOKS) $(PEERS) $(TFIO) build

$(INSTALLED): pyproject.toml setup.py constraints.txt
ifeq ($(PYTHON),)
	$(error Python 3.11, 3.12 or 3.13 is needed and none is on the PATH; name one: make PYTHON=/path/to/python3.12)
endif
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) '.[test]'
	touch $@

$(VENV)/docs: $(INSTALLED)
	$(BIN)/python $(INSTALL) '.[docs]'
	touch $@

$(VENV)/mutants: $(INSTALLED)
	$(BIN)/python $(INSTALL) '.[test,mutants]'
	touch $@

$(NOTEBOOKS)/installed: pyproject.toml setup.py constraints.txt
	test -x $(NOTEBOOKS)/bin/python || $(PYTHON) -m venv $(NOTEBOOKS)
	$(NOTEBOOKS)/bin/python $(INSTALL) '.[notebooks]'
	touch $@

peers-installed: $(if $(PYTHON_3_11),$(PEERS)/installed)

$(PEERS)/installed: pyproject.toml setup.py constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON_3_11) -m venv $(PEERS)
	$(PEERS)/bin/python $(INSTALL) '.[test,parity]'
	touch $@

$(TFIO)/installed: convert/tfio/requirements.txt convert/tfio/link_ffmpeg.py
ifeq ($(PYTHON_TFIO),)
	$(error tensorflow-io needs Python 3.11 or 3.12 and neither is on the PATH; name one: make PYTHON=/path/to/python3.12)
endif
	test -x $(TFIO)/bin/python || $(PYTHON_TFIO) -m venv $(TFIO)
	$(TFIO)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r convert/tfio/requirements.txt
	$(TFIO)/bin/python -m pip check
	$(TFIO)/bin/python -m convert.tfio.link_ffmpeg
	touch $@
