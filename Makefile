# `make demo` and `make test` are all a newcomer needs; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

QUICK := tests/architecture tests/config tests/data tests/foresight tests/model tests/tokenizer tests/planning tests/recipes
NUMERIC := tests/eval tests/foresight tests/kernels/test_values.py tests/kernels/test_linear_cross_entropy.py tests/model \
	tests/tokenizer tests/engine/test_trajectories.py

.DEFAULT_GOAL := help
.PHONY: help install demo test test-quick test-cpus test-matrix test-exhaustive test-slurm test-study \
	test-python test-oldest test-mutations check docs format verify kernels kernels-cuda \
	bench bench-kernels bench-data bench-safety bench-sampling bench-memory gpu-rehearse gpu-rehearse-oldest gpu-check gpu-bundle bundle clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "mirai_ds needs Python 3.10 to 3.13; say which: make PYTHON=python3.12 ..."; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "no venv module: apt-get install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

install: $(STAMP) ## make .venv and install mirai_ds with its development tools

demo: $(STAMP) ## train Mirai-E on real digits with 2 ranks, draw, judge: under 5 minutes on 2 cores
	$(BIN)/mirai-ds train digits-mirai-e --fresh

test: $(STAMP) ## the whole fast suite, two tests at a time: six minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-quick: $(STAMP) ## what to run while working: two minutes; no ranks, no engines
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q $(QUICK) --ignore=tests/planning/test_memory.py

# What a processor without these units would compute.  Each has a compiler cache of its own: code of another unit crashes.
# Where all are hidden from PyTorch its compiler still takes the machine's (pack_vnni2 of AMX): no compiled tests there.
test-cpus: $(STAMP) ## the numeric tests with AVX2 only, and with SSE4.1 only
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(VENV)/avx2 \
		$(BIN)/python -m pytest -n 2 --dist worksteal -q $(NUMERIC)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(VENV)/sse41 \
		$(BIN)/python -m pytest -n 2 --dist worksteal -q -k 'not compiled' $(NUMERIC)

test-matrix: $(STAMP) ## the long matrices: gradients and losses over layouts, whole runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m matrix -n 2 --dist worksteal

test-exhaustive: $(STAMP) ## what the matrices leave out: more of their products, longer runs; by hand
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m exhaustive -n 2 --dist worksteal

test-slurm: $(STAMP) ## jobs on a Slurm cluster in namespaces: 10 minutes (root; slurmctld slurmd slurm-client munge)
	$(BIN)/python -m pytest -m slurm -rs -n 2 --dist worksteal

test-study: $(STAMP) ## the small study's main arms on the digits: 12 minutes on one core
	$(BIN)/python -m pytest -m study

test-python: ## the fast suite under PYTHON=python3.12 in .venv-3.12; by hand, before a release
	$(MAKE) VENV=.venv-$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') test

test-oldest: ## the same with the oldest PyTorch that is supported, in .venv-oldest; by hand, before a release
	PIP_CONSTRAINT=$(CURDIR)/tests/gpu/rehearsal/oldest.txt $(MAKE) VENV=.venv-oldest test

test-mutations: $(STAMP) ## plant small faults one at a time: the suite must catch each; by hand; ARGS='--only NAME'
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutations $(ARGS)

check: $(STAMP) ## ruff, mypy, architecture tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/architecture

docs: $(STAMP) ## the API's pages from its docstrings, into build/docs
	$(BIN)/pdoc --no-show-source -o build/docs mirai_ds.library '!mirai_ds\.library\.'

format: $(STAMP) ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

verify: $(STAMP) ## recompute the reference vectors
	$(BIN)/mirai-ds verify tests/fixtures/*.npz

kernels: $(STAMP) ## compile the fused operations for this machine (the first use would do it)
	$(BIN)/python -m mirai_ds.kernels.build

kernels-cuda: $(STAMP) ## compile the CUDA kernels, no GPU needed; show registers, refuse spills
	@if command -v nvcc >/dev/null || test -x "$$CUDA_HOME/bin/nvcc"; then $(BIN)/python -m mirai_ds.kernels.registers; \
		else echo "kernels-cuda: SKIPPED, no nvcc here"; fi

bench: $(STAMP) ## the training step against a plain baseline: time, parts, memory (`mirai-ds bench` lists others)
	$(BIN)/mirai-ds bench step --out docs/results/step.csv

bench-kernels: $(STAMP) ## time and memory of the fused operations against eager and compiled PyTorch
	$(BIN)/mirai-ds bench kernels --out docs/results/kernels.csv
	$(BIN)/mirai-ds bench traffic --out docs/results/kernels.csv

bench-data: $(STAMP) ## speed of extraction and of loading codes and images, against the peers' way
	$(BIN)/mirai-ds bench data --out docs/results/data.csv

bench-safety: $(STAMP) ## what guards, saves and digests cost, in steps
	$(BIN)/mirai-ds bench safety --out docs/results/safety.csv

bench-sampling: $(STAMP) ## images/s of sampling GPT-B against plain loops
	$(BIN)/mirai-ds bench sampling --out docs/results/sampling.csv

bench-memory: $(STAMP) ## peak memory of real steps beside what `mirai-ds plan` says
	$(BIN)/mirai-ds bench memory --ranks 2 --out docs/results/memory.csv

gpu-rehearse: $(STAMP) ## the GPU path on a fake GPU: 10 minutes on 2 cores (C++ compiler, CUDA headers)
	$(BIN)/python -m pytest -m rehearsal tests/gpu/rehearsal -n 2 --dist loadfile

gpu-rehearse-oldest: ## the same with the oldest PyTorch that is supported, in .venv-oldest; by hand, before a release
	PIP_CONSTRAINT=$(CURDIR)/tests/gpu/rehearsal/oldest.txt $(MAKE) VENV=.venv-oldest gpu-rehearse

gpu-check: ## on a machine with a GPU, no venv needed: checks in slices; SLICE=1-3 OUT=folder ARGS=--list
	$(PYTHON) -m tests.gpu.check $(if $(SLICE),--slice $(SLICE)) $(ARGS)

gpu-bundle: $(STAMP) ## what a bare GPU machine without a network needs, into one tar; ARGS='--python 3.12 --torch 2.11.0'
	$(BIN)/python -m tests.gpu.check.bundle $(ARGS)

bundle: $(STAMP) ## project, wheels and kernels for a machine without a network, one tar; ARGS='--parts libraries,kernels'
	$(BIN)/python -m tests.offline.bundle $(ARGS)

clean: ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
