# `make demo` and `make test` need Python 3.11 or 3.12 and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV := .venv
RUN := $(VENV)/bin

.PHONY: demo test lint types schemas clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12) and "Ralf needs Python 3.11 or 3.12, this is " + sys.version.split()[0] + "; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(RUN)/python demo/demo.py

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(RUN)/pytest -n auto --dist loadfile

lint: $(VENV)/ready
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: $(VENV)/ready
	$(RUN)/mypy

schemas: $(VENV)/ready
	$(RUN)/python -m worker.contract docs

clean:
	rm -rf $(VENV) demo/out build *.egg-info
