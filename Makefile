# Every target sets up what it needs in .venv, once; the second time it starts at once.
# Needs Python 3.11 or newer and nothing else. Windows: the plain commands stand in README.md.

.DEFAULT_GOAL := help
.PHONY: help demo test lab check bench gpu-check doctor clean-notebooks readme site student

VENV := .venv/bin
RUN := $(VENV)/python

# The first of these that is new enough and can make a virtual environment; PYTHON=... overrides.
CANDIDATES := $(RUN) python3 python3.13 python3.12 python3.11 python
PROBE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
ifndef PYTHON
PYTHON := $(shell for p in $(CANDIDATES); do "$$p" -c '$(PROBE)' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
endif
comma := ,

define setup
@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with the venv module found (tried: $(CANDIDATES))." \
	"Install one, or name it: make $@ PYTHON=/path/to/python3" >&2; exit 1; }
@"$(PYTHON)" scripts/setup_env.py --extras $(1)
endef

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

demo:  ## train DLRM on MovieLens-100K in notebook 00, then sharded on two ranks; metrics and an HTML report
	$(call setup,notebooks)
	@$(RUN) -m recsys_edu.notebook.cli demo

test:  ## the whole test suite, notebooks, site and browser included (ARGS="-k jagged" narrows it)
	$(call setup,notebooks$(comma)dev$(comma)site$(comma)browser)
	@$(RUN) -m pytest $(ARGS)

lab:  ## JupyterLab on the notebooks
	$(call setup,notebooks)
	@$(RUN) -m jupyter lab --notebook-dir=notebooks --LabApp.default_url=/lab/tree/00_start_here.ipynb $(ARGS)

check:  ## linter, formatting, committed notebooks clean, README's generated parts in step
	$(call setup,notebooks$(comma)dev)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) scripts/setup_cells.py --check
	@$(RUN) scripts/clean_notebooks.py --check
	@$(RUN) scripts/readme.py --check

bench:  ## measure against raw FBGEMM, plain PyTorch and, where installed, TorchRec
	$(call setup,notebooks$(comma)dev)
	@$(RUN) -m recsys_edu.notebook.cli bench $(ARGS)

gpu-check:  ## on a machine with an NVIDIA GPU: check kernels, sharding, pipeline, quantised inference; measure them
	$(call setup,notebooks$(comma)dev)
	@$(RUN) scripts/gpu_check.py $(ARGS)

doctor:  ## what is installed, which kernels run, and what to do about each mismatch
	$(call setup,notebooks)
	@$(RUN) -m recsys_edu.notebook.cli doctor

clean-notebooks:  ## before a commit: no outputs, no stray metadata, set-up cells as scripts/setup_cells.py writes them
	$(call setup,notebooks)
	@$(RUN) scripts/setup_cells.py
	@$(RUN) scripts/clean_notebooks.py

readme:  ## rewrite the README's generated parts: reading order and measured results
	$(call setup,notebooks)
	@$(RUN) scripts/readme.py

site:  ## the executed course as a site in build/site/html; takes executed notebooks from notebooks/out where they are current
	$(call setup,notebooks$(comma)site)
	@$(RUN) scripts/site.py $(ARGS)

student:  ## a zip of the course for students: no solutions, no hints (ARGS=--hints leaves them in)
	$(call setup,notebooks)
	@$(RUN) -m recsys_edu.notebook.cli student $(ARGS)
