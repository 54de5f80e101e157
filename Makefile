# `make` alone lists the targets. Everything a target needs is installed by the target itself:
# the developer environment into .venv, big things (Kubernetes binaries, vLLM) into the cache by version.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv check format generate test test-full demo demo-down bench bench-cluster bench-operator \
	bench-gateway bench-migration bench-placement bench-routing cluster-up cluster-down lock clean

BIN := .venv/bin
# The tests start hundreds of Python processes, and each would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE
# More workers than a small machine has cores: a test that talks to a cluster, or to an engine that starts, waits most of
# the time. The order is ours (marker `long`), not by how many tests a group has.
PARALLEL := -n 3 --dist loadgroup --no-loadscope-reorder
PYTHON_SOURCES := api migration placement gateway operator simulator cli crds e2e conftest.py

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

venv: ## install the developer environment into .venv
	@sh scripts/venv.sh

check: venv ## ruff, mypy --strict, import rules, generated files up to date
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python crds/generate.py --check

format: venv ## format the code and apply safe lint fixes
	$(BIN)/ruff check --fix $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)

generate: venv ## write CRDs and API reference from api/
	$(BIN)/python crds/generate.py

test: venv ## every test but the slow suites: real control plane, real node, real vLLM
	$(BIN)/python -m e2e.cluster build
	$(BIN)/pytest $(PARALLEL) -m "not full"

test-full: test ## `make test`, the slow suites, and property tests on fresh examples
	$(BIN)/pytest -m full
	$(BIN)/pytest $(PARALLEL) -m "hypothesis and not node and not full" --hypothesis-profile=explore

demo: venv ## one LLMService from kubectl apply to a streamed answer, then a lowered limit; leaves the demo up
	@$(BIN)/python -m e2e.demo up

demo-down: venv ## end the demo: no process, mount, link or file stays
	@$(BIN)/python -m e2e.demo down

bench: bench-cluster bench-operator bench-gateway bench-migration bench-placement bench-routing ## every benchmark; FULL=1 for all of it

bench-cluster: venv ## how fast a cluster starts
	$(BIN)/python -m e2e.bench.cluster

bench-operator: venv ## how fast the operator plans and applies, and what it costs
	$(BIN)/python -m e2e.bench.operator

bench-gateway: venv ## what the gateway adds to a request
	$(BIN)/python -m e2e.bench.gateway
	$(BIN)/python -m e2e.bench.gateway_moves

bench-migration: venv ## what a client sees of a request that moves between two real vLLMs, and what others pay
	$(BIN)/python -m e2e.bench.migration

bench-routing: venv ## where requests go: TTFT beside other routers, the plan's split, what moving requests is worth
	$(BIN)/python -m e2e.bench.routing

bench-placement: venv ## how good plans are, how fast, and whether they keep what they promise
	$(BIN)/python -m e2e.bench.placement

cluster-up: venv ## start a local cluster of your own; export KUBECONFIG as it says
	$(BIN)/python -m e2e.cluster up --profile node

cluster-down: venv ## end it
	$(BIN)/python -m e2e.cluster down

lock: venv ## pin all dependencies anew
	sh scripts/lock.sh

clean: ## remove what is built inside the checkout
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
