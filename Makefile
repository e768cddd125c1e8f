# Two commands do all the set-up: `make demo` and `make test`. Both make the virtual environment if it is missing. A demo
# that was interrupted goes on; `stepc train --out runs/demo --fresh` forgets it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# How many tests run side by side.
WORKERS ?= 2

.PHONY: demo test test-long lint format regold benchmarks clean

demo: $(VENV)/demo.stamp
	$(BIN)/stepc train --out runs/demo

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(WORKERS) -m "not long"

# Random pipelines by the thousand: about an hour on two cores. Run it by hand, and say so where you report it.
test-long: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(WORKERS) -m long

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Write the golden files again, then review the diff.
regold: $(VENV)/dev.stamp
	$(BIN)/python -m pytest --regold -q -m "not long" tests/test_errors.py tests/test_plan.py

benchmarks: $(VENV)/dev.stamp
	for script in by_hand deferred_reduce dispatch independent_of_k import_time cost_of_words precision runner_overhead \
	  memory_search; do \
	  $(BIN)/python benchmarks/$$script.py || exit 1; \
	done

clean:
	rm -rf $(VENV) runs

# A virtual environment of its own: the system's Python may be managed by the system.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "stepc needs Python 3.11 or newer, and there is no '$(PYTHON)'. Install it, or: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "stepc needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' cannot make virtual environments. On Debian: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[demo]"
	touch $@

$(VENV)/dev.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
