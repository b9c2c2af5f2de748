"""Runs in this process, and the data of small runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from reporting import Notes, Stopped

from ptd.commands.train import train
from ptd.config import parse_config


@pytest.fixture(scope="session")
def train_here() -> Callable[..., list[str]]:
    """``train_here(run_file_as_dict, stop=7)`` trains in this process, torn down at step ``stop``; what was said."""

    def run(raw: dict[str, Any], *, stop: int | None = None, overwrite: bool = False) -> list[str]:
        notes = Notes(stop)
        try:
            train(parse_config(raw), overwrite=overwrite, reporter=notes)
        except Stopped:
            return notes.lines
        assert stop is None
        return notes.lines

    return run


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 rows of prompt and completion, of very different length: one byte is one token."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {"prompt": f"{index} times {index % 5} is ", "completion": "ab" * (1 + index * 7 % 11) + str(index)}
        for index in range(22)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``datasets`` caches below the session's own folder, here and in launched ranks."""
    folder = str(tmp_path_factory.mktemp("hf_cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", folder)
        yield
