# Every target sets up what it needs, in .venv, from Python 3.10 to 3.13 alone.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo examples test test-slow test-gpu test-compat quality style messages docs bench clean

VENV ?= .venv
ARGS ?=
ALL_SETS := oldest previous newest
SETS ?= $(ALL_SETS)

SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
FIND_PYTHON = $(firstword $(foreach name,python3 python3.13 python3.12 python3.11 python3.10,\
    $(shell $(name) -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $(name))))
CODE := $(wildcard src tests examples benchmarks docs scripts setup.py)
FORMATTED := $(CODE) README.md # the formatter reaches code in Markdown

# One thread per process, since tests run in several; no network; no progress bars in logs.
RUN := env OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
    HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HUB_DISABLE_PROGRESS_BARS=1
PYTEST := -m pytest -n 2 --dist worksteal
EXAMPLES := sentiment ranks diffusion_blend serving quantized character_lm two_processes
# The environment of a set of releases; the newest set is what everything else here runs with.
environment = $(VENV)$(if $(filter-out newest,$1),-$1)
$(if $(filter-out $(ALL_SETS),$(SETS)),$(error SETS are among $(ALL_SETS), got $(SETS)))

help: ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name what; do \
	    printf '  make %-12s %s\n' "$$name" "$$what"; done

demo: $(VENV)/.installed-demo ## restore a video: train an adapter with a fully trained output layer, save, load, compare
	$(RUN) $(VENV)/bin/python examples/video_restoration/run.py $(ARGS)

examples: $(VENV)/.installed-examples ## run the examples: sentiment, ranks, diffusion_blend, serving, quantized, character_lm, two_processes
	for name in $(EXAMPLES); do $(RUN) $(VENV)/bin/python examples/$$name/run.py $(ARGS); done

test: $(VENV)/.installed-test ## run the tests (pass options to pytest in ARGS)
	$(RUN) $(VENV)/bin/python $(PYTEST) $(ARGS)

test-slow: $(VENV)/.installed-test ## run the tests that take long
	$(RUN) $(VENV)/bin/python $(PYTEST) -m 'slow and not gpu' $(ARGS)

test-gpu: $(VENV)/.installed-test ## run the tests that need an accelerator
	$(RUN) $(VENV)/bin/python -m pytest -m gpu $(ARGS)

test-compat: $(foreach set,$(SETS),$(call environment,$(set))/.installed-test) ## run the tests of clients with SETS="oldest previous newest" of them; the oldest is 3.5 GB to fetch once
	$(RUN) $(patsubst %/.installed-test,%/bin/python,$<) scripts/compat.py \
	    $(foreach set,$(SETS),$(set)=$(call environment,$(set))) -- $(ARGS)

quality: $(VENV)/.installed-quality ## check style, syntax, the direction of imports and the links in the documentation
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(FORMATTED)
	$(VENV)/bin/python -m compileall -q $(CODE)
	$(VENV)/bin/python scripts/check_imports.py
	$(VENV)/bin/python scripts/build_docs.py --check
	$(VENV)/bin/python scripts/messages.py --check

style: $(VENV)/.installed-quality ## repair what can be repaired by itself
	$(VENV)/bin/ruff check --fix $(CODE)
	$(VENV)/bin/ruff format $(FORMATTED)

messages: $(VENV)/.installed-test ## run the tests of LoRA and list in the documentation which raises each error and warning
	$(RUN) $(VENV)/bin/python scripts/messages.py

docs: $(VENV)/.installed-docs ## render the documentation to build/docs
	$(VENV)/bin/python scripts/build_docs.py

bench: $(VENV)/.installed-test ## run the benchmarks
	HF_HUB_OFFLINE=1 $(VENV)/bin/python benchmarks/run.py $(ARGS)

clean: ## remove what was built, the environments too
	rm -rf build dist outputs $(VENV) $(VENV)-* .pytest_cache .ruff_cache src/*.egg-info
	find src tests scripts -name __pycache__ -prune -exec rm -rf {} +

# A stamp per set of packages: a second run finds it and does nothing.
$(VENV)/.installed-%: setup.py constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/pip install --quiet -c constraints.txt setuptools
	$(VENV)/bin/pip install --quiet --no-build-isolation -c constraints.txt -e '.[$*]'
	touch $@

$(VENV)-%/.installed-test: setup.py constraints.txt constraints/%.txt | $(VENV)-%/bin/python
	mkdir -p build/compat
	$(VENV)-$*/bin/python scripts/compat.py --constraints $* > build/compat/$*.txt
	$(VENV)-$*/bin/pip install --quiet -c build/compat/$*.txt setuptools
	$(VENV)-$*/bin/pip install --quiet --no-build-isolation -c build/compat/$*.txt -e '.[test]'
	touch $@

define make_environment
$(or $(PYTHON),$(FIND_PYTHON),$(error No Python from 3.10 to 3.13 is on the path; name one with PYTHON=...)) \
    -m venv $(@:/bin/python=)
endef

$(VENV)/bin/python:
	$(make_environment)

$(VENV)-%/bin/python:
	$(make_environment)

.PRECIOUS: $(VENV)/.installed-% $(VENV)-%/.installed-test $(VENV)/bin/python $(VENV)-%/bin/python
