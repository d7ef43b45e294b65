# `make train` and `make test` do all their own set-up.
#
#   make train                                    the tiny Kanana-2 on this machine
#   make train ARGS="schedule.steps=500"          with other settings
#   make train PROCESSES=1                        on one process (default: 2, or a single GPU's 1)
#   make test                                     style, types, formatting, every test
#   make train VENV= PYTHON=python3               in an environment that has everything already

PYTHON ?= python3
VENV ?= .venv
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
PROCESSES ?= $(if $(filter 1,$(GPUS)),1,2)
ARGS ?=
PYTEST_ARGS ?=
# torchrun would set it with a warning; the job then gives each process its share of the cores.
ONE_THREAD := $(if $(filter 1,$(PROCESSES)),,OMP_NUM_THREADS=1)

ifeq ($(VENV),)
RUN := $(PYTHON) -m
READY := .native-in-place
else
RUN := $(VENV)/bin/python -m
READY := $(VENV)/.ready
endif

NATIVE := setup.py $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

.PHONY: train test lint format clean

train: $(READY)
	$(ONE_THREAD) $(RUN) torch.distributed.run --standalone --nproc-per-node $(PROCESSES) -m megatron_kanana.train $(ARGS)

# Two files of tests at a time, those that take long first.
test: lint
ifeq ($(PYTEST_ARGS),)
	OMP_NUM_THREADS=1 $(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder tests/faults tests/end_to_end tests/parallel tests/model tests/conversion tests/fuzz tests/kernels tests/unit
else
	$(RUN) pytest $(PYTEST_ARGS)
endif

lint: $(READY)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(filter csrc/%,$(NATIVE))

format: $(READY)
	$(RUN) ruff check --fix .
	$(RUN) ruff format .
	$(VENV)/bin/clang-format -i $(filter csrc/%,$(NATIVE))

$(VENV)/.ready: pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.11")'
	@command -v $${CXX:-c++} > /dev/null || { echo "A C++ compiler is needed: install g++ or clang, or set CXX."; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools wheel ninja torch
	$(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[test]'
	@touch $@

.native-in-place: $(NATIVE)
	$(PYTHON) setup.py --quiet build_ext --inplace
	@touch $@

clean:
	rm -rf build *.egg-info .native-in-place megatron_kanana/_native.so $(VENV)
