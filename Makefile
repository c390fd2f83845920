# `make install`, `make demo` and `make test` are all the set-up there is: each makes .venv on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
# the oldest Python that pyproject.toml allows, where it is installed (pyenv's shims exist without it), else the same one
OLDEST_PYTHON ?= $(firstword $(foreach python,python3.10 $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python),\
    $(shell $(python) -c '' 2>/dev/null && echo $(python))) $(BIN)/python)
TORCH ?= 2.11

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	touch $@

.PHONY: install demo test test-lowest test-torch test-gpu lint format constraints
install: .venv/.installed

demo: .venv/.installed
	$(BIN)/itpn demo

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# The whole suite with the lowest version of everything that pyproject.toml names.
.venv-lowest/.installed: pyproject.toml .venv/.installed
	$(BIN)/uv venv --quiet --clear --python $(OLDEST_PYTHON) .venv-lowest
	$(BIN)/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct -e '.[test]'
	touch $@

test-lowest: .venv-lowest/.installed
	.venv-lowest/bin/python -V
	$(BIN)/uv pip list --quiet --python .venv-lowest/bin/python | grep -E '^(torch|torchvision|timm|lightning|pillow|numpy) '
	OMP_NUM_THREADS=1 .venv-lowest/bin/pytest -n 2 --dist worksteal

# What torch.compile makes of the networks, with one minor version of torch: make test-torch TORCH=2.11
test-torch: .venv/.installed
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-torch
	$(BIN)/uv pip install --quiet --python .venv-torch/bin/python -e '.[test]' 'torch==$(TORCH).*'
	OMP_NUM_THREADS=1 .venv-torch/bin/pytest -n 2 --dist worksteal -m compile

# The tests that need a GPU, with the python3 that is there: no network and no .venv.
test-gpu:
	OMP_NUM_THREADS=4 PYTHONPATH=src python3 -m pytest -m gpu tests/gpu

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The newest versions, for every Python at once.
constraints: .venv/.installed
	sed '/^#/!d' constraints.txt > .venv/constraints.txt
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 --no-header --no-annotate \
	    --quiet >> .venv/constraints.txt
	mv .venv/constraints.txt constraints.txt
