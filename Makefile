# make demo    set up and run the demo            make test   set up and run the tests
# make check   everything that CI runs            make help   the other targets
#
# PYTHON=python3.12   the interpreter to build the environment from (3.11 or newer)
# VENV=DIR            where the environment is; one that exists is used
# TORCH=...           your torch: `system` to use the interpreter's own, or what to hand to `pip install`
# ARGS="..."          more arguments for the demo, pytest, mutmut or the benchmarks
# SEEDS=FIRST:END     what `make explore` runs; those before the first of the default are in `make test`

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
ARGS ?=
SEEDS ?= 24576:122880

export TORCH
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-engines test-engines-light lint types contracts docs spec explore mutants coverage bench check generate format clean

help:
	@echo "make demo | test | check | setup | lint | types | contracts | docs | spec | explore | mutants"
	@echo "     test-engines-light | test-engines | coverage | bench | generate | format | clean"

setup: $(VENV)/.ready-dev $(VENV)/.ready-docs

demo: $(VENV)/.ready-run
	$(BIN)/eplb-fsm demo $(ARGS)

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2 $(ARGS)

# The adapters over the engines' own EPLB modules, in gloo processes; no engine is installed.
test-engines-light: $(VENV)/.ready-dev build/engines/.ready
	REQUIRE_ENGINE_SOURCES=1 $(BIN)/python -m pytest tests/serving $(ARGS)

# The same and whole engines on CPUs, each in an environment of its own (a few gigabytes, and half an hour).
test-engines: $(VENV)/.ready-dev build/engines/.ready $(VENV)-sglang/.ready $(VENV)-vllm/.ready
	$(VENV)-sglang/bin/python -m pip install -q --no-deps --force-reinstall .
	$(VENV)-vllm/bin/python -m pip install -q --no-deps --force-reinstall .
	REQUIRE_ENGINE_SOURCES=1 WRITE_COMPATIBILITY=docs/reference/compatibility.json \
	  SERVING_SGLANG_VENV=$(abspath $(VENV)-sglang) SERVING_VLLM_VENV=$(abspath $(VENV)-vllm) \
	  $(BIN)/python -m pytest tests/serving $(ARGS)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-dev
	$(BIN)/mypy

contracts: $(VENV)/.ready-dev
	$(BIN)/lint-imports

docs: $(VENV)/.ready-docs
	$(BIN)/python tools/generate_docs.py --check
	$(BIN)/mkdocs build --strict --quiet

spec: $(VENV)/.ready-dev
	$(BIN)/eplb-fsm spec check $(ARGS)

explore: $(VENV)/.ready-dev
	$(BIN)/eplb-fsm simulate --ranks 3 --seeds $(SEEDS) --quiet $(ARGS)

mutants: $(VENV)/.ready-mutants
	$(BIN)/mutmut run $(ARGS)
	$(BIN)/mutmut results

coverage: $(VENV)/.ready-dev
	HYPOTHESIS_PROFILE=ci $(BIN)/coverage run --branch --source=eplb_fsm/core -m pytest -q tests/properties/core $(ARGS)
	$(BIN)/coverage report -m --fail-under=100

bench: $(VENV)/.ready-dev
	$(BIN)/python -m tests.benchmarks $(ARGS)

check: lint types contracts docs test

generate: $(VENV)/.ready-run
	$(BIN)/python tools/generate_docs.py

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) site build dist out mutants

# The environment is made once; each stamp is renewed when the requirements change.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11 (or missing): name a newer one, as in make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(if $(filter system,$(TORCH)),--system-site-packages) $(VENV)

$(VENV)/.ready-run: pyproject.toml tools/install_torch.py | $(BIN)/python
	$(BIN)/python tools/install_torch.py
	$(PIP) -e '.[engine,cli,fast]'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready-run
	$(PIP) -e '.[engine,cli,fast,spec,test,dev]'
	@touch $@

$(VENV)/.ready-docs: $(VENV)/.ready-run
	$(PIP) -e '.[docs]'
	@touch $@

build/engines/.ready: tools/fetch_engine_sources.py | $(BIN)/python
	$(BIN)/python tools/fetch_engine_sources.py build/engines
	@touch $@

$(VENV)-%/.ready: tests/serving/%/requirements.txt $(wildcard tests/serving/*/cpu_plugin/*/*.py tests/serving/step_times/*)
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python tools/install_torch.py
	$(VENV)-$*/bin/python -m pip install -q --no-deps -r $< tests/serving/$*/cpu_plugin tests/serving/step_times 'transitions>=0.9.2,<0.10' six
	@touch $@

$(VENV)/.ready-mutants: $(VENV)/.ready-dev
	$(PIP) -e '.[mutation]'
	@touch $@
