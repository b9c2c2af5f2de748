"""Fixtures for the tests of the inspection: rows, and a prefix that is inspected on them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ptd.inspection import inspect
from ptd.types import PrefixLayout

support = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("support.py"))))


@pytest.fixture(scope="package")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in support.ROWS), encoding="utf-8")
    return path


@pytest.fixture(scope="package")
def of_prefix(tmp_path_factory: pytest.TempPathFactory, backbone_dir: Path, rows: Path) -> dict[str, Any]:
    layout = PrefixLayout((support.SELF, support.SELF))
    adapter = support.saved(tmp_path_factory.mktemp("prefix"), backbone_dir, layout, method={"name": "prefix"})
    return inspect(adapter, data=str(rows), batch_size=5) | {"folder": adapter}
