# `make install`, `make demo` and `make test` are all the set-up there is: each makes .venv on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	touch $@

.PHONY: install demo test lint format
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

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
