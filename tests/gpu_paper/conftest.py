"""Share fixtures among the tests on an emulated GPU, which run in a separate process (``make test-gpu-paper``)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from matrix import ROWS

device = sys.modules.get("tests.gpu_paper.device")
collect_ignore_glob = ["test_*.py"] if device is None else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if device is None or device.NO_GPU is None:
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=device.NO_GPU))


@pytest.fixture(scope="session")
def labelled_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file with the columns of every task."""
    path = tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path
