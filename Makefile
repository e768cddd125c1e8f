# `make demo` and `make test` do all the set-up: both create the virtual environment if it is missing. An interrupted demo
# resumes; `.venv/bin/python -m examples.gpt --out runs/demo --fresh` starts it over.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test processes side by side, and further options of pytest. With `worksteal` each process gets a range of files, so
# that what a file prepares once (a compiled step, a killed process) is prepared in one of them.
WORKERS ?= 2
PYTEST_OPTIONS ?=
# What `make test-lowest` runs: steps, transforms, and whatever uses another library. A new release of one may warn of an
# old release of another.
CORE := tests/test_public.py tests/test_step.py tests/test_cli.py tests/transforms tests/runner/test_loggers.py \
  tests/runner/test_restore.py

.PHONY: demo docs test test-long test-lowest coverage lint format regold docs-outputs benchmarks dist clean

# What XLA has compiled is kept in runs/compiled, so that the second start takes seconds to its first step.
demo: $(VENV)/demo.stamp
	JAX_COMPILATION_CACHE_DIR=runs/compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	  $(BIN)/python -m examples.gpt --out runs/demo

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not long" $(PYTEST_OPTIONS)

# Thousands of random pipelines with XLA's own flags: more than an hour on two cores. Run it by hand, and say so where
# you report it.
test-long: $(VENV)/dev.stamp
	STEPC_XLA_DEFAULTS=1 $(BIN)/python -m pytest -n $(WORKERS) -m long --hypothesis-profile=nightly $(PYTEST_OPTIONS)

# The core of the suite with the lowest versions that pyproject.toml allows, in an environment of its own.
test-lowest: $(BIN)/python
	$(BIN)/python -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest --resolution lowest-direct -e ".[test]"
	.venv-lowest/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not long" -W ignore::DeprecationWarning \
	  $(PYTEST_OPTIONS) $(CORE)

coverage: PYTEST_OPTIONS += --cov --cov-report=term
coverage: test

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Rewrite the golden files, then review the diff.
regold: $(VENV)/dev.stamp
	$(BIN)/python -m pytest --regold -q -m "not long" tests/test_errors.py tests/test_plan.py

# The site, in docs/_build/html/index.html. Tests build it too, and look for dead links.
docs: $(VENV)/dev.stamp
	$(BIN)/python -m sphinx -W --keep-going -q -c docs -d docs/_build/doctrees . docs/_build/html

# Rewrite the printed outputs in README.md, docs/ and notebooks/, then review the diff.
docs-outputs: $(VENV)/dev.stamp
	$(BIN)/python -m pytest --regold -q tests/test_docs.py -k "page or notebook"

# Every benchmark that a CPU can run, then the page of their results, benchmarks/README.md. Most of an hour, on a machine
# that does nothing else; `make benchmarks BENCHMARK_OPTIONS=--quick` sees in minutes that they run, and writes nothing.
BENCHMARKS := by_hand deferred_reduce dispatch lowering independent_of_k import_time cost_of_transforms precision \
  runner_overhead memory_search checkpoints nanogpt memory input \
  first_step size
BENCHMARK_OPTIONS ?= --save

benchmarks: $(VENV)/dev.stamp
	for script in $(BENCHMARKS); do $(BIN)/python benchmarks/$$script.py $(BENCHMARK_OPTIONS) || exit 1; done
	$(BIN)/python benchmarks/page.py

# The sdist and the wheel, checked: their metadata, and that the wheel holds the library alone and whole.
dist: $(VENV)/dev.stamp
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

clean:
	rm -rf $(VENV) .venv-lowest runs dist docs/_build docs/reference

# A virtual environment of our own: the system's Python may be managed by the system.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "stepc needs Python 3.11 or newer, and there is no '$(PYTHON)'. Install it, or: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "stepc needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' cannot create virtual environments. On Debian: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[demo]"
	touch $@

$(VENV)/dev.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
