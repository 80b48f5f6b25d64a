# make run | test | test-all | layouts | bench | check | format; each makes the environment first, which takes under a second once it is there.
# The same without make: tools/setup_env.sh, then the line under the target.

PYTHON := .venv/bin/python

.PHONY: setup run test test-all layouts bench check format

setup:
	@tools/setup_env.sh

run: setup
	bash examples/6_smollm2_recovery.sh

# Two at a time: most tests wait for processes to start, on one core. Each worker's ranks take 6 GB at most.
test: setup
	$(PYTHON) -m pytest -n 2 --dist loadfile

test-all: setup
	$(PYTHON) -m pytest -m ""

layouts: setup
	$(PYTHON) -m tests.distributed.layouts

bench: setup
	$(PYTHON) tools/bench_ops.py --peers "$$(tools/bench_peers.sh)" --out runs/bench

check: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: setup
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
