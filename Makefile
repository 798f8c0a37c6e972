# make demo [MODEL=path-or-hub-id] [PORT=8000]   one answer through a whole cluster on this machine, then serve
# make test                                      format, lint, types, import contracts, tests
# make bench [BENCH=name]                        the figures of the README, but for `routing`, which wants a trace
# make clean
#
# The virtual environment is made once, and again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
TORCH := $(shell grep '^torch==' constraints.txt)
BENCH ?= $(filter-out routing burst_trace tenant_trace,$(basename $(notdir $(wildcard benchmarks/[a-z]*.py))))

.PHONY: demo test bench protos clean

demo: .venv/.ready
	@$(BIN)/baton demo --port $(PORT) $(if $(MODEL),--model "$(MODEL)")

test: .venv/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

bench: .venv/.ready-dev
	@for name in $(BENCH); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name || exit 1; done

protos: .venv/.ready-dev
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. protos/*.proto

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: an index of CPU builds, where pip knows one, is then needed for nothing else.
.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "Python 3.11 or 3.12 is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || { echo "Python's venv is needed: apt-get install python3-venv"; exit 1; }
	@echo "Setting up .venv (once, a few minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -c constraints.txt -e .
	@touch $@

.venv/.ready-dev: .venv/.ready
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@
