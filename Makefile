# vitdistill: every command sets itself up in .venv and writes inside this folder only. `make help` lists them.
PYTHON ?= python3
PRESET ?= quick
DEVICE ?= auto
ARGS ?=
TEACHER ?=
BIN := .venv/bin
EXPERIMENTS := nbs/experiments
ANALYSIS := nbs/analysis

# Jupyter's, IPython's and matplotlib's own files stay in the clone too; one thread a process when several run side by side.
export IPYTHONDIR := $(CURDIR)/out/home/ipython
export JUPYTER_RUNTIME_DIR := $(CURDIR)/out/home/runtime
export MPLCONFIGDIR := $(CURDIR)/out/home/matplotlib
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
# $(call notebook,TEMPLATE,OUTPUT,PARAMETERS): execute one by papermill, from the root, showing what it prints and where it lies
# (papermill warns of each name that a template doesn't declare; ours take any field of Config and refuse the rest themselves)
notebook = PYTHONWARNINGS=ignore PYDEVD_DISABLE_FILE_VALIDATION=1 $(BIN)/papermill --log-output --no-progress-bar --cwd . \
	$(1).ipynb $(2).ipynb $(3) 2>&1 | { grep --line-buffered -vE '^(\[IPKernelApp\]|(Input|Output) Notebook:|Executing notebook|(Executing|Ending) Cell|Working directory|Passed unknown parameter|<(Figure|pandas)|$$)' || true; } && \
	echo "its notebook: $(2).ipynb"

.PHONY: help venv demo test test-all test-slurm study figures report bench gpu lab clean
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
	@mkdir -p out/demo out/home/runtime
	@echo "[1/4] a teacher: a small vision transformer on the digits"
	@$(call notebook,$(EXPERIMENTS)/e00_teacher,out/demo/e00_teacher,-p preset demo)
	@echo "[2/4] ResNet-50 on labels alone"
	@$(call notebook,$(EXPERIMENTS)/e01_baseline_resnet50,out/demo/e01_baseline_resnet50,-p preset demo)
	@echo "[3/4] ResNet-50 taught by the vision transformer"
	@$(call notebook,$(EXPERIMENTS)/e02_distilled_resnet50,out/demo/e02_distilled_resnet50,-p preset demo)
	@echo "[4/4] figures and tables"
	@$(call notebook,$(ANALYSIS)/a01_paper,out/demo/a01_paper,-p reports out/demo/runs -p out out/demo)
	@echo "wrote:"; ls -d out/demo/*.ipynb out/demo/figures/* out/demo/tables/* out/demo/index.html | sed 's/^/  /'

test: venv ## export drift, notebooks and tests, on two cores in minutes
	@mkdir -p out/home/runtime
	$(BIN)/python -m pytest -q tests/test_repository.py
	OMP_NUM_THREADS=1 timeout 900 $(BIN)/nbdev_test --n_workers 2 --timing
	OMP_NUM_THREADS=1 timeout 1500 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" tests

test-all: test ## also what takes longer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow tests
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --flags slow

test-slurm: venv ## grids on a real Slurm, which it starts and ends: needs root, slurm-wlm and munge (apt-get install)
	VITDISTILL_SLURM=1 OMP_NUM_THREADS=1 timeout 1800 $(BIN)/python -m pytest -q tests/test_slurm.py

study: venv ## the paper's pair on CIFAR-100: PRESET=paper|quick, TEACHER=FILE to fine-tune from, ARGS="-p data_root DIR"
	@mkdir -p out/study out/home/runtime
	@$(call notebook,$(EXPERIMENTS)/e00_teacher,out/study/$(PRESET)-e00_teacher,-p preset $(PRESET) $(ARGS) $(if $(TEACHER),-p student_pretrained False -p student_weights $(TEACHER)))
	@$(call notebook,$(EXPERIMENTS)/e01_baseline_resnet50,out/study/$(PRESET)-e01_baseline_resnet50,-p preset $(PRESET) $(ARGS))
	@$(call notebook,$(EXPERIMENTS)/e02_distilled_resnet50,out/study/$(PRESET)-e02_distilled_resnet50,-p preset $(PRESET) $(ARGS))
	@$(call notebook,$(ANALYSIS)/a01_paper,out/study/a01_paper,-p out out/study -p dataset cifar100)

figures: venv ## rebuild reports/figures and reports/tables from reports/runs (this, and make bench ARGS=--keep, change tracked files)
	@mkdir -p out/figures out/home/runtime
	@$(call notebook,$(ANALYSIS)/a00_data,out/figures/a00_data,-p out reports)
	@$(call notebook,$(ANALYSIS)/a02_study,out/figures/a02_study,-p reports reports/runs -p out reports)
	@$(call notebook,$(ANALYSIS)/a03_trends,out/figures/a03_trends,-p reports reports/runs -p out reports -p dataset cifar100)
	@$(call notebook,$(ANALYSIS)/a04_complexity,out/figures/a04_complexity,-p out reports -p measure False)
	@$(call notebook,$(ANALYSIS)/a05_agreement,out/figures/a05_agreement,-p reports reports/runs -p out reports)
	@$(call notebook,$(ANALYSIS)/a06_deit,out/figures/a06_deit,-p reports reports/runs -p out reports)
	@$(call notebook,$(ANALYSIS)/a01_paper,out/figures/a01_paper,-p reports reports/runs -p out reports -p dataset cifar100)

report: venv ## all of reports/ on one self-contained page, as make figures and make bench ARGS=--keep left it -> out/report/index.html
	$(BIN)/python -m vitdistill.report $(ARGS)

bench: venv ## what an epoch costs here, beside the usual ways: DEVICE=cuda for a GPU, ARGS=--keep to keep it in reports/bench
	$(BIN)/python -m vitdistill.bench --device $(DEVICE) $(ARGS)

# It sets nothing up: PYTHON where that is given, else .venv's where that is there, else python3.
GPU_PYTHON = $(if $(filter file default,$(origin PYTHON)),$(firstword $(wildcard $(BIN)/python) $(PYTHON)),$(PYTHON))
gpu: ## what has to be seen on a GPU, in 24 minutes: PYTHON=python3 with torch, timm, pandas, pytest; without a GPU a dry run
	$(GPU_PYTHON) tests/gpu/run.py $(ARGS)

lab: venv ## JupyterLab on this repository
	$(BIN)/jupyter lab --notebook-dir .

clean: ## remove what commands wrote here: out/ and caches (not .venv, not reports/)
	rm -rf out .pytest_cache .hypothesis *.egg-info
