"""Fixtures of the launch tests: a run to start, and a real Slurm that starts it."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for name in ("slurm_cluster", "user_project"):
    if name not in sys.modules:  # imported by file, as in tests/conftest.py
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a user's folder, with a space in its name."""
    from user_project import make_project

    folder = tmp_path_factory.mktemp("my project")
    make_project(folder)
    return folder


@pytest.fixture(scope="session")
def here(project: Path) -> Path:
    """Train with two ranks on this machine; return the run's output folder."""
    from user_project import launch

    arguments = ["local", "run.yaml", "output_dir=here", "--ranks-per-node", "2", "--log-dir", "here/logs"]
    done = launch(*arguments, folder=project)
    assert done.returncode == 0, done.stderr
    return project / "here"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start a Slurm of two nodes on this machine. Without Slurm, tests are skipped, or fail if PTD_REQUIRE_SLURM=1."""
    from slurm_cluster import missing, start_slurm

    reason = missing()
    if reason is not None:
        if os.environ.get("PTD_REQUIRE_SLURM") == "1":
            pytest.fail(f"PTD_REQUIRE_SLURM=1, but {reason}")
        pytest.skip(reason)
    with start_slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running
