# vlaopt: `make demo` and `make test` do all set-up themselves, in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PEERS  := $(VENV)/.peers
RECIPE ?= recipes/edge-vla/cpu.yaml
OUTPUT ?= artifacts
EPISODES ?= 25
POLICIES ?= edge-vla,act,smolvla
# LeRobot asks for an older torch and for torchvision's CUDA build; beside a CPU-only torch it works without asking.
LEROBOT := accelerate av datasets deepdiff diffusers draccus einops huggingface_hub imageio jsonlines num2words \
           opencv-python-headless pyserial termcolor transformers
# Triton's client asks for an older protobuf and ml_dtypes; its schema, which is all that is used, works without asking.
TRITON := grpcio python-rapidjson
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-full check check-310 fix eval train-reference bench peers clean

help: ## Show this help
	@grep -hE '^[a-z-]+(-<recipe>)?:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'
	@echo "  make build-<recipe>     Build one recipe, such as build-edge-vla/cpu"

# torch comes first: asked for by another package, it would bring the newest build with several GB of CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[build,cpu,rtx,data,plot,sim,dev]' $(LEROBOT) $(TRITON)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps lerobot torchvision tritonclient
	touch $@

setup: $(STAMP) ## Make .venv with everything

demo: $(STAMP) ## Build the shipped policy for this CPU: checkpoint to checked, measured artifact
	$(BIN)/vlaopt build recipes/edge-vla/cpu.yaml --output $(OUTPUT)

build-%: $(STAMP)
	$(BIN)/vlaopt build recipes/$*.yaml --output $(OUTPUT)

test: $(STAMP) ## Run the tests (not the slow ones)
	$(BIN)/python -m pytest -m "not slow and not full" -n 2 --dist loadfile

test-slow: $(STAMP) ## Run the tests that take minutes
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

test-full: $(STAMP) ## Run the tests on policies in full size, every shipped recipe and every lane: long, 8 GB
	$(BIN)/python -m pytest -m full

check: $(STAMP) check-310 ## Format, lint, types, floors, meta tests: under a minute
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/meta -n 2

# ruff and mypy know 3.10's syntax and vlaopt's types; vermin knows every module, name and argument of the standard library.
check-310: $(STAMP) ## All code runs on Python 3.10, JetPack 6's; compiled by it where it is installed
	$(BIN)/vermin --quiet --no-tips --violations --target=3.10- vlaopt
	@if python3.10 -c '' 2>/dev/null; then python3.10 -m compileall -q vlaopt; else echo "no python3.10 here: not compiled by it"; fi

fix: $(STAMP) ## Format and mend what can be mended by itself
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

eval: $(STAMP) ## Closed-loop success of the checkpoint and of the built artifact (EPISODES=25 per task)
	$(BIN)/vlaopt eval recipes/edge-vla/checkpoint --episodes $(EPISODES)
	$(BIN)/vlaopt eval "$$($(BIN)/vlaopt build $(RECIPE) --output $(OUTPUT) | tail -n 1)" --episodes $(EPISODES)

bench: $(STAMP) ## Measure the built artifact at the control rate
	$(BIN)/vlaopt bench "$$($(BIN)/vlaopt build $(RECIPE) --output $(OUTPUT) | tail -n 1)"

$(PEERS): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[peers]'
	touch $@

peers: $(PEERS) ## Measure vlaopt beside its peers (POLICIES=edge-vla: 5 minutes)
	$(BIN)/python scripts/peers.py --policies $(POLICIES)

train-reference: $(STAMP) ## Train the shipped policy again, and record its calibration sets
	$(BIN)/python scripts/train_reference.py
	$(BIN)/python scripts/make_calibration.py --checkpoint recipes/edge-vla/checkpoint

clean: ## Remove what was built here (not the store)
	rm -rf artifacts build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
