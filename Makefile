# The commands of this repository. Each does its own set-up: `make demo` and `make test` work on a fresh machine.
.DEFAULT_GOAL := help
.PHONY: help demo test test-all soak check format bench gpu-check clean environment
BIN := .venv/bin
# What the packages and their checks are made of; tests are typed less strictly.
PACKAGES := vcache vram_metadata_server integration/vcache_vllm integration/vcache_lmcache
CHECKED := $(PACKAGES) benchmarks examples tests tools setup.py
ARGS ?=
# What runs gpu-check: a Python that has torch with CUDA, Triton and cuda-bindings.
PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
# Traces for the replay benchmark, where there are any; without, a generated one is replayed.
TRACES ?= $(wildcard ../shared/traces/*.jsonl)
# Half of what tests do is wait for other processes. Serving engines do not, and run one after the other.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest
NONE_IS_FINE := || { [ $$? -eq 5 ] && echo "None of these tests is selected."; }

help: ## Show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

environment: ## Create .venv with everything in it (the other targets do so by themselves)
	@tools/prepare-environment

demo: environment ## Run the main job: two vLLM engines share a prefix (ARGS="--no-llm" for plain processes)
	@$(BIN)/vcache demo $(ARGS)

test: environment ## Run the tests, real processes and one vLLM engine included
	$(PYTEST) -n $(WORKERS) -m "not slow" $(ARGS)

test-all: environment ## Run the slow matrix of real engines and faults
	@$(PYTEST) -n $(WORKERS) -m "slow and not vllm" $(ARGS) $(NONE_IS_FINE)
	@$(PYTEST) -m "slow and vllm" $(ARGS) $(NONE_IS_FINE)

soak: environment ## Run the property tests with new examples, many of them
	$(PYTEST) -n $(WORKERS) -m hypothesis --hypothesis-profile=soak --timeout 3600 $(ARGS)

check: environment ## Formatting, lint, types, and that nothing unpickles or evaluates
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/mypy
	$(BIN)/python tools/check_forbidden.py $(PACKAGES) benchmarks examples

format: environment ## Format the code and repair what lint can
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

bench: environment ## Measure; writes bench.json, bench.md and bench-plots/ (ARGS="NAME --quick", TRACES="FILE...")
	@$(BIN)/vcache bench --json bench.json --markdown bench.md --plots bench-plots $(TRACES:%=--trace=%) $(ARGS)

gpu-check: ## Prove the CUDA paths on this machine, without installing anything (ARGS="STEP...", PYTHON=...); writes gpu-check.json and gpu-check.md
	@$(PYTHON) tools/gpu_check.py --json gpu-check.json --markdown gpu-check.md $(ARGS)

clean: ## Remove what was built, .venv included
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis bench.json bench.md bench-plots gpu-check.json gpu-check.md
	find vcache -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
