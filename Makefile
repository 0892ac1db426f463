# What a person types: `make train`, `make test`, and `make check` while working. Everything else is one step of these.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
# Asked only if pip's own sources have no CPU build of torch (PyPI has none).
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOG := $(VENV)/install.log
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
SOURCES := src tests benchmarks docs

.PHONY: help setup train test check models cluster faults lint format bench clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  Settings of a run: make train ARGS="controller.steps=10 learner.lr=1e-4"'

setup: $(STAMP) ## make .venv and install everything into it

train: $(STAMP) ## train the default model (builds the embedded models first); ARGS="key=value …" overrides settings
	@$(BIN)/python -m skyrl.launch $(ARGS)

test: lint ## lint, types, import rules and all tests
	@echo "pytest"
	@$(BIN)/python -m pytest $(ARGS)

check: lint ## lint, types, import rules and the tests that start neither Ray nor vLLM nor DeepSpeed
	@echo "pytest tests/unit"
	@$(BIN)/python -m pytest tests/unit $(ARGS)

models: $(STAMP) ## try every architecture of docs/models_table.md (six minutes), and write that table anew
	@$(BIN)/python -m pytest tests/models -m "models or integration" $(ARGS)

cluster: $(STAMP) ## several hosts on this machine, one of which is lost (needs root; five minutes)
	@$(BIN)/python -m pytest tests/integration/test_hosts.py -m "cluster or integration" $(ARGS)

faults: $(STAMP) ## strike runs over a hundred times (kills, stops, a lost host); goes on where it was interrupted
	@$(BIN)/python -m tests.faults $(ARGS)

lint: $(STAMP) ## ruff, mypy and the import rules
	@echo "ruff check"; $(BIN)/ruff check --quiet $(SOURCES)
	@echo "ruff format --check"; $(BIN)/ruff format --check --quiet $(SOURCES)
	@echo "mypy"; $(BIN)/mypy --no-error-summary
	@echo "lint-imports"; $(BIN)/lint-imports > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }

format: $(STAMP) ## rewrite the sources in the project's style
	@$(BIN)/ruff check --quiet --fix $(SOURCES)
	@$(BIN)/ruff format --quiet $(SOURCES)

bench: $(STAMP) ## time the parts, one after the other
	@set -e; for file in benchmarks/*.py; do \
	  case $$file in */_*) continue;; esac; \
	  file=$${file##*/}; echo "$$file"; $(BIN)/python -m benchmarks.$${file%.py} $(ARGS); \
	done

clean: ## delete the environment and caches; outputs/ and trained models stay
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

# What installing needs, asked before anything is made. $(error) stops make with one line (make's exit status is 2).
HAS_PYTHON = command -v $(PYTHON)
NO_PYTHON = $(PYTHON) not found; install Python 3.11, 3.12 or 3.13, or name yours: make PYTHON=/path/to/python
HAS_VERSION = $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
NO_VERSION = $(PYTHON) is $(shell $(PYTHON) --version 2>&1); skyrl needs 3.11, 3.12 or 3.13: make PYTHON=/path/to/python
HAS_VENV = $(PYTHON) -c 'import venv, ensurepip'
NO_VENV = $(PYTHON) has no venv and pip modules; on Debian and Ubuntu: apt install python3-venv
HAS_COMPILER = command -v $${CXX:-c++} || command -v g++
NO_COMPILER = no C++ compiler (c++ or g++); DeepSpeed compiles its C++ parts on demand; on Debian and Ubuntu: apt install g++
need = $(if $(shell { $(HAS_$(1)); } > /dev/null 2>&1 && echo yes),,$(error $(NO_$(1))))

# The stamp comes last: an interrupted installation goes on where it stopped. An environment of another Python
# version is made anew.
$(STAMP): requirements/cpu.txt pyproject.toml
	@$(foreach what,PYTHON VERSION VENV COMPILER,$(call need,$(what)))\
	want=$$($(PYTHON) -c 'import sys; print(*sys.version_info[:2])'); \
	have=$$($(BIN)/python -c 'import sys; print(*sys.version_info[:2])' 2> /dev/null); \
	if [ "$$want" != "$$have" ] || ! $(PIP) --version > /dev/null 2>&1; then \
	  echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "installing about 200 packages, two to three minutes (details in $(LOG))"
	@torch=$$(grep '^torch==' requirements/cpu.txt); \
	$(PIP) install --quiet --no-deps "$$torch" > $(LOG) 2>&1 || { \
	  echo "pip's own sources have no $$torch; asking $(TORCH_INDEX)"; \
	  $(PIP) install --quiet --no-deps --extra-index-url $(TORCH_INDEX) "$$torch" >> $(LOG) 2>&1; \
	} || { tail -n 5 $(LOG) >&2; echo "error: $$torch could not be installed; another source: make TORCH_INDEX=URL" >&2; exit 1; }
	@$(PIP) install --quiet --no-deps -r requirements/cpu.txt >> $(LOG) 2>&1 || { \
	  tail -n 5 $(LOG) >&2; echo "error: the packages of requirements/cpu.txt could not be installed; see $(LOG)" >&2; exit 1; }
	@$(PIP) install --quiet --no-deps --no-build-isolation -e . >> $(LOG) 2>&1 || { \
	  tail -n 5 $(LOG) >&2; echo "error: skyrl itself could not be installed; see $(LOG)" >&2; exit 1; }
	@touch $@
