# `make quickstart` runs the main job, `make test` all tests; both set everything up first.
PYTHON ?= python3
# What pip installs as torch: any build of it, for example one for the CUDA of this machine.
TORCH ?= torch==2.13.0

BIN := .venv/bin
STAMP := .venv/.megatron_jam
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup test test-slow test-gpu test-newest quickstart lint format clean

setup: $(STAMP)

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Python 3.11 or newer is needed: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

# torch first, and no build isolation, so that the extension is built against the torch that runs.
$(STAMP): setup.py pyproject.toml $(CSRC) | $(BIN)/pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet 'setuptools>=77' wheel ninja
	$(BIN)/pip install --quiet --no-build-isolation -e '.[dev]'
	touch $@

# Without the GPUs, if there are any: the tests compare CPU ranks on gloo.
test: setup lint
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not slow" --durations=10

test-slow: setup
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu" --timeout 1200

# With a GPU: the tests that need one, then the kernels under NVIDIA's compute-sanitizer.
test-gpu: setup
	$(BIN)/python -m pytest -m gpu
	set -e; for tool in memcheck racecheck initcheck synccheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 9 $(BIN)/python -m pytest -m gpu tests/ops; done

# The newest Megatron-Core, which wants Python 3.12, in an environment of its own.
NEWEST_PYTHON ?= python3.12
NEWEST := .venv-newest/bin
test-newest:
	$(NEWEST_PYTHON) -m venv .venv-newest
	$(NEWEST)/pip install --quiet $(TORCH) 'setuptools>=77' wheel ninja
	MEGATRON_JAM_CUDA=0 $(NEWEST)/pip install --quiet --no-build-isolation --upgrade megatron-core -e '.[dev]'
	$(NEWEST)/pip list | grep -i -E '^(torch|megatron-core) '
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(NEWEST)/python -m pytest -m "not gpu and not slow"

quickstart: setup
	$(BIN)/python examples/quickstart/run.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(BIN)/shellcheck --external-sources examples/slurm/*.sh examples/slurm/*.sbatch .ci/run

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

# The virtual environment and outputs/ stay: both take long to make.
clean:
	rm -rf $(STAMP) build megatron_jam.egg-info megatron_jam/_C*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
