# Everything works from a fresh clone with python3 (3.11 or newer) and make; see README.md.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# The versions that were tested: PIP_CONSTRAINT=constraints.txt make ... TORCH=cpu: PyTorch without CUDA, from its own index.
ifeq ($(TORCH),cpu)
export PIP_EXTRA_INDEX_URL := https://download.pytorch.org/whl/cpu
endif
INSTALLED := $(VENV)/.installed$(subst /,-,$(CURDIR))

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow gpu-check lint docs

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "TORCH=cpu takes PyTorch without CUDA; PIP_CONSTRAINT=constraints.txt the versions that were tested"
	@echo "PYTHON=$(PYTHON) makes the environment VENV=$(VENV) where there is none: make test VENV=PATH"

quickstart: $(INSTALLED)  ## install, make a demo data set, train a small Mask R-CNN from scratch: minutes on a CPU
	$(RUN) -m scratch_det data digits
	$(RUN) -m scratch_det train --config-file configs/Digits/quickstart.yaml --resume

test: $(INSTALLED)-dev  ## the tests but for those that take minutes
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-slow: $(INSTALLED)-dev  ## the tests that take minutes
	$(RUN) -m pytest -m slow

gpu-check: $(INSTALLED)-dev  ## ten minutes on a GPU: is training right there, and how fast; docs/gpu.md has the results
	timeout -k 10 660 $(RUN) -m pytest -q -m gpu tests/gpu --tb=short --show-capture=no --gpu-results results/gpu

lint: $(INSTALLED)-dev  ## format, style and types; the Dockerfile
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/hadolint Dockerfile

docs: $(INSTALLED)-dev  ## bring the tables in docs/*.md, the figures and pages in docs/*/ up to date with results/
	$(RUN) tools/render_docs.py --project projects/self_supervised --project projects/timm_backbones

# An environment that is already there is reused; pip leaves alone in it what is recent enough.
$(VENV)/bin/python:
	@test ! -e $(VENV) || { echo "error: VENV $(VENV) is there, but it is no virtual environment"; exit 1; }
	@echo "Making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make virtual environments; \
	install its venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; }

$(INSTALLED): pyproject.toml | $(VENV)/bin/python
	@echo "Installing scratch_det and what it needs: 5 to 6 GB with PyTorch, less with TORCH=cpu; a few minutes"
	$(RUN) -m pip install --disable-pip-version-check --editable ".[demo]"
	@touch $@

$(INSTALLED)-dev: pyproject.toml | $(VENV)/bin/python
	@echo "Installing scratch_det, what it needs and its test tools: 5 to 6 GB, less with TORCH=cpu; a few minutes"
	$(RUN) -m pip install --disable-pip-version-check --editable ".[dev]"
	@touch $@ $(INSTALLED)
