# vitdistill: every command sets itself up in .venv and writes inside this folder only. `make help` lists them.
PYTHON ?= python3
PRESET ?= quick
DEVICE ?= auto
ARGS ?=
TEACHER ?=
BIN := .venv/bin

# Jupyter's, IPython's and matplotlib's own files stay in the clone too; one thread a process when several run side by side.
export IPYTHONDIR := $(CURDIR)/out/home/ipython
export JUPYTER_RUNTIME_DIR := $(CURDIR)/out/home/runtime
export MPLCONFIGDIR := $(CURDIR)/out/home/matplotlib
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
VITDISTILL = PYTHONWARNINGS=ignore PYDEVD_DISABLE_FILE_VALIDATION=1 $(BIN)/python -m vitdistill.cli
# $(call limit,SECONDS): what follows ends by then, where there is a timeout (macOS has none)
limit = $(if $(shell command -v timeout),timeout $(1))

.PHONY: help venv demo test test-all test-slurm study figures report docs bench bench-attention gpu lab clean
help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: .venv/installed ## .venv with the pinned versions and this package, editable
.venv/installed: settings.ini setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-cache-dir uv
	UV_CACHE_DIR=.venv/cache $(BIN)/uv pip install -q --system-certs --compile-bytecode --python $(BIN)/python -e '.[dev]' || { \
		echo 'uv could not install (its message is above): trying pip'; rm -rf .venv/cache; $(BIN)/python -m pip install -q --no-cache-dir -e '.[dev]'; }
	rm -rf .venv/cache
	touch $@

demo: venv ## the paper's experiment in minutes: digits, teacher, two ResNet-50, figures -> out/demo/index.html
	@mkdir -p out/home/runtime
	@$(VITDISTILL) demo $(ARGS)

test: venv ## export drift, notebooks and tests, on two cores in minutes
	@mkdir -p out/home/runtime
	$(BIN)/python -m pytest -q tests/test_repository.py -k drifted
	OMP_NUM_THREADS=1 $(call limit,900) $(BIN)/nbdev_test --n_workers 2 --timing
	OMP_NUM_THREADS=1 $(call limit,1500) $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder \
		-m "not slow" tests

test-all: test ## also what takes longer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow tests
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --flags slow

test-slurm: venv ## grids on a real Slurm, which it starts and ends: needs root, slurm-wlm and munge (apt-get install)
	VITDISTILL_SLURM=1 OMP_NUM_THREADS=1 timeout 1800 $(BIN)/python -m pytest -q tests/test_slurm.py

study: venv ## the paper's pair on CIFAR-100: PRESET=paper|quick, TEACHER=FILE to fine-tune from, ARGS="-p data_root DIR"
	@mkdir -p out/home/runtime
	@$(VITDISTILL) study --preset $(PRESET) $(if $(TEACHER),--teacher $(TEACHER)) $(ARGS)

figures: venv ## rebuild reports/figures and reports/tables from reports/runs (this, and make bench ARGS=--keep, change tracked files)
	@mkdir -p out/home/runtime
	@$(VITDISTILL) figures $(ARGS)

report: venv ## all of reports/ on one self-contained page, as make figures and make bench ARGS=--keep left it -> out/report/index.html
	$(BIN)/python -m vitdistill.report $(ARGS)

docs: venv .venv/docs ## the documentation site -> out/docs/index.html; ARGS=--keep also renews docs/executed
	@mkdir -p out/home/runtime
	$(BIN)/python docs/build.py $(ARGS)
.venv/docs: .venv/installed
	$(BIN)/uv pip install -q --system-certs --no-cache --python $(BIN)/python -e '.[dev,docs]' || $(BIN)/python -m pip install -q --no-cache-dir -e '.[dev,docs]'
	touch $@

bench: venv ## what an epoch costs here, beside the usual ways: DEVICE=cuda for a GPU, ARGS=--keep to keep it in reports/bench, ARGS=--recipe a step of DeiT's recipe
	$(BIN)/python -m vitdistill.bench --device $(DEVICE) $(ARGS)

bench-attention: venv ## what HiLo costs here beside plain attention, a ViT and a ResNet: DEVICE=cuda, ARGS=--keep as in bench
	$(BIN)/python -m vitdistill.attention_bench --device $(DEVICE) $(ARGS)

# It sets nothing up: PYTHON where that is given, else .venv's where that is there, else python3.
GPU_PYTHON = $(if $(filter file default,$(origin PYTHON)),$(firstword $(wildcard $(BIN)/python) $(PYTHON)),$(PYTHON))
gpu: ## what has to be seen on a GPU, in 24 minutes: PYTHON=python3 with torch, timm, pandas, pytest; without a GPU a dry run
	$(GPU_PYTHON) tests/gpu/run.py $(ARGS)

lab: venv ## JupyterLab on this repository
	$(BIN)/jupyter lab --notebook-dir .

clean: ## remove what commands wrote here: out/ and caches (not .venv, not reports/)
	rm -rf out .pytest_cache .hypothesis *.egg-info
