# Everything a checkout needs, over a virtual environment that the first target makes.
#
#   make demo    fine-tune a small model through the sliding window, on what every machine has
#   make test    Python tests, C++ tests (plain, asan, tsan), the C++ example against an installed copy
#   make lint    formatting, lint and types       make bench   the micro-benchmarks
#   make build   install slidecore into $(VENV)   make clean   remove what was built (distclean: $(VENV) too)
#
# Variables: VENV, JOBS, DEMO_ARGS, BENCH_ARGS, PYTHON (interpreters to try), and TORCH: a requirement such as
# TORCH=torch (the newest) or TORCH=torch==2.9.1, or TORCH=installed for the PyTorch that PYTHON already has. Without
# it, the version in constraints.txt; pip's own settings decide which build of it that is (CPU, CUDA, ROCm). PYTHON and
# TORCH count when $(VENV) is made: `make distclean` first to change them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
JOBS ?= $(shell nproc)
TORCH ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

python := $(VENV)/bin/python
pip_install = $(python) -m pip install --disable-pip-version-check -c $(VENV)/constraints.txt
stamps := $(VENV)/.stamps
# cmake and ninja come from the environment, so that a machine needs only a compiler.
export PATH := $(abspath $(VENV))/bin:$(PATH)

sources := $(shell find csrc python cmake -name '*.pyc' -prune -o -type f -print) CMakeLists.txt pyproject.toml
formatted = find csrc tests examples bench \( -name '*.h' -o -name '*.cpp' \) -print0

.PHONY: help build demo test test-python test-cpp test-downstream lint format bench clean distclean
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# A stamp is written last, so that a failed step runs again.
$(stamps)/venv: constraints.txt scripts/make_venv.sh
	scripts/make_venv.sh $(VENV) '$(TORCH)'
	mkdir -p $(stamps) && touch $@

# The old copy goes first: the build backend imports every installed package that offers CMake files (entry point
# cmake.root), and a broken slidecore would then keep its own repair from being built.
$(stamps)/package: $(stamps)/venv $(sources)
	scripts/check_compiler.sh
	$(python) -m pip uninstall -q -y slidecore
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(pip_install) --no-build-isolation \
	  --config-settings=build-dir=build/python '.[finetune]'
	touch $@

# Named by their extra, which the installed copy's metadata spells out: nothing is built again.
$(stamps)/test: $(stamps)/package
	$(pip_install) 'slidecore[test]'
	touch $@

$(stamps)/lint: $(stamps)/package
	$(pip_install) 'slidecore[lint]'
	touch $@

build: $(stamps)/package

# Threads of PyTorch that wait by spinning would take the few cores that the lanes need.
demo: $(stamps)/package
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(python) -m slidecore.finetune.demo --out demo-output $(DEMO_ARGS)

test: test-python test-cpp test-downstream

# Neighbours share what they compute once, so that each process gets a run of them (worksteal).
test-python: $(stamps)/test
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(python) -m pytest -n $(JOBS) --dist worksteal

test-cpp: $(stamps)/venv
	scripts/check_compiler.sh
	scripts/cpp_tests.sh ci $(JOBS)
	scripts/cpp_tests.sh asan $(JOBS)
	scripts/cpp_tests.sh tsan $(JOBS)

# Two installed copies: that of `cmake --install`, of what test-cpp has tested, and the one inside the wheel.
test-downstream: $(stamps)/package
	cmake --preset ci && cmake --build --preset ci --parallel $(JOBS)
	rm -rf build/prefix && cmake --install build/ci --prefix build/prefix
	scripts/downstream.sh prefix $(abspath build/prefix)
	scripts/downstream.sh wheel "$$($(python) -c \
	  'from importlib.util import find_spec; print(find_spec("slidecore").submodule_search_locations[0])')"

lint: $(stamps)/lint
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(formatted) | xargs -0 -r $(VENV)/bin/clang-format --dry-run -Werror
	$(VENV)/bin/mypy

format: $(stamps)/lint
	$(VENV)/bin/ruff check --fix-only
	$(VENV)/bin/ruff format
	$(formatted) | xargs -0 -r $(VENV)/bin/clang-format -i

bench: $(stamps)/package
	$(python) bench/adamw.py $(BENCH_ARGS)
	$(python) bench/overlap.py $(BENCH_ARGS)

clean:
	rm -rf build dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf $(VENV)
