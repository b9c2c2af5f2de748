# make demo   tune the shipped backbone on two ranks, before and after (minutes, two CPU cores or GPUs)
# make test   all tests, in two processes (WORKERS=…)
# make test-oldest  the core of the tests with the oldest versions that pyproject.toml allows, in .venv-oldest (minutes)
# make docs   the documentation as a site: docs/_build/html/index.html (and the tables of docs/configuration.md)
# make docs-test  that site in a browser, and every command and piece of code in README.md and docs/ (minutes)
# make check  style, types, formatting
# make fuzz   run files, data files and adapters of anything, for minutes
# make families  every text family that transformers can build, at a tiny size, beside plain transformers: docs/families.md
#             (minutes; what has not changed since the last time is not measured again)
# make families-test  a fifth of them, chosen by the commit, and what has changed; fails if a result is not that of the page
# make test-gpu-paper  whole runs, steps and the attention kernels on an emulated GPU; on a real one where there is one
# make gpu-1  on one NVIDIA GPU, some eight minutes each, with nothing installed or fetched: a resume, no step that waits,
#             the attention kernels' tests; gpu-2 the attention benchmark; gpu-3 a 7B backbone in every placement;
#             gpu-4 attention by library, the levers, fp8, Liger, the plan. Typed again, a stage goes on where it stopped
#             (GPU='--replace': anew where the code or the machine is another). make gpu: the four in order, and then
#             gpu-table, by which attention takes the library that was fastest on this GPU for long sequences
# Each of the others makes .venv and installs what it needs first. PYTHON=… chooses the interpreter (3.11 or newer).

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test test-oldest check docs docs-test fuzz families families-test test-gpu-paper gpu gpu-1 gpu-2 gpu-3 gpu-4 gpu-table
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
	$(BIN)/python docs/map.py
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --builder html --fresh-env --write-all --fail-on-warning --keep-going --quiet \
		docs docs/_build/html

docs-test: docs
	PTD_DOCS=1 $(BIN)/python -m pytest tests/docs

fuzz: $(INSTALLED)
	PTD_FUZZ=1 $(BIN)/python -m pytest tests/test_fuzz.py

families: $(INSTALLED)
	$(BIN)/python tests/family_sheet.py --workers $(WORKERS)

families-test: $(INSTALLED)
	$(BIN)/python tests/family_sheet.py --check --fifth --workers $(WORKERS)

test-gpu-paper: $(INSTALLED)
	PYTEST_PLUGINS=tests.gpu_paper.device $(BIN)/python -m pytest -n $(WORKERS) tests/gpu_paper

GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:
	PYTHONPATH=.:kernels $(GPU_PYTHON) benchmarks/gpu.py --stage 1 2 3 4 $(GPU)
	$(MAKE) gpu-table

# After the measurements: it changes which kernel `auto` chooses, and with it the code that was measured.
gpu-table:
	PYTHONPATH=.:kernels $(GPU_PYTHON) benchmarks/gpu_segments.py --write-table --output benchmarks/results/gpu/segments.json

gpu-1 gpu-2 gpu-3 gpu-4: gpu-%:
	PYTHONPATH=.:kernels $(GPU_PYTHON) benchmarks/gpu.py --stage $* $(GPU)

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
