# make setup    the environment in .venv (everything that the tests need)
# make demo     record, train both stages, sample, score, report: runs/demo/report/index.html
# make test     what CI runs, under 15 minutes on 2 cores
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Spinning OpenMP threads make a step 10 x slower when the cores are shared.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: setup demo test test-all lint figures clean
setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 13), "Python 3.10, 3.11 or 3.12 is needed (PYTHON=...), this is " + sys.version'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: setup
	$(PY) -m rqvae demo

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: lint
	$(PY) -m pytest -n 2 -m "not slow"

test-all: lint
	$(PY) -m pytest -n 2

figures: setup
	$(PY) -m benchmarks.figures $(ISSUE)

clean:
	rm -rf runs build *.egg-info
