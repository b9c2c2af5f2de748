# make demo   tune the shipped backbone on two ranks, before and after (minutes, two CPU cores or GPUs)
# make test   all tests, in two processes (WORKERS=…)
# make check  style, types, formatting
# make fuzz   run files, data files and adapters of anything, for minutes
# make gpu    the attention kernels' tests and benchmark, and a 7B backbone in every placement, on one NVIDIA GPU
# Each makes .venv and installs what it needs first. PYTHON=… chooses the interpreter (3.10 or newer).

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test check fuzz gpu
demo: $(INSTALLED)
	$(BIN)/ptd quickstart --output quickstart --overwrite

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(INSTALLED)
	PTD_FUZZ=1 $(BIN)/python -m pytest tests/test_fuzz.py

gpu: $(INSTALLED)
	CUBLAS_WORKSPACE_CONFIG=:4096:8 PTD_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/ptd_kernels
	$(BIN)/python benchmarks/bench_prefix_attention.py --output benchmarks/results/prefix_attention
	$(BIN)/python benchmarks/placements.py --output benchmarks/results/placements.json
	$(BIN)/python benchmarks/plan_vs_measured.py --output benchmarks/results/plan_vs_measured_gpu.json

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
