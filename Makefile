# One command each: `make` lists them.

.DEFAULT_GOAL := help
SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/installed
# The lock is made for Python 3.11; newer ones that its versions support work too.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; \
	done)
CORES ?= all
CONFORMANCE ?= tests/conformance/vectors

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): requirements.lock pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python" >&2; \
		exit 1; fi
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: install
install: $(STAMP) ## create .venv from the lock

.PHONY: reproduce
reproduce: $(STAMP) ## run the laptop experiment to its report
	$(BIN)/snakemake --cores $(CORES)

.PHONY: test
test: lint $(STAMP) ## run every check and test
	$(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: test-slurm
test-slurm: $(STAMP) ## run the workflow through a SLURM that this starts and stops
	tests/slurm/install.sh
	$(BIN)/python -m pytest -n 0 -m slurm tests/slurm

.PHONY: test-rivals
test-rivals: $(STAMP) ## train every rival, and run the workflow with one of each stage
	$(BIN)/python -m pytest -n 0 -m rivals tests/workflow/test_rivals.py

.PHONY: test-page
test-page: $(STAMP) ## open the page in headless Chromium and click through it; PAGE=file.html opens another
	tests/inside/install.sh
	$(BIN)/python -m pip show --quiet selenium || $(BIN)/python -m pip install "selenium>=4.20"
	LATENT_REASONING_PAGE=$(PAGE) LATENT_REASONING_SCREENSHOTS=results/screenshots \
		$(BIN)/python -m pytest -n 0 -m browser tests/inside/test_browser.py

.PHONY: lint
lint: $(STAMP) ## check style and workflow, and that generated files are current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/mypy
	$(BIN)/snakemake --lint
	$(BIN)/python -m tools.config_docs --check

.PHONY: format
format: $(STAMP) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow

.PHONY: docs
docs: $(STAMP) ## write the schema and config/README.md's tables from the typed configuration
	$(BIN)/python -m tools.config_docs

.PHONY: conformance
conformance: $(STAMP) ## replay recorded vectors of the paper's public code: CONFORMANCE=folder
	$(BIN)/python -m tests.conformance $(CONFORMANCE)

.PHONY: golden
golden: $(STAMP) ## record the golden numbers anew, where a RECIPE was raised: tests/golden/
	$(BIN)/python -m tests.golden

.PHONY: benchmark
benchmark: $(STAMP) ## time the package against the naive paths, one thread: results/benchmarks/
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.scaling

.PHONY: faults
faults: $(STAMP) ## the whole fault campaign, by hand: results/published/faults/
	$(BIN)/python -m tests.faults --output results/published/faults

.PHONY: faults-quick
faults-quick: $(STAMP) ## the fault campaign in short, as continuous integration runs it
	$(BIN)/python -m tests.faults --quick

.PHONY: ui
ui: $(STAMP) ## show the tracked runs on http://127.0.0.1:5000; prints the page of each experiment
	@$(BIN)/python -m latent_reasoning.runtime.tracking
	$(BIN)/mlflow ui --host 127.0.0.1 --port 5000 \
		--backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///results/mlflow.db}"

.PHONY: lock
lock: $(STAMP) ## write the environment's exact versions to requirements.lock and environment.yml
	$(BIN)/python -m pip freeze --all --exclude-editable --exclude pip --exclude wheel \
		| sed 's/+c[pu].*$$//' | LC_ALL=C sort -f > pins
	{ sed '/^[^#]/d' requirements.lock; cat pins; } > requirements.lock.new
	{ sed '/^      - /d' environment.yml; sed 's/^/      - /' pins; } > environment.yml.new
	rm pins; mv requirements.lock.new requirements.lock; mv environment.yml.new environment.yml

.PHONY: clean
clean: ## remove the environment and caches; results stay
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
