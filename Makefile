# make demo     sets everything up and trains a small GPT: stock PyTorch against torch_ext
# make test     sets everything up and runs all the tests
# make wheel    a wheel for this torch and this Python, in dist/
# make build    the library, in place: `import torch_ext` from this folder uses it
# make bench    attention against torch's own (benchmarks/)
# make sanitize the torch-free tests under the address and undefined-behaviour sanitizers
# make check-cuda  the CUDA kernels for every architecture, and what the compiler made of them
# make check-families  every model type of transformers on "torch_ext" (docs/huggingface.md)
# make lint     format and lint checks; `make format` applies what can be applied
# make clean    removes what was built; the environment stays (make distclean removes it too)
#
# Needs g++ (C++20), make and python3 with its headers and venv. Everything else comes from PyPI.
#
# PYTHON    the interpreter that makes the environment      make demo PYTHON=python3.12
# VENV      the environment, made if it is not there        make test VENV=~/venvs/torch
# ARGS      for demo, test (pytest) and bench               make demo ARGS="--steps 50 --plot loss.png"
# MAX_JOBS  parallel compilers; default: by cores and memory

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

override VENV := $(abspath $(VENV))
BUILD := $(CURDIR)/build
BIN := $(VENV)/bin
READY := $(VENV)/.torch_ext-requirements.txt

export PATH := $(BIN):$(PATH)
# A file with torch's headers takes 1.6 GB to compile.
MAX_JOBS ?= $(shell awk -v cores=$$(nproc) '/MemTotal/ { jobs = int($$2 / 1.6e6); print jobs < 1 ? 1 : jobs < cores ? jobs : cores }' /proc/meminfo)
export MAX_JOBS

.PHONY: all wheel demo test sanitize check-cuda check-families build bench lint format clean distclean environment
all: build

environment: $(READY)

$(READY): requirements-dev.txt scripts/make_environment.sh
	@scripts/make_environment.sh "$(PYTHON)" "$(VENV)" requirements-dev.txt
	@cp requirements-dev.txt $@

build: $(READY)
	@BUILD=$(BUILD)/library scripts/build_library.sh

wheel: $(READY)
	@$(BIN)/python -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .

demo: build
	@$(BIN)/python -m torch_ext.demo $(ARGS)

test: $(READY)
	@BUILD=$(BUILD) scripts/run_tests.sh $(ARGS)

sanitize: $(READY)
	@BUILD=$(BUILD) scripts/run_sanitizers.sh $(ARGS)

check-cuda: $(READY)
	@BUILD=$(BUILD) scripts/check_cuda_build.sh

check-families: build
	@$(BIN)/python scripts/check_families.py --table docs/huggingface.md $(ARGS)

bench: build
	@$(BIN)/python benchmarks/bench_attention.py $(ARGS)

lint: $(READY)
	@BUILD=$(BUILD) scripts/check_style.sh

format: $(READY)
	@scripts/check_style.sh --fix

clean:
	rm -rf $(BUILD) dist torch_ext/lib torch_ext/_C*.so torch_ext/include torch_ext/share *.egg-info

distclean: clean
	rm -rf $(CURDIR)/.venv
