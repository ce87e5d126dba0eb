# Two commands are the whole set-up: `make demo` trains for real, `make test` lints and tests.
# PYTHON       the interpreter that makes the environment (3.11 or newer)
# TORCH_INDEX  a package index for torch, where the default one has no CPU build of it
PYTHON ?= python3
TORCH_INDEX ?=
TORCH := torch==2.13.0

BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check
TORCH_FROM := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -n 1)

.PHONY: venv demo test lint bench clean
.DEFAULT_GOAL := demo

venv: .venv/installed

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifeq ($(HAS_GPU),)
	@# Without a GPU a CUDA build is gigabytes for nothing: look before it is downloaded.
	@if $(PIP) install --dry-run --quiet --report - $(TORCH_FROM) $(TORCH) 2>/dev/null \
	    | grep -q '"name": "nvidia-'; then \
	  echo "No NVIDIA GPU here, but $(TORCH) would bring CUDA packages from this package index."; \
	  echo "Name an index with CPU builds (PyTorch's installation page lists one):"; \
	  echo "    make $(or $(MAKECMDGOALS),demo) TORCH_INDEX=<url>"; \
	  exit 1; \
	fi
endif
	$(PIP) install --quiet $(TORCH_FROM) $(TORCH)
	$(PIP) install --quiet --editable '.[dev]'
	touch $@

demo: venv
	$(BIN)/python examples/demo.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A file is run by one process: it starts its ranks once.
test: lint
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

bench: venv
	$(BIN)/python benchmarks/ring_kernel.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
