# Everything runs in .venv; `make` alone lists the targets.
# Other wheels of torch:  make install TORCH="torch==2.13.0 --index-url INDEX", with an index from torch's
# installation page (the one for CPUs is much smaller).

VENV   ?= .venv
PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13,$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
TORCH  ?= torch==2.13.0
PIP    := $(VENV)/bin/python -m pip -qq --disable-pip-version-check
STAMP  := $(VENV)/.installed

help:
	@echo "make install   the package and its tools into $(VENV)"
	@echo "make serve     the demo model at http://127.0.0.1:8000/v1  (ARGS=\"MODEL --port 8001\")"
	@echo "make test      pytest  (ARGS=\"-k scheduler\")"
	@echo "make coverage  pytest, then the share of engine/ and serve_app/ that ran; fails below 90 %"
	@echo "make chaos     faults at random under a load that verifies every token, 10 minutes  (ARGS=\"--minutes 2\")"
	@echo "make check     ruff format, ruff, mypy"
	@echo "make bench     every benchmark, then docs/benchmarks.md"
	@echo "make gpu-bench the kernels and the engine checked and timed on this machine's GPU  (ARGS=\"tune\")"

install: $(STAMP)

# Done again when pyproject.toml or the compiled kernels change. torch goes first, so that TORCH decides the build.
$(STAMP): pyproject.toml $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)
	@test -x $(VENV)/bin/python || test -n "$(PYTHON)" || { echo "Manta needs Python 3.11 or newer: make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) ..."
	@$(VENV)/bin/python -c 'import torch' 2>/dev/null || $(PIP) install $(TORCH)
	@$(PIP) install --editable '.[dev,bench]'
	@touch $@

serve: install
	@$(VENV)/bin/manta serve $(ARGS)

test: install
	@$(VENV)/bin/python -m pytest $(ARGS)

coverage: install
	@$(VENV)/bin/python -m coverage run -m pytest $(ARGS)
	@$(VENV)/bin/python -m coverage combine -q
	@$(VENV)/bin/python -m coverage report --sort=cover --skip-covered

chaos: install
	@$(VENV)/bin/python -m tests.chaos $(ARGS)

check: install
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

bench: install
	@$(VENV)/bin/python -m benchmarks.scheduler
	@$(VENV)/bin/python -m benchmarks.serving
	@$(VENV)/bin/python -m benchmarks.cpu_engine
	@$(VENV)/bin/python -m benchmarks.failover
	@$(VENV)/bin/python -m benchmarks.routing
	@$(VENV)/bin/python -m benchmarks.weights
	@$(VENV)/bin/python -m benchmarks.kv_quality
	@$(VENV)/bin/python -m benchmarks.quantization
	@$(VENV)/bin/python -m benchmarks.autoscaling
	@$(VENV)/bin/python -m benchmarks.autoscaling --proxy default
	@$(VENV)/bin/python -m benchmarks.simulate
	@$(VENV)/bin/python -m benchmarks.simulate --large
	@$(VENV)/bin/python -m benchmarks.parallel
	@$(VENV)/bin/python -m benchmarks.report

# Without .venv as well: a machine with a GPU may have torch, Triton and transformers and no network.
gpu-bench:
	@$(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON)) -m benchmarks.gpu $(ARGS)

.PHONY: help install serve test coverage chaos check bench gpu-bench
