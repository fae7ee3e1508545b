# ARGS is passed on: make train ARGS="--epochs 2 --name short", make test-single ARGS="-k schedules -x"
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# Targets run one after another: all need the set-up, and the tests measure time and fill the machine by themselves.
.NOTPARALLEL:

# VENV=.venv-3.11 PYTHON=python3.11 makes a second environment, for another Python. EXTRAS=1 adds the extra group.
VENV := .venv
ifneq ($(words $(VENV)),1)
    $(error VENV=$(VENV): give one folder, without spaces)
endif
BIN := $(abspath $(VENV))/bin
# horovodrun starts its workers with the first `python` on PATH.
test-single test-parallel: export PATH := $(BIN):$(PATH)

.PHONY: help env train test test-single test-parallel test-cluster soak bench lint format lock clean

help:  ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

# make_env.sh compares the lock, so that TensorFlow never runs with a Horovod that was built for another TensorFlow.
env:  ## build .venv from the lock: seconds, the first time minutes (it compiles Horovod)
	@VENV="$(VENV)" scripts/make_env.sh

train: env  ## train the demo preset on two processes of this machine
	"$(BIN)/python" -m cnnopt.launch -np 2 -- "$(BIN)/python" train_hvd.py --preset demo $(ARGS)

test: lint test-single test-parallel  ## everything that must pass before a commit

test-single: env  ## the tests that need one process
	"$(BIN)/python" -m pytest tests/single --numprocesses auto --dist loadfile $(ARGS)

test-parallel: env  ## the tests that start horovodrun -np 2
	"$(BIN)/python" -m pytest tests/parallel $(ARGS)

test-cluster: env  ## the tests that start a cluster on this machine; they skip where its packages are missing
	"$(BIN)/python" -m pytest tests/cluster $(ARGS)

# PyTorch is optional, and has a separate environment (docs/benchmarks.md).
bench: env  ## this trainer beside its peers: 20 minutes; the other comparisons are in docs/benchmarks.md
	"$(BIN)/python" benchmarks/peers.py --depth 20 44 $(if $(wildcard .venv-peers),--torch-python .venv-peers/bin/python) $(ARGS)

FAULTS ?= 100
STARTS ?= 2000
soak: env  ## 2,000 starts (STARTS=n) of every kind, 100 faults (FAULTS=n) in runs of two ranks; prints what came of them
	@status=0; "$(BIN)/python" tests/helpers/start_fuzz.py $(STARTS) || status=1; \
	"$(BIN)/python" tests/parallel/fault_driver.py $(FAULTS) || status=1; exit $$status

lint: env  ## ruff and mypy
	"$(BIN)/ruff" check
	"$(BIN)/ruff" format --check
	"$(BIN)/mypy"

format: env  ## sort imports and format, in place
	"$(BIN)/ruff" check --select I --fix
	"$(BIN)/ruff" format

lock:  ## bring requirements*.txt in step with pyproject.toml; UPGRADE=1 takes the newest versions
	@scripts/make_env.sh lock $(if $(UPGRADE),--upgrade)

clean:  ## remove .venv, .tools and caches; runs/ stays
	rm -rf "$(VENV)" .tools .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
