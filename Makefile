# make setup    the environment in .venv (everything that the tests need)
# make play     play inside the world model that comes with the package: http://127.0.0.1:8765
# make demo     record, train both stages, sample, score, report: runs/demo/report/index.html
# make test     what CI runs, under 15 minutes on 2 cores
# make test-all make test, what is slow, and a part of it on torch 2.7
# make coverage what the tests run of rqvae/
# make docs     renew docs/configuration.md and docs/cli.md from the code; make site: all pages as HTML in build/site
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Spinning OpenMP threads make a step 10 x slower when the cores are shared.
export OMP_WAIT_POLICY := PASSIVE

ONNX := build/onnx
WEB := build/web

.PHONY: setup demo play test test-all test-torch27 coverage lint docs site figures clean
setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 13), "Python 3.10, 3.11 or 3.12 is needed (PYTHON=...), this is " + sys.version'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: setup
	$(PY) -m rqvae demo

play: setup
	$(PY) -m rqvae play maze-chase

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: lint
	$(PY) -m pytest -n 2 -m "not slow"

test-all: lint test-torch27 $(ONNX)/.ready $(WEB)/.ready
	PYTHONPATH=$(ONNX) ONNXRUNTIME_WEB=$(WEB)/node_modules/onnxruntime-web $(PY) -m pytest -n 2

# The extra [onnx], beside the environment, which `make test` shows to do without it. What it shares with the environment
# (numpy, protobuf) is the environment's. The browser's runtime is an npm package; without npm its one test is left out.
$(ONNX)/.ready: $(VENV)/.ready
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(ONNX) \
		'onnx>=1.17,<2' 'onnxscript>=0.5,<1' onnx-ir 'onnxruntime>=1.20,<2' ml_dtypes flatbuffers coloredlogs humanfriendly
	touch $@

$(WEB)/.ready:
	mkdir -p $(WEB)
	! command -v npm || npm install --silent --no-save --prefix $(WEB) onnxruntime-web@1
	touch $@

# The oldest torch that is supported, which is Gaudi's: the loop, the models and the backends on 2.7. Only torch and
# torchvision are other ones (0.8 GB); the rest, CUDA's libraries included, is the environment's.
# torch_xla and triton, which others import where they are, go with 2.9 alone: they are hidden.
TORCH27 := build/torch27
test-torch27: $(TORCH27)/.ready
	PYTHONPATH=$(TORCH27) $(PY) -c 'import torch; assert torch.__version__.startswith("2.7."), torch.__version__'
	PYTHONPATH=$(TORCH27) $(PY) -m pytest -n 2 -m "not slow" tests/test_loop.py tests/test_precision.py \
		tests/test_stage1.py tests/test_stage2.py tests/test_two_stage.py tests/test_ema.py tests/test_compile.py \
		tests/test_world_size.py tests/test_resume.py tests/test_cuda.py tests/test_hpu_contract.py

$(TORCH27)/.ready: $(VENV)/.ready
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(TORCH27) torch==2.7.1 torchvision==0.22.1
	echo 'import sys; sys.modules["torch_xla"] = sys.modules["triton"] = None' > $(TORCH27)/sitecustomize.py
	touch $@

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
