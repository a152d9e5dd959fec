# `make run` goes from a fresh clone to the demo; `make test` proves that it works. Both make .venv themselves.

PYTHON ?=
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart
WORKERS ?= 2

# Linux wheels of torch on PyPI carry CUDA (gigabytes). Without an NVIDIA GPU, give the address of PyTorch's own index
# of CPU wheels (their installation page names it): make run TORCH_INDEX=...
TORCH_INDEX ?=

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
JAVASCRIPT := $(VENV)/.installed-javascript

.PHONY: help run install quickstart demo test lint types javascript check check-avx2 format wheel clean clean-all
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=...     the Python to build .venv with (3.11 or newer; by default python3.11, python3.12 or python3)"
	@echo "  OUT=...        where quickstart writes (now: $(OUT))"

run: quickstart demo ## Install, train, distil, export, measure, and open the demo on localhost

install: $(INSTALLED) ## Make .venv with everything that running needs, at the tested versions

quickstart: $(INSTALLED) ## Everything of `make run` but the demo
	$(BIN)/switchkd quickstart --out $(OUT)

demo: $(INSTALLED) ## Open the demo on the bundle that quickstart made
	$(BIN)/switchkd demo $(OUT)/bundle

test: lint types check ## Install, then ruff, mypy and pytest

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED_DEV)
	$(BIN)/mypy

# Node runs the bundles as browsers and phones will. Where there is none, those tests say that they were skipped.
javascript: $(JAVASCRIPT) ## Install transformers.js and OpenAI's client for the tests, if there is Node.js

$(JAVASCRIPT): tests/javascript/package-lock.json
	@mkdir -p $(@D)
	@if command -v npm >/dev/null; then \
		echo "installing transformers.js and OpenAI's client for the tests"; \
		cd tests/javascript && npm ci --silent --ignore-scripts; \
	else \
		echo "make: there is no npm, so the tests in tests/javascript are skipped"; \
	fi
	@touch $@

# One thread for each worker: two torch processes with a thread pool each would only push one another off the cores.
check: $(INSTALLED_DEV) $(JAVASCRIPT)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check-avx2: $(INSTALLED_DEV) $(JAVASCRIPT) ## pytest as on an x86 processor without AVX-512 and VNNI (x86 Linux, with a C compiler)
	cc -O2 -shared -fPIC -o $(VENV)/avx2_only.so tests/processors/avx2_only.c -ldl
	LD_PRELOAD=$(CURDIR)/$(VENV)/avx2_only.so OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

format: $(INSTALLED_DEV) ## Let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(INSTALLED_DEV) ## Build the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

$(BIN)/python:
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
		for candidate in python3.11 python3.12 python3; do \
			if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then \
				python=$$candidate; break; \
			fi; \
		done; \
	fi; \
	if [ -z "$$python" ]; then \
		echo "make: switchkd needs Python 3.11 or 3.12, and neither was found; name one: make run PYTHON=/path/to/python3.11" >&2; \
		exit 1; \
	fi; \
	if ! command -v "$$python" >/dev/null; then \
		echo "make: there is no $$python (PYTHON=... names the Python to build $(VENV) with)" >&2; \
		exit 1; \
	fi; \
	if ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "make: $$python is $$("$$python" -V 2>&1), and switchkd needs Python 3.11 or newer" >&2; \
		exit 1; \
	fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "make: $$python cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)" >&2; \
		exit 1; \
	fi; \
	echo "making $(VENV) with $$("$$python" -V)"; \
	"$$python" -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing torch and the other pinned packages into $(VENV) (once; some minutes, by the network)"
	@$(PIP) torch --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) --retries 1)
	@$(PIP) --editable '.[train,export,serve,demo]'
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo "installing the tools of make test"
	@$(PIP) --editable '.[dev]'
	@touch $@

clean: ## Remove builds and caches
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find benchmarks cli demo export serve training recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean ## Remove .venv and runs/ too
	rm -rf .venv runs
