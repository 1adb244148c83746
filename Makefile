# make demo   sets up, and compiles the bundled Mixtral into FP8 and INT4 engines that answer
# make test   sets up, and runs the tests
# make soak   the long tests, by hand
# make lint   ruff and pyright
# make bench  our own benchmarks (perf/bench.py), each beside its last committed figure; NAMES="road decode" for some

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Two cores are common; more threads than cores only slow torch down.
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test soak lint bench venv clean

demo: $(VENV)/.ready
	bash demo.sh

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu"

soak: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m "slow" -rP

lint: $(VENV)/.ready
	$(BIN)/python -m pip install -q -e '.[dev]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

bench: $(VENV)/.ready
	$(BIN)/python perf/bench.py $(NAMES)

venv: $(VENV)/.ready

# Debian and Ubuntu split venv off; the package is asked for only where it is missing.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { \
	  echo "python3-venv is missing; installing it with apt-get"; rm -rf $(VENV); \
	  $$( [ "$$(id -u)" = 0 ] || echo sudo ) sh -c 'apt-get update -qq && apt-get install -y -qq python3-venv' && \
	  $(PYTHON) -m venv $(VENV); }

# torch first, in its CPU build where there is no NVIDIA driver: the default build brings gigabytes of CUDA. pip finds the
# CPU build where an index or wheel directory that it is configured for has it; uv knows PyTorch's own index.
$(VENV)/.ready: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --upgrade pip
	@if [ -e /proc/driver/nvidia/version ]; then \
	  $(BIN)/python -m pip install -q torch==$(TORCH); \
	else \
	  $(BIN)/python -m pip install -q "torch==$(TORCH)+cpu" 2>/dev/null \
	  || { $(BIN)/python -m pip install -q uv && UV_HTTP_TIMEOUT=20 $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend=cpu torch==$(TORCH); } \
	  || $(BIN)/python -m pip install -q torch==$(TORCH); \
	fi
	$(BIN)/python -m pip install -q -e '.[rtx,gpu,test]'
	[ "$$(uname -m)" != x86_64 ] || $(MAKE) --no-print-directory triton perf-analyzer
	touch $@

# A Triton server for machines without NGC's container: without its dependencies, which want numpy 1 for everybody. Only
# its Python stub gets one, in an environment of its own; there is no numpy 1 for Python 3.13.
.PHONY: triton
triton:
	@command -v tritonserver || [ -x /opt/tritonserver/bin/tritonserver ] || \
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 13))' || { \
	  $(BIN)/python -m pip install -q --no-deps nvidia-pytriton==0.7.0 && \
	  $(BIN)/python -m venv $(VENV)/triton-stub && $(VENV)/triton-stub/bin/python -m pip install -q 'numpy<2'; }

# The last perf_analyzer that runs on glibc 2.34, in a directory of its own, since its client is not ours. What it links
# comes with nvidia-pytriton. `trtbuild doctor` says what is missing where this fails.
.PHONY: perf-analyzer
perf-analyzer:
	command -v perf_analyzer || [ -x $(VENV)/perf-analyzer/bin/perf_analyzer ] || \
	  $(BIN)/python -m pip install -q --no-deps --only-binary=:all: --platform manylinux1_x86_64 --target $(VENV)/perf-analyzer tritonclient==2.51.0 || \
	  echo "no perf_analyzer: its tests will be skipped"

# AIPerf, whose pins are its own: 1.2 GB, so by hand only. Its tests are skipped without it.
.PHONY: aiperf
aiperf:
	$(BIN)/python -m venv $(VENV)/aiperf && $(VENV)/aiperf/bin/python -m pip install -q aiperf==0.13.0

clean:
	rm -rf $(VENV) .demo
