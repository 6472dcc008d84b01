PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint format lock bench-storage bench-gpu clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

# The stamp carries the lock's hash: an unchanged lock installs nothing, an interrupted install starts again.
STAMP := $(VENV)/installed-$(shell sha256sum requirements-dev.lock | cut -c1-16)

.venv: $(STAMP)  ## install the locked packages into .venv

$(STAMP):
	$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/installed-*
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-dev.lock
	@touch $@

