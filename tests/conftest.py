"""What all tests share: tests/families.py under the name ``families``, and a saved tiny backbone."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

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
