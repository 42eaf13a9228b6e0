# make demo       a real model, tensor parallel, EAFT and SFT side by side; under 10 minutes on 2 cores
# make forgetting every method on clean and conflicting data, three seeds: what is learnt, what is forgotten; an hour
# make test       the tests, without the slow ones
# make test-all   all of them, as .ci/run does
# make lint       ruff and mypy
# make check-megatron MEGATRON_LM_PATH=CLONE [TAG=core_v0.20.0]   what we use of Megatron, in the source of each release
# make check-release MEGATRON_LM_PATH=CLONE TAG=core_v0.20.0      that, and every layout of a job on it (docs/releases.md)
# make test-loss  the loss's tests with torch alone: make test-loss LOSS_PYTHON=python3.13 LOSS_VENV=.venv-313
# make test-megatron-training   Python 3.12, megatron-core 0.19.2 and the training loop in its wheel, on its production path
#
# Everything happens in .venv. Another interpreter: make PYTHON=python3.12. An environment of your own, with torch
# and the rest already in it: make VENV=/path/to/it (nothing that satisfies the requirements is replaced).
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO_DIR ?= demo-out
DEMO_FLAGS ?=
FORGETTING_DIR ?= forgetting-out
FORGETTING_FLAGS ?=

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo forgetting test test-all test-megatron-training test-megatron-training-slow test-loss check-megatron check-release lint clean

# A torch that is already there is left alone. Without a GPU driver we ask for the version under which pip may find a
# CPU build (a local wheel, an index of your own); where it finds none it brings gigabytes of CUDA libraries.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || { \
	  if command -v nvidia-smi >/dev/null; then $(PIP) torch; else $(PIP) "$(TORCH)" || $(PIP) torch; fi; }
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[dev]"
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/python examples/demo/demo.py --output $(DEMO_DIR) $(DEMO_FLAGS)

forgetting: $(VENV)/.demo
	$(BIN)/python examples/forgetting/experiment.py --output $(FORGETTING_DIR) $(FORGETTING_FLAGS)

# Wall, user and system seconds of the tests and all their processes come last. CI set in the environment: a skip whose
# reason tests/allowed_skips.py does not list fails them.
CHECK_SKIPS = $(if $(CI),--check-skips)
# Processes that share the tests, a module's in one of them; WORKERS=0: all in one.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope
test test-all: SHELL = /bin/bash
test: $(VENV)/.dev
	time $(PYTEST) -m "not slow" $(CHECK_SKIPS)

test-all: $(VENV)/.dev
	time $(PYTEST) $(CHECK_SKIPS)

# The newest megatron-core needs Python 3.12 and holds the training loop. torch comes as its CUDA build (5.4 GB on disk,
# three to five minutes), which runs on the CPU too.
WHEEL_VENV ?= .venv-megatron-training
WHEEL_PYTHON ?= $(shell .ci/python 3.12)
WHEEL_MEGATRON ?= megatron-core==0.19.2
WHEEL_TESTS ?= tests/loss tests/hooks tests/testing tests/launch/test_validated_recipes.py
$(WHEEL_VENV)/.done: pyproject.toml
	test -x $(WHEEL_VENV)/bin/python || $(WHEEL_PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" "$(WHEEL_MEGATRON)" \
	  --editable ".[dev]"
	touch $@

test-megatron-training: $(WHEEL_VENV)/.done
	OMP_NUM_THREADS=1 $(WHEEL_VENV)/bin/python -m pytest -m "not slow" $(WHEEL_TESTS)

test-megatron-training-slow: $(WHEEL_VENV)/.done
	OMP_NUM_THREADS=1 $(WHEEL_VENV)/bin/python -m pytest tests/hooks/test_production_layouts.py -m slow

# The loss needs torch alone: its tests on another Python, in an environment without megatron-core. A minute to install.
LOSS_PYTHON ?= $(PYTHON)
LOSS_VENV ?= .venv-loss
$(LOSS_VENV)/.done: pyproject.toml
	test -x $(LOSS_VENV)/bin/python || $(LOSS_PYTHON) -m venv $(LOSS_VENV)
	$(LOSS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" --editable . \
	  "pytest>=8" "pytest-timeout>=2.3" "hypothesis>=6.100" numpy
	touch $@

test-loss: $(LOSS_VENV)/.done
	OMP_NUM_THREADS=1 $(LOSS_VENV)/bin/python -m pytest -m "not slow" tests/loss tests/test_import_boundaries.py

# MEGATRON_LM_PATH: a git clone (no checkout needed) with the tags; TAG: one tag, branch or commit instead of all releases.
check-megatron: $(VENV)/.dev
	test -n "$(MEGATRON_LM_PATH)" || { echo "MEGATRON_LM_PATH names no clone of Megatron-LM"; exit 2; }
	MEGATRON_LM_PATH="$(MEGATRON_LM_PATH)" $(if $(TAG),MEGATRON_TAG="$(TAG)") $(BIN)/python -m pytest -q tests/test_megatron_map.py

# The map, then every layout of a job, on one tag; docs/releases.md says what to do about what is red.
check-release: check-megatron
	test -n "$(TAG)" || { echo "TAG names no release: TAG=core_v0.20.0, or TAG=main"; exit 2; }
	OMP_NUM_THREADS=1 MEGATRON_LM_PATH="$(MEGATRON_LM_PATH)" EAFT_LAYOUT_TAGS="$(TAG)" EAFT_LAYOUT_TABLE=docs/layouts \
	  $(BIN)/python -m pytest -q tests/hooks/test_production_layouts.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(WHEEL_VENV) $(LOSS_VENV) $(DEMO_DIR) $(FORGETTING_DIR) .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
