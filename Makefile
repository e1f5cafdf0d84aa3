# make setup    the environment in .venv (everything that the tests need)
# make demo     record, train both stages, sample, score, report: runs/demo/report/index.html
# make test     what CI runs, under 15 minutes on 2 cores
# make coverage what the tests run of rqvae/
# make docs     renew docs/configuration.md and docs/cli.md from the code; make site: all pages as HTML in build/site
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Spinning OpenMP threads make a step 10 x slower when the cores are shared.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: setup demo test test-all coverage lint docs site figures clean
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

# Which lines of rqvae/ the tests run, those of processes that they start included; fails below 90 %.
coverage: setup
	$(PY) -m pytest -n 2 -m "not slow" --cov --cov-report=term:skip-covered

docs: setup
	$(PY) -m docs.generate

site: docs
	$(PY) -m mkdocs build --strict -f docs/mkdocs/mkdocs.yml

figures: setup
	$(PY) -m benchmarks.figures $(ISSUE)

clean:
	rm -rf runs build *.egg-info
