# make demo   tune the shipped backbone on two ranks, before and after (minutes, two CPU cores or GPUs)
# make test   all tests, in two processes (WORKERS=…)
# make test-oldest  the core of the tests with the oldest versions that pyproject.toml allows, in .venv-oldest (minutes)
# make docs   the documentation as a site: docs/_build/html/index.html (and the tables of docs/configuration.md)
# make docs-test  that site in a browser, and every command and piece of code in README.md and docs/ (minutes)
# make check  style, types, formatting
# make fuzz   run files, data files and adapters of anything, for minutes
# make sweep  every text family that transformers can build, at a tiny size, beside plain transformers (minutes)
# make sweep-test  the same into a temporary folder; fails if any value is wrong
# make gpu    on one NVIDIA GPU: the attention kernels' tests and benchmark, that no step waits for it, a 7B backbone in
#             every placement, fp8 and Liger
# Each makes .venv and installs what it needs first. PYTHON=… chooses the interpreter (3.10 or newer).

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test test-oldest check docs docs-test fuzz sweep sweep-test gpu
demo: $(INSTALLED)
	$(BIN)/ptd quickstart --output quickstart --overwrite

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS)

# Warnings are errors at the versions of constraints.txt alone: older releases warn of newer ones beside them.
test-oldest: .venv-oldest/installed
	PYTEST_ADDOPTS="-W default --disable-warnings" .venv-oldest/bin/python -m pytest -n $(WORKERS) @tests/oldest.txt

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed-docs
	$(BIN)/python docs/configuration.py
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --builder html --fresh-env --write-all --fail-on-warning --keep-going --quiet \
		docs docs/_build/html

docs-test: docs
	PTD_DOCS=1 $(BIN)/python -m pytest tests/docs

fuzz: $(INSTALLED)
	PTD_FUZZ=1 $(BIN)/python -m pytest tests/test_fuzz.py

sweep: $(INSTALLED)
	$(BIN)/python benchmarks/families.py --again --output benchmarks/results/families.json

sweep-test: $(INSTALLED)
	PTD_SWEEP=1 $(BIN)/python -m pytest tests/inject/test_families_sweep.py -k every_family

gpu: $(INSTALLED)
	CUBLAS_WORKSPACE_CONFIG=:4096:8 PTD_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/ptd_kernels
	$(BIN)/python -m pytest tests/engine/test_no_waiting.py
	$(BIN)/python benchmarks/bench_prefix_attention.py --output benchmarks/results/prefix_attention
	$(BIN)/python benchmarks/placements.py --output benchmarks/results/placements.json
	$(BIN)/python benchmarks/plan_vs_measured.py --output benchmarks/results/plan_vs_measured_gpu.json
	$(BIN)/python benchmarks/fp8.py --output benchmarks/results/fp8_gpu.json
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gpu]'
	$(BIN)/python -m pytest tests/backbone/test_liger.py
	$(BIN)/python benchmarks/levers.py --dtype bfloat16 --rows 32 --output benchmarks/results/levers_gpu.json

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# --no-compile: of what is installed a small part is run.
.venv-oldest/installed: pyproject.toml constraints.txt tests/oldest.py
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python tests/oldest.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --no-compile --constraint .venv-oldest/constraints.txt --editable '.[test]'
	touch $@

.venv/installed-docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@
