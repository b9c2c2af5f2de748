"""Every run file that is shipped is one that ptd accepts, and opens with the command that runs it."""

from __future__ import annotations

import dataclasses
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


def test_every_key_is_documented() -> None:
    from ptd.config import RunConfig
    from ptd.methods import methods

    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    keys = {"method.name", "deepspeed", "output_dir"}
    for section in ("backbone", "task", "data", "train"):
        keys |= {f"{section}.{key}" for key in RunConfig.model_fields[section].annotation.model_fields}
    for method in methods().values():
        keys |= {f"method.{field.name}" for field in dataclasses.fields(method.config)}
    assert {key for key in keys if f"| `{key}` |" not in text} == set()
