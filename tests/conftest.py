"""What all tests share: tests/families.py as ``families``, a saved tiny backbone, and the command line."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if "families" not in sys.modules:  # by file: this folder on sys.path would shadow the package ptd_kernels
    spec = importlib.util.spec_from_file_location("families", Path(__file__).with_name("families.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules["families"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["families"])


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with its tokenizer, saved; read-only by convention."""
    from families import save_backbone

    return save_backbone(tmp_path_factory.mktemp("backbone"))


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def ptd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run ``ptd ARGUMENTS…`` in this process."""

    from ptd.cli import main

    def run(*arguments: object, stdin: str | None = None) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["ptd", *map(str, arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
