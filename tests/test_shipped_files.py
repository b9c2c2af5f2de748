"""Every run file that is shipped is one that ptd accepts, and opens with the command that runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptd.config import load_config
from ptd.deepspeed_config import apply_deepspeed

ROOT = Path(__file__).parents[1]
RUN_FILES = sorted([*ROOT.glob("launch/**/*.yaml"), *ROOT.glob("ptd/**/*.yaml")])


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_shipped_run_file(path: Path) -> None:
    config, _ = apply_deepspeed(load_config(path))
    assert config.data.train
    assert path.read_text(encoding="utf-8").startswith("#")
    assert "ptd train" in path.read_text(encoding="utf-8").split("backbone:")[0]


def test_there_are_run_files() -> None:
    assert len(RUN_FILES) >= 2
