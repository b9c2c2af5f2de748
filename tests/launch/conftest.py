"""A real Slurm for the tests of this folder."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAME = "slurm_cluster"
if NAME not in sys.modules:  # by file, as tests/conftest.py does
    spec = importlib.util.spec_from_file_location(NAME, Path(__file__).with_name(f"{NAME}.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes on this machine. Skips where Slurm is not installed; with PTD_REQUIRE_SLURM=1 it fails there."""
    from slurm_cluster import missing, start_slurm

    reason = missing()
    if reason is not None:
        if os.environ.get("PTD_REQUIRE_SLURM") == "1":
            pytest.fail(f"PTD_REQUIRE_SLURM=1, but {reason}")
        pytest.skip(reason)
    with start_slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running
