# Phalanx. `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.phalanx-setup

BENCHMARKS := accept_rate queue_page metric_ingest gang_start turnover short_jobs lm_steps checkpoint_stall report_cost

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-full worlds check format lock bench shapes clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

setup: $(STAMP)  ## virtual environment in .venv with the pinned dependencies

# torch first and by exact version: a range would take the largest build there is.
$(STAMP): pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch, Ray and the rest into $(VENV) (some minutes, 2 GB)"
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -qq --disable-pip-version-check torch==2.13.0
	@$(BIN)/pip install -qq --disable-pip-version-check -r requirements.lock
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: setup  ## a real distributed training, from HTTP to a trained model
	@exec $(BIN)/phalanx up --data .phalanx/demo --port 0 --nodes 2 --gpus-per-node 2 -- $(BIN)/python examples/demo.py

test: setup  ## all tests but the slow ones
	@$(BIN)/pytest -m "not slow and not full"

test-slow: setup  ## the slow tests
	@$(BIN)/pytest -m "slow and not full"

test-full: setup  ## the fullest matrices of training: layouts, number formats, kills during a save (quarter of an hour)
	@$(BIN)/pytest -m full

worlds: setup  ## many seeded worlds: WORLDS=5000 FIRST_SEED=1
	@$(BIN)/pytest tests/worlds -m slow -x

check: setup  ## ruff, pyright, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports

format: setup  ## format the code
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

lock: setup  ## pin what is installed now in requirements.lock
	@$(BIN)/python deploy/lock.py > requirements.lock.new && mv requirements.lock.new requirements.lock

bench: setup  ## measure against the budgets, beside named peers (40 minutes; BENCH_FLAGS=--quick: 20 minutes)
	@for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py $(BENCH_FLAGS) || exit 1; done
	@$(BIN)/python benchmarks/pass_speed.py $(BENCH_FLAGS)
	@$(BIN)/python benchmarks/first_step.py
	@$(BIN)/python benchmarks/steps_per_second.py

shapes: setup  ## replay Kueue's and KAI's scale shapes (half an hour; BENCH_FLAGS=--quick: 3 minutes)
	@$(BIN)/python benchmarks/admission.py $(BENCH_FLAGS)

clean:  ## remove the virtual environment and the data of the demo
	@rm -rf $(VENV) .phalanx
