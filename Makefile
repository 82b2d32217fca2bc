# `make run` and `make test` need Python >= 3.11 and make; they install into .venv (with uv where it is installed).
PYTHON ?= python3
BIN := .venv/bin
export JAX_PLATFORMS ?= cpu

.PHONY: run test test-all lint format benchmarks clean

run: .venv/.installed  ## train AL-RNN on Lorenz-63 and Roessler, check the paper's claims, draw the figures
	$(BIN)/python -m experiments run alrnn $(ARGS)

test: .venv/.installed-test lint  ## lint, types, layers, and every test but the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-all: .venv/.installed-test lint  ## the slow tests too
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "slow or not slow"

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: .venv/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/bin/python:
	if command -v uv >/dev/null; then uv venv --seed .venv; else $(PYTHON) -m venv .venv; fi

.venv/.installed: .venv/bin/python pyproject.toml
	if command -v uv >/dev/null; then uv pip install --python .venv -e .; else $(BIN)/python -m pip install --quiet -e .; fi
	touch $@

.venv/.installed-test: .venv/bin/python pyproject.toml
	if command -v uv >/dev/null; then uv pip install --python .venv -e '.[test]'; else $(BIN)/python -m pip install --quiet -e '.[test]'; fi
	touch $@ .venv/.installed

clean:
	rm -rf .venv .cache runs
