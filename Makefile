# The two commands that matter: `make demo` and `make test`. Both need only Python 3.11 or later and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header \
	--override requirements.overrides --generate-hashes --no-emit-index-url pyproject.toml

# The stamp carries the lock's hash: an unchanged lock installs nothing, an interrupted install starts again.
STAMP := $(VENV)/installed-$(shell sha256sum requirements-dev.lock | cut -c1-16)

.DEFAULT_GOAL := help
.PHONY: help demo test quick full coverage faults soak fuzz image-test lint format lock readme chart-schema chart-test bench-data bench-storage bench-resume-control bench-gpu bench-gpu-run bench-gpu-resume clean $(VENV)

help:  ## list the targets
	@grep -hE '^[a-z$$][^:]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(STAMP)  ## train a small real model on a local S3 server and show what it learned
	@$(BIN)/python -m job demo

# Work is stolen from the worker with more of it left, so that none idles while the other has the longest file.
WORKERS ?= $(shell nproc)
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: $(STAMP)  ## run the whole suite
	$(PYTEST)

quick: $(STAMP)  ## the tests that start no process and import no torch
	$(PYTEST) --quick

full: $(STAMP)  ## everything that needs no GPU and no container engine: the suite with all rows of the fault matrix
	$(PYTEST) -m "not gpu and not image"

coverage: $(STAMP)  ## how much of job/ the suite runs, also in child processes; prints the ten least covered modules
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest -n $(WORKERS) --dist worksteal; status=$$?; \
	$(BIN)/coverage combine --quiet; \
	$(BIN)/coverage report --sort=cover | sed -n -e 1,12p -e '$$p'; \
	exit $$status

faults: $(STAMP)  ## the whole fault matrix, also the rows that take long
	$(PYTEST) -m "not gpu" tests/faults

RUNS ?= 20
soak: $(STAMP)  ## random faults for RUNS runs; prints its seed, SEED=... repeats it
	$(BIN)/python -m tests.faults.soak --runs $(RUNS) $(if $(SEED),--seed $(SEED)) $(if $(OUT),--out $(OUT))

HOURS ?= 2
SECONDS ?= $(shell awk 'BEGIN { print $(HOURS) * 3600 }')
fuzz: $(STAMP)  ## random inputs for all that reads, for HOURS=2 or SECONDS=60; prints its seed, SEED=... repeats it
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

IMAGE_RESULTS ?= $(CURDIR)/benchmarks/results/image-$(shell date +%Y-%m-%d).json
image-test: $(STAMP)  ## build the image and run the demo in it (docker, or as root Debian's buildah, podman, debootstrap)
	IMAGE_RESULTS=$(IMAGE_RESULTS) $(BIN)/python -m pytest -m image tests/deploy/test_image.py

lint: $(STAMP)  ## formatting, lint rules, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

format: $(STAMP)  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(STAMP)  ## resolve both lock files again
	$(COMPILE) --output-file requirements.lock
	$(COMPILE) --extra dev --constraint requirements.lock --output-file requirements-dev.lock

readme: $(STAMP) chart-schema  ## write what is generated of the documents, of helm/ and of k8s/
	$(BIN)/python -m tests.readme
	$(BIN)/python -m tests.tree

chart-schema: $(STAMP)  ## write what is generated of helm/ and k8s/
	$(BIN)/python -m tests.chart

chart-test: $(STAMP)  ## the chart and k8s/ with the real Helm and kustomize
	$(PYTEST) tests/deploy/test_chart*.py tests/deploy/test_k8s.py tests/deploy/test_exit_codes.py

bench-resume-control: $(STAMP)  ## the same kills against stock resume_from_checkpoint=True
	$(BIN)/python benchmarks/resume_control.py

bench-data: $(STAMP)  ## 100,000 conversations to tokens and labels compared with TRL's own way (after make demo)
	$(BIN)/python benchmarks/data.py

bench-storage: $(STAMP)  ## object transfers compared with aws s3 cp and s5cmd
	$(BIN)/python benchmarks/storage.py

bench-gpu-resume: $(STAMP)  ## kill and resume a 1B model on this machine's GPU
	$(BIN)/python benchmarks/gpu_resume.py benchmarks/results

bench-gpu-run: $(STAMP)  ## a 1B model through the job on this machine's GPU
	$(BIN)/python benchmarks/gpu_run.py benchmarks/results

SIZE ?= 1b
PARTS ?= speed
bench-gpu: $(STAMP)  ## the job compared with Unsloth's tutorial and plain TRL on this GPU; SIZE=8b, PARTS=speed,adapter,batch32,tight
	$(BIN)/python benchmarks/gpu.py run benchmarks/results --size $(SIZE) --parts $(PARTS)

clean:  ## remove the environment and all caches
	rm -rf $(VENV) .demo .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis .coverage .coverage.*

$(VENV): $(STAMP)  ## install the locked packages

# --no-deps: the lock is complete, and one of its packages asks for a version that is not always available.
# --no-compile: modules are compiled when they are first imported, most of 6 GB never.
$(STAMP):
	@echo "Installing the locked packages into $(VENV) (about two minutes, 7 GB) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/installed-*
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-compile -r requirements-dev.lock
	@touch $@
