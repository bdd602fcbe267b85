# make demo   the table for 63,000 messages on the bundled model, then one run on the bundled messages
# make test   every test            make check   style, format and types
# make fuzz   100,000 inputs for every parser and the batch planner, others each time; FUZZ_EXAMPLES=N for another number
# make venv   only set up           make clean   remove what the above made, but not runs/
# Another Python: make PYTHON=/path/to/python3.12 demo

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help venv demo test check fuzz clean

help:
	@sed -n 's/^# //p' Makefile

venv: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "Error: '$(PYTHON)' was not found. Install Python 3.11, 3.12 or 3.13, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "Error: '$(PYTHON)' is $$($(PYTHON) -V 2>&1); 3.11, 3.12 or 3.13 is needed. Name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "Error: '$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: venv
	$(BIN)/plan --dataset 63000 --budget 30
	$(BIN)/plan --run recommended --budget 20

test: venv
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 10

FUZZ_EXAMPLES ?= 100000

fuzz: venv
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -q tests/fuzz

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find planner trainer presets tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
