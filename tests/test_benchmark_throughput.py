"""benchmarks/throughput.py: the lengths of its rows, and its cells."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ptd.config import parse_config
from ptd.distributed.ranks import Ranks
from ptd.runs.build import read_material
from ptd.types import Reporter

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def throughput(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("throughput")


def test_rows_have_the_tokens_asked_for(throughput: ModuleType, tmp_path: Path) -> None:
    """Rows have the requested lengths when read with the loader, template and tokenizer of a run."""
    cell = throughput.Cell("instructions", layers=1)
    folders = throughput.Folders(tmp_path, throughput.QUICK_MODEL)
    config = parse_config(folders.config(cell))
    examples = read_material(config, Ranks.start(), Reporter()).examples
    asked = throughput.instructions(np.random.default_rng(throughput.SEED), throughput.ROWS)
    assert examples.lengths().tolist() == asked.tolist()
    assert examples.report.supervised_tokens / examples.report.tokens == pytest.approx(throughput.SUPERVISED, abs=0.01)
    assert folders.rows("128", 4).read_text().count("\n") == 4


def test_lengths_are_those_described(throughput: ModuleType) -> None:
    drawn = throughput.instructions(np.random.default_rng(1), 100_000)
    assert (drawn.min(), drawn.max()) == (8, 1024)
    inside = drawn[(drawn > 8) & (drawn < 1024)]
    assert np.log(inside).std() == pytest.approx(0.9, abs=0.05)
    assert drawn.mean() == pytest.approx(180, rel=0.06)
    short = throughput.e2e(np.random.default_rng(1), 100_000)
    assert short.mean() == pytest.approx(80, abs=1)


def test_cells_are_those_the_readme_names(throughput: ModuleType) -> None:
    names = list(throughput.CELLS)
    assert {"e2e, P = 30, float32", "instructions, P = 30, float32", "e2e, P = 2048, float32"} <= set(names)
    assert all(cell.settings is None and cell.rows == 8 for cell in throughput.CELLS.values())
