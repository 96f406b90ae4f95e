# `make help` lists what can be made. Everything is installed into .venv and nowhere else.

PYTHON ?= python3
# Whose torch is used: "lock" installs that of requirements.lock, "site" keeps the one that PYTHON has.
TORCH ?= lock
UV_VERSION := 0.13.9

BIN := .venv/bin
DONE := .venv/done
UV := $(BIN)/uv pip

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help setup checked demo test test-all test-s3 test-cluster test-pythons test-machines test-lowest chaos test-gpu lint types docs lock

# What a machine happens to keep in local folders must not decide which versions are installed.
unexport PIP_FIND_LINKS UV_FIND_LINKS
CALLERS_PATH := $(PATH)
# torch finds the `ninja` of the environment through PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(if $(filter-out file,$(origin PYTHON) $(origin TORCH)),checked) $(DONE)/project $(DONE)/bytecode
setup: ## install the locked versions into .venv, of PYTHON=python3 and around its torch with TORCH=site

demo: setup ## shards -> tokenizer -> tokens -> training -> samples -> metrics; FAST=1 for the short form
	$(BIN)/python tools/demo.py $(if $(FAST),--fast)

# Files in their order: xdist's own, by number of tests, leaves the demo's few long ones to the end, alone on a core.
test: setup ## every test that needs no GPU and no long run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not long and not gpu and not s3 and not slurm" -n 2 --dist loadfile --no-loadscope-reorder

test-all: setup ## the long tests as well, then the suite with the lowest versions
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not s3 and not slurm" -n 2 --dist loadfile --no-loadscope-reorder
	bash tests/lowest.sh

test-s3: setup ## everything that reads or writes S3, with a real server and a proxy that fails
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/s3 -m s3 -rs

test-cluster: setup ## jobs on a real Slurm of two nodes: trained, stopped, lost and started again
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm -m "slurm and not long" -rs

test-pythons: ## set-up, every import and the short demo on each supported Python on this machine but the newest
	bash tests/interpreters.sh

test-machines: setup ## the short demo on odd machines: no compiler, no network, a small /dev/shm, and so on
	bash tests/machines.sh

test-lowest: setup ## the suite with the lowest direct dependencies that pyproject.toml allows, on Python 3.10
	bash tests/lowest.sh

chaos: setup ## a run and ten tools, ended forty times at random moments and damaged between, against undisturbed ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/training/test_train.py tests/tools/test_chaos.py -m long -k chaos -s

test-gpu: setup ## what needs a GPU: kernels against their slow twins, ZeRO-3 over NCCL, figures as JSON
	$(BIN)/python -m pytest tests/gpu -m gpu
	$(BIN)/python tools/benchmark.py step --output runs/benchmarks/step-gpu.json

lint: setup ## formatting and lint rules; shellcheck where it is installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	@if command -v shellcheck > /dev/null; then shellcheck -x slurm/*.sh tests/*.sh .ci/run; else echo "shellcheck: not installed"; fi

types: setup ## pyright, strict
	$(BIN)/pyright

docs: setup ## write the generated parts of docs/: the graph of the folders and configuration.md
	$(BIN)/python tests/architecture/test_picture.py
	$(BIN)/python tools/_configuration_page.py

lock: $(DONE)/uv ## resolve pyproject.toml anew into requirements.lock
	$(UV) compile --quiet --universal --python-version 3.10 --all-extras --upgrade \
		--generate-hashes --no-header --no-annotate --output-file requirements.lock pyproject.toml

# CHECK WORDS: stop in one sentence where .venv is not what the words ask for, or cannot be made so.
define CHECK
@export PATH="$(CALLERS_PATH)"; "$(PYTHON)" -c "" 2> /dev/null || { \
	echo "make setup: '$(PYTHON)' does not run here; those that do:" >&2; \
	python3 tools/_environment.py list >&2; exit 2; }; \
"$(PYTHON)" tools/_environment.py check $(1)
endef

# What is asked for by name must not be passed over because some .venv is there.
checked:
	$(call CHECK,$(if $(filter-out file,$(origin PYTHON)),python) $(if $(filter-out file,$(origin TORCH)),"$(TORCH)"))

$(DONE)/uv:
	$(call CHECK,python "$(TORCH)")
	@echo "creating .venv with $$("$(PYTHON)" --version)"
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check uv==$(UV_VERSION)
	@if [ "$(TORCH)" = site ]; then "$(PYTHON)" tools/_environment.py site-torch \
		> "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/site-torch.pth"; fi
	@mkdir -p $(DONE) && echo "$(TORCH)" > $(DONE)/torch && touch $@

# A torch of the site's own keeps its companions and its CUDA libraries: the lock's are left out, but for the runtime
# of CUDA 12 that xformers is built for, which torch does not load.
$(DONE)/packages: requirements.lock | $(DONE)/uv
	@echo "installing the locked packages (several GB)"
	@if [ "$$(cat $(DONE)/torch)" = site ]; then \
		awk '/^[^ ]/ {keep = /^nvidia-cuda-runtime-cu12/ || !/^(torch|torchvision|triton|(nvidia|cuda)-[a-z0-9-]+)==/} keep' \
			requirements.lock > $(DONE)/requirements.txt; \
		$(UV) install --quiet --no-deps --require-hashes -r $(DONE)/requirements.txt; \
		$(BIN)/python -c 'import torch, torchvision; print("kept torch", torch.__version__, torch.__file__)'; \
	else \
		$(UV) install --quiet --require-hashes -r requirements.lock; \
	fi
	@touch $@

$(DONE)/project: pyproject.toml $(DONE)/packages
	$(UV) install --quiet --no-deps -e .
	@touch $@

# Packages arrive without bytecode, and without this every process of every run would compile them anew. The
# exit status says only that some file is written for a newer Python, which nothing imports.
$(DONE)/bytecode: $(DONE)/packages
	@echo "compiling the packages to bytecode"
	$(BIN)/python -m compileall -qq -j2 .venv/lib || true
	@touch $@
