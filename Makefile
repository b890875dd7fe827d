# make active   the main job on the embedded demo
# make twin     the whole cluster path on this machine: bucket, nodes, job submit (KEEP=1, DISK=1, ELASTIC=1, AUTOSCALE=1)
# make bench    ratios to the hardware and to plain PyTorch (ROWS="'stall' 'commit'" for some)
# make chaos    faults injected into small runs here (FAULTS="F1 F21" for some of them)
# make test     the tests (make check: the ones without Ray; make test-all: the slow ones as well)

VENV := .venv
PYTHON := $(VENV)/bin/python
BASE := $(shell python3.11 -c 'import venv, ensurepip' 2>/dev/null && command -v python3.11 || command -v python3)
READY := $(VENV)/.raysed-ready

.PHONY: active twin bench chaos test test-all check lint clean

active: $(READY)
	$(PYTHON) jobs/active.py

twin: $(READY)
	$(PYTHON) -m pip install --quiet -c constraints.txt -e ".[local]"
	$(PYTHON) jobs/twin.py $(if $(DISK),disk) $(if $(ELASTIC),elastic) $(if $(AUTOSCALE),autoscaled) $(if $(KEEP),--keep)

bench: $(READY)
	$(PYTHON) -m pip install --quiet -c constraints.txt -e ".[local]"
	$(PYTHON) jobs/bench.py $(if $(ROWS),--rows $(ROWS))

chaos: $(READY)
	$(PYTHON) -m pip install --quiet -c constraints.txt -e ".[local]"
	$(PYTHON) jobs/chaos.py $(FAULTS)

test: check
	$(PYTHON) -m pytest -m "ray and not slow"

test-all: check
	$(PYTHON) -m pytest -m "ray or slow"

check: $(READY) lint
	$(PYTHON) -m pip check
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto -m "not (ray or alone or slow)"
	$(PYTHON) -m pytest -m "alone and not slow"

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(READY): pyproject.toml constraints.txt
	@$(BASE) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "raysed needs Python 3.11 or newer, $(BASE) is %d.%d: install python3.11, or give BASE=..." % sys.version_info[:2])'
	$(BASE) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs data
