"""Launching ranks, and the data of small runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

HERE = Path(__file__).parent
Launch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def launch() -> Launch:
    """``launch(ranks, *program)`` runs ``torchrun … program``; with ``check`` a failure shows what the ranks wrote."""

    def run(ranks: int, *program: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *rendezvous]
        done = subprocess.run(
            [*command, *map(str, program)],
            cwd=HERE.parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not check or done.returncode == 0, f"{program} on {ranks} ranks failed:\n{done.stderr[-8000:]}"
        return done

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
