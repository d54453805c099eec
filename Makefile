# Needs Python 3.11 or newer with venv, make and git; everything else is installed into $(VENV).
#   make demo                            from a bare clone to a federated run on this machine
#   make test                            what continuous integration runs
#   make setup TORCH_ARGS='--index-url https://download.pytorch.org/whl/cpu'    another build of torch

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CODE := giva_core server client
# Flower asks the network for updates and installs an app's dependencies before each run unless told not to.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1

.DEFAULT_GOAL := help
.PHONY: help setup setup-demo demo demo-baselines demo-full test test-slow test-deploy lint types imports proto format benchmark clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# -- set-up: done once, and again when a dependency changes ---------------------------------------------------------

# torch first and by itself: its build (CPU, CUDA, ROCm) may come from another index than everything else.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(TORCH_ARGS) -c constraints.txt $(TORCH)
	$(PIP) install -q -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.installed-dev: EXTRAS := dev
$(VENV)/.installed-deploy: EXTRAS := dev,deploy
$(VENV)/.installed-demo: EXTRAS := site,plot,baselines

setup: $(VENV)/.installed-dev ## install the project and its tools into .venv (VENV=...)

# The environment for development serves the demo as well.
setup-demo: $(if $(wildcard $(VENV)/.installed-dev),$(VENV)/.installed-dev,$(VENV)/.installed-demo) ## install what the demo needs

# -- use --------------------------------------------------------------------------------------------------------------

demo: setup-demo ## a federation of hospitals on this machine, with a real model and real data
	$(BIN)/giva data prepare medical
	$(BIN)/giva simulate recipes/medical.toml --plot medical.png

demo-baselines: setup-demo ## the same beside central GiVA, FedAvg-LoRA, the frozen encoder and TF-IDF + SVM
	$(BIN)/python benchmarks/accuracy.py --examples 1500

demo-full: setup-demo ## all training questions, all baselines; goes on where it was
	$(BIN)/python benchmarks/accuracy.py --examples 0

benchmark: ## list the benchmarks; each is one command
	@for file in benchmarks/[a-z]*.py; do \
		test -e "$$file" || { echo "there are no benchmarks yet"; break; }; \
		printf '%s\n    %s\n' "$(BIN)/python $$file" "$$(sed -n '1s/^r*"""//p' "$$file" | sed 's/"""$$//')"; \
	done

# -- checks -----------------------------------------------------------------------------------------------------------

# pytest comes last: its closing line is the result of the whole.
test: setup lint types imports ## all checks but the long ones; giva_core has to be covered to 90 %
	$(BIN)/python -m pytest -q -m 'not slow and not deploy' --ignore tests/deploy/test_helm.py --cov --cov-fail-under=90

test-slow: setup ## the long runs
	$(BIN)/python -m pytest -q -m slow

test-deploy: $(VENV)/.installed-deploy ## real SuperLinks, sites and containers: needs openssl, ssh-keygen, root and a Docker engine
	$(BIN)/python -m pytest -q -m deploy

lint: setup ## style and likely mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## type annotations
	$(BIN)/mypy

imports: setup ## who may import whom
	$(BIN)/lint-imports --no-logo

proto: setup ## write client/wire/worker_pb2.py anew, from worker.proto
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. client/wire/worker.proto

format: setup ## format, sort imports, repair what can be repaired
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches, reports and build results, not .venv
	rm -rf build dist *.egg-info *.fab .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage htmlcov
	find $(CODE) tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
