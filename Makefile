# Each command sets up .venv if needed and writes inside this folder only. `make help` lists the commands.
PYTHON ?= python3
PRESET ?= quick
DEVICE ?= auto
ARGS ?=
TEACHER ?=
BIN := .venv/bin

# Jupyter, IPython and matplotlib keep their own files in the clone too.
export IPYTHONDIR := $(CURDIR)/out/home/ipython
export JUPYTER_RUNTIME_DIR := $(CURDIR)/out/home/runtime
export MPLCONFIGDIR := $(CURDIR)/out/home/matplotlib
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
VITDISTILL = PYTHONWARNINGS=ignore PYDEVD_DISABLE_FILE_VALIDATION=1 $(BIN)/python -m vitdistill.cli
# $(call limit,SECONDS) stops the command after so many seconds, where `timeout` exists (not on macOS).
limit = $(if $(shell command -v timeout),timeout $(1))

.PHONY: help venv demo test test-all test-slurm test-versions study figures report docs bench bench-attention gpu lab clean
help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: .venv/installed ## install the tested versions and this package into .venv
.venv/installed: settings.ini setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-cache-dir uv
	UV_CACHE_DIR=.venv/cache $(BIN)/uv pip install -q --system-certs --compile-bytecode --python $(BIN)/python -e '.[dev]' || { \
		echo 'uv could not install (see its message above): trying pip'; rm -rf .venv/cache; $(BIN)/python -m pip install -q --no-cache-dir -e '.[dev]'; }
	rm -rf .venv/cache
	touch $@

demo: venv ## run the paper's experiment on the digits, in minutes -> out/demo/index.html
	@mkdir -p out/home/runtime
	@$(VITDISTILL) demo $(ARGS)

test: venv ## check that vitdistill/ matches nbs/, then run all notebooks and tests, in minutes
	@mkdir -p out/home/runtime
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_repository.py -k drifted
	OMP_NUM_THREADS=1 $(call limit,900) $(BIN)/python tests/forked.py $(BIN)/nbdev_test --n_workers 3 --timing
	OMP_NUM_THREADS=1 $(call limit,1500) $(BIN)/python tests/forked.py -m pytest -q -n 3 --dist loadfile \
		--no-loadscope-reorder --durations 25 --durations-min 4 -m "not slow" -W "ignore:Module already imported" \
		--deselect tests/test_repository.py::test_export_has_not_drifted tests

test-all: test ## run the slow tests and notebook cells too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow tests
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --flags slow

test-slurm: venv ## test grids on a real Slurm that it starts here; needs root, and slurm-wlm and munge from apt-get
	VITDISTILL_SLURM=1 OMP_NUM_THREADS=1 timeout 1800 $(BIN)/python -m pytest -q tests/test_slurm.py

test-versions: venv ## train with the oldest and the newest libraries that settings.ini allows, in folders that are removed; 6 GB
	tests/versions.sh oldest
	tests/versions.sh newest

study: venv ## run the paper's experiment on CIFAR-100; PRESET=paper|quick, TEACHER=FILE of weights, ARGS="-p data_root DIR"
	@mkdir -p out/home/runtime
	@$(VITDISTILL) study --preset $(PRESET) $(if $(TEACHER),--teacher $(TEACHER)) $(ARGS)

figures: venv ## rebuild figures and tables in reports/ and what nbs/analysis shows (changes tracked files)
	@mkdir -p out/home/runtime
	@$(BIN)/python reports/build.py $(ARGS)

report: venv ## put all of reports/ on one page -> out/report/index.html
	@$(VITDISTILL) report --first answer results 'study_*' $(ARGS)

docs: venv .venv/docs ## build the documentation site -> out/docs/index.html
	@mkdir -p out/home/runtime
	$(BIN)/python docs/build.py $(ARGS)
.venv/docs: .venv/installed
	$(BIN)/uv pip install -q --system-certs --no-cache --python $(BIN)/python -e '.[dev,docs]' || $(BIN)/python -m pip install -q --no-cache-dir -e '.[dev,docs]'
	touch $@

bench: venv ## time training; DEVICE=cuda for a GPU, ARGS=--recipe for DeiT's recipe, ARGS=--keep to write to reports/bench
	$(BIN)/python -m vitdistill.bench --device $(DEVICE) $(ARGS)

bench-attention: venv ## time HiLo attention, plain attention, a ViT and a ResNet; DEVICE and --keep as for bench
	$(BIN)/python -m vitdistill.bench --attention --device $(DEVICE) $(ARGS)

# It installs nothing. It uses PYTHON if you name one, else the Python of .venv if there is one, else python3.
GPU_PYTHON = $(if $(filter file default,$(origin PYTHON)),$(firstword $(wildcard $(BIN)/python) $(PYTHON)),$(PYTHON))
gpu: ## test and time a GPU, in 11 minutes; PYTHON needs torch, timm, pandas and pytest; without a GPU a dry run
	$(GPU_PYTHON) tests/gpu/run.py $(ARGS)

lab: venv ## open JupyterLab here
	$(BIN)/jupyter lab --notebook-dir .

clean: ## remove out/ and caches, but not .venv or reports/
	rm -rf out .pytest_cache .hypothesis *.egg-info
