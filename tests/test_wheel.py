"""A wheel built from the repository contains all files that ptd uses and ships, and ptd finds them when installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("ptd", "kernels", "ds_configs", "launch", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, folder: Path, path: str = "") -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**kept, **({"PYTHONPATH": path} if path else {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from an sdist, as ``python -m build`` does; return the folder into which it is installed."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    run("-c", "import setuptools.build_meta as backend; backend.build_sdist('dist')", folder=source)
    shutil.unpack_archive(next((source / "dist").glob("*.tar.gz")), source / "unpacked", filter="data")
    unpacked = next((source / "unpacked").iterdir())
    run("-c", "import setuptools.build_meta as backend; backend.build_wheel('dist')", folder=unpacked)
    wheel = next((unpacked / "dist").glob("*.whl"))
    options = ("--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check")
    run("-m", "pip", "install", *options, "--target", target, wheel, folder=source)
    return target


def test_every_file_is_in_it(installed: Path) -> None:
    places = {"ptd": "ptd", "kernels/ptd_kernels": "ptd_kernels"}
    places |= {folder: f"ptd/shipped/{folder}" for folder in ("ds_configs", "launch")}
    for there, here in places.items():
        wanted = {path.relative_to(ROOT / there) for path in (ROOT / there).rglob("*") if path.is_file()}
        missing = {path for path in wanted if not (installed / here / path).is_file() and path.suffix != ".pyc"}
        assert missing == set(), there


def test_recipes_configurations_and_templates_are_found_by_name(installed: Path, tmp_path: Path) -> None:
    command = ("-m", "ptd.cli", "launch", "slurm", "causal_lm.yaml", "deepspeed=zero3.json")
    script = run(*command, "--nodes", "1", "--gpus-per-node", "8", "--dry-run", folder=tmp_path, path=str(installed))
    assert f"\n  {installed / 'ptd' / 'shipped' / 'launch' / 'recipes' / 'causal_lm.yaml'}\n" in script
