# One entry for people, CI and pre-commit; `make` alone lists the targets.
#
# Everything is installed by pip into .venv, from the pins of pyproject.toml and constraints.txt. On Linux PyPI's
# torch is the CUDA build (gigabytes). On a machine without a GPU put an index of CPU builds beside PyPI and pip takes
# the CPU build of the same version, before `make run` and `make test` alike:
#     export PIP_EXTRA_INDEX_URL=<an index with torch's +cpu wheels>

VENV := .venv
BIN := $(VENV)/bin
PROTOS := $(sort $(wildcard wire/proto/*.proto))
# Unit tests run before them, two at a time; these start processes of their own and watch the clock.
TESTS := $(filter-out tests/unit tests/data tests/__pycache__,$(patsubst %/,%,$(sort $(wildcard tests/*/))))
BENCHMARKS := $(sort $(wildcard benchmarks/[a-z]*.py))
# What the native kernels are compiled from, while Moray is installed.
KERNELS := hatch_build.py model/kernels/native/build.py $(wildcard model/kernels/native/src/*)
# Where `make proto` writes; a test gives it another folder and compares.
PROTO_OUT = .

# What `make run` asks, and of which model; set on the command line only, never taken from the environment.
PROMPT = Hello, Moray
MODEL =
CONFIG =
ONCE ?=
run: export PROMPT_OF_RUN = $(PROMPT)
run: export MODEL_OF_RUN = $(MODEL)
run: export CONFIG_OF_RUN = $(CONFIG)

# Tests run many small processes beside each other: more threads in each only take turns on the same cores.
test soak check unit bench: export OMP_NUM_THREADS = 1
test soak check unit bench: export MKL_NUM_THREADS = 1
test soak check unit bench: export OPENBLAS_NUM_THREADS = 1
test soak check unit bench: export TOKENIZERS_PARALLELISM = false
test soak bench run: export PATH := $(CURDIR)/$(BIN):$(PATH)

PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet
# torch comes first and alone, so that one slow download is one visible step; its version stands in constraints.txt.
TORCH = $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test soak check static format-check lint types imports unit format proto bench constraints system

help: ## List the targets.
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

run: $(VENV)/.installed-run ## Start a cluster here and ask it PROMPT; ONCE=1 stops after the answer; MODEL=DIR serves another checkpoint, CONFIG=FILE sets the rest.
	@exec $(BIN)/moray up $(if $(filter-out 0,$(ONCE)),--once) $(if $(CONFIG),--config "$$CONFIG_OF_RUN") $(if $(MODEL),--model "$$MODEL_OF_RUN") --prompt "$$PROMPT_OF_RUN"

test: system $(VENV)/.installed-dev static ## Everything except the slow tests: format, lint, types, import rules, then all tests.
	$(BIN)/pytest -m "not slow" -n 2 tests/unit
	$(BIN)/pytest -m "not slow" --durations=25 $(TESTS)

soak: system $(VENV)/.installed-dev ## The slow tests: the full form of the long ones.
	@$(BIN)/pytest -m slow tests; status=$$?; \
	if [ $$status -eq 5 ]; then echo "no test is marked slow yet: nothing ran"; exit 0; fi; exit $$status

check: static unit ## Format, lint, types, import rules, unit tests: what CI and pre-commit run first.

static: format-check lint types imports

format-check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

unit: $(VENV)/.installed-dev
	$(BIN)/pytest -q tests/unit

format: $(VENV)/.installed-dev ## Format, and mend what the linter can mend by itself.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(VENV)/.installed-dev ## Generate wire/proto/*_pb2* from the .proto files; a test proves that they are current.
	@mkdir -p $(PROTO_OUT)
	$(BIN)/python -m grpc_tools.protoc -I. \
	    --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	    --python_out=$(PROTO_OUT) --grpc_python_out=$(PROTO_OUT) \
	    --mypy_out=quiet:$(PROTO_OUT) --mypy_grpc_out=quiet:$(PROTO_OUT) $(PROTOS)

bench: $(VENV)/.installed-dev ## Every script of benchmarks/ in its short form.
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

constraints: $(VENV)/.installed-dev ## Rewrite constraints.txt from what .venv holds now.
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable \
	    | sed -E -e '/^#|^-| @ /d' -e 's/^(torch==[^+]+)\+.*/\1/' | LC_ALL=C sort -f; } > constraints.new
	@mv constraints.new constraints.txt

# Debian packages: what the integration tests start (a real Prometheus, and `ip` for networks of their own), and
# the compiler of the native kernels.
# Without root or apt-get nothing is installed and the tests that need one of them say so.
system:
	@missing=""; \
	command -v prometheus >/dev/null || missing="$$missing prometheus"; \
	command -v ip >/dev/null || [ -x /sbin/ip ] || missing="$$missing iproute2"; \
	command -v g++ >/dev/null || missing="$$missing g++"; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "not installed (needs root and apt-get):$$missing; tests that need them will say so"; exit 0; fi; \
	echo "installing with apt-get:$$missing"; \
	export DEBIAN_FRONTEND=noninteractive; \
	{ apt-get -qq update && apt-get -qq install -y --no-install-recommends $$missing; } >/dev/null \
	    || echo "apt-get could not install:$$missing; tests that need them will say so"

# A stamp per kind of installation: newer than the pins = nothing to do.
$(VENV)/.installed-run: pyproject.toml constraints.txt $(KERNELS) | $(BIN)/python
	@echo "installing Moray into $(VENV) (minutes the first time)"
	$(PIP) install -c constraints.txt $(TORCH)
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(KERNELS) | $(BIN)/python
	@echo "installing Moray and its development tools into $(VENV) (minutes the first time)"
	$(PIP) install -c constraints.txt $(TORCH)
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.installed-run $@

# The first of these that runs and is new enough; PYTHON=... names another.
$(BIN)/python:
	@for candidate in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	    if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; then \
	        $$candidate -m venv $(VENV) && exit 0; \
	        rm -rf $(VENV); \
	        echo "$$candidate could not make $(VENV); on Debian and Ubuntu install python3-venv" >&2; exit 1; \
	    fi; \
	done; \
	echo "Moray needs Python 3.11, 3.12 or 3.13; none found. Install one or run: make PYTHON=/path/to/python3.11 ..." >&2; \
	exit 1
