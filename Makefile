# make demo    set up and run the main job: record trajectories, train a Decision Mamba, evaluate it
# make test    set up and run the tests
# make test-quick  without those that compile: packaging, sanitisers, kernels ahead of time
# make targets the Triton kernels ahead of time for every GPU, not only one of each vendor
# make lint    formatter, linter, type check
# make bench   time the ops against their rivals (OP=selective_scan for one)
# make doctor  what can run here, and why the rest cannot
# make clean   remove the virtual environment and everything built

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OP ?= selective_scan
JOBS ?= auto

.PHONY: demo test test-quick targets lint bench doctor setup dev clean
.DELETE_ON_ERROR:

# torch first and pinned, so that no other package chooses a build of it.
$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt setuptools pybind11 ninja
	@if [ "$$(uname -s)" = Linux ]; then $(PIP) install --quiet -c constraints.txt triton; fi
	@touch $@

$(VENV)/ssmkit.stamp: $(VENV)/torch.stamp pyproject.toml setup.py $(shell find csrc -type f)
	$(PIP) install --quiet --no-build-isolation -c constraints.txt -e '.[trajectory]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/ssmkit.stamp
	$(PIP) install --quiet --no-build-isolation -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/test.stamp
	$(PIP) install --quiet --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(VENV)/ssmkit.stamp
dev: $(VENV)/dev.stamp

demo: $(VENV)/ssmkit.stamp
	$(BIN)/ssmkit demo --out runs/demo

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n $(JOBS)

test-quick: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

targets: $(VENV)/test.stamp
	SSMKIT_TARGETS=all $(BIN)/python -m pytest tests/kernels/test_compile.py

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/test.stamp
	$(BIN)/ssmkit bench $(OP)

doctor: $(VENV)/ssmkit.stamp
	$(BIN)/ssmkit doctor

clean:
	rm -rf $(VENV) build dist ssmkit.egg-info ssmkit/native/_native*.so
