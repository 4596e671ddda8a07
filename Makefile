PYTHON ?= $(or $(wildcard .venv/bin/python),python3)
WORKDIR ?= runs/demo
RESULTS ?= benchmarks/results/$(shell date +%F)-cpu.jsonl
STEP ?= benchmarks/results/$(shell date +%F)-tpu-step.jsonl
BIN := .venv/bin
# A build for CPUs is enough, and gigabytes smaller, where one is at hand: make bench-peers TORCH=torch==2.13.0+cpu
TORCH ?= torch>=2.9,<3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
STAMP := .venv/.installed-$(VERSION)
# A folder that another version of Python made is emptied first.
FRESH = $(if $(wildcard .venv/bin/python$(VERSION)),,--clear)

.PHONY: help install demo notebook test test-all test-tpu-compile test-gpu-compile test-slurm same-program lint bench bench-gpu \
    bench-peers bench-tpu-schedule bench-tpu-step clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## the package and its tests into .venv

$(STAMP): setup.py
	$(if $(filter 3.11 3.12 3.13,$(VERSION)),,$(error \
	    expected Python 3.11 to 3.13, found $(or $(VERSION),no $(PYTHON)); name one, as in make PYTHON=python3.12))
	@echo "installing into .venv with Python $(VERSION) (about a minute)"
	@$(PYTHON) -m venv $(FRESH) .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@

demo: install  ## train, evaluate and sample a small model on Python's own source text
	$(BIN)/python -m allattn train --config=configs/demo.py --workdir=$(WORKDIR)
	$(BIN)/python -m allattn generate --workdir=$(WORKDIR) --prompt="def " --length=300 --temperature=0.7 --seed=1

notebook: install  ## execute launch/colab.ipynb on this machine and keep its outputs
	rm -rf launch/runs launch/my.txt
	$(BIN)/jupyter-execute --inplace launch/colab.ipynb

test: install  ## everything that is quick; CI runs this
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist worksteal --session-timeout=3600

test-all: install  ## and the slow ones
	$(BIN)/python -m pytest -q

test-tpu-compile:  ## compile the TPU kernels and every model's step for v4 to tpu7x; fetches libtpu, needs no TPU
	@test -x .venv-tpu/bin/python || $(PYTHON) -m venv .venv-tpu
	@.venv-tpu/bin/python -m pip install -q --disable-pip-version-check -e '.[test,tpu]'
	JAX_PLATFORMS=cpu .venv-tpu/bin/python -m pytest -q -s tests/attention/test_tpu_compile.py \
	    tests/benchmarks/test_schedule.py
	JAX_PLATFORMS=cpu .venv-tpu/bin/python -m benchmarks.compile

test-gpu-compile:  ## compile the GPU kernels, and a step for a node of H100; needs CUDA's compiler, which is fetched, but no GPU
	@test -x .venv-gpu/bin/python || $(PYTHON) -m venv .venv-gpu
	@.venv-gpu/bin/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@jax=$$(.venv-gpu/bin/python -c 'import jax; print(jax.__version__)') && .venv-gpu/bin/python -m pip install -q \
	    --disable-pip-version-check --no-deps jax-cuda12-plugin==$$jax jax-cuda12-pjrt==$$jax nvidia-cuda-nvcc-cu12
	JAX_PLATFORMS=cpu .venv-gpu/bin/python -m pytest -q -s tests/attention/test_gpu_compile.py

test-slurm: install  ## launch/slurm.sbatch on a real SLURM, started here; needs root and Debian, which has the packages
	@test "$$(id -u)" = 0 || { echo "make test-slurm: expected root, which SLURM's daemons need, found $$(id -un)" >&2; exit 2; }
	@{ command -v slurmctld && command -v munged; } >/dev/null || { apt-get update -q && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends slurm-wlm munge; }
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -s tests/launch/test_slurm.py

same-program: install  ## the same lowered programs as at BASE, a commit: nothing but names and places changed
	$(BIN)/python .ci/same_program.py --base=$(BASE)

lint: install  ## style, types, shell scripts, and the counts of dense code
	$(BIN)/python .ci/ratchet.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources launch/*.sh launch/*.sbatch

bench: install  ## speed of training, evaluation and the operation, kept as a file; ends with a table beside what is asked
	@mkdir -p $(dir $(RESULTS))
	{ for mode in train evaluate; do for geometry in tiny small-8; do for spans in full zero mixed; do \
	  $(BIN)/python -m benchmarks.train --mode=$$mode --geometry=$$geometry --spans=$$spans; done; done; done; \
	  for spans in full zero; do $(BIN)/python -m benchmarks.attention --spans=$$spans --dropout=0.3; done; \
	  $(BIN)/python -m benchmarks.vocabulary; } \
	  | tee -a $(RESULTS)
	$(BIN)/python -m benchmarks.table $(RESULTS)

bench-gpu:  ## what a GPU is asked for, in under nine minutes, with the Python at hand (its JAX must see the GPU)
	$(PYTHON) -m benchmarks.gpu

bench-peers: install  ## a training step of ours beside PyTorch's, in three minutes on two cores; fetches torch
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install -q --disable-pip-version-check '$(TORCH)' 'x-transformers>=2.31,<3'
	$(BIN)/python -m benchmarks.peers

bench-tpu-schedule:  ## the TPU kernels' share of the matrix units by libtpu's schedule, in ten minutes; needs no TPU
	@test -x .venv-tpu/bin/python || $(PYTHON) -m venv .venv-tpu
	@.venv-tpu/bin/python -m pip install -q --disable-pip-version-check -e '.[test,tpu]'
	JAX_PLATFORMS=cpu .venv-tpu/bin/python -m benchmarks.schedule

bench-tpu-step:  ## where the cycles of a whole training step go on a v5e, by libtpu's schedule, in ten minutes; needs no TPU
	@test -x .venv-tpu/bin/python || $(PYTHON) -m venv .venv-tpu
	@.venv-tpu/bin/python -m pip install -q --disable-pip-version-check -e '.[test,tpu]'
	JAX_PLATFORMS=cpu .venv-tpu/bin/python -m benchmarks.step_cycles --output=$(STEP)

clean:  ## remove environments and caches
	rm -rf .venv .venv-tpu .venv-gpu .venv-peers .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
