"""What all tests share: the files families.py and browser.py as modules of these names, and a saved tiny backbone."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

for name in {"families", "browser"} - set(sys.modules):  # by file: on sys.path this folder would shadow ptd_kernels
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with its tokenizer, saved; read-only by convention."""
    from families import save_backbone

    return save_backbone(tmp_path_factory.mktemp("backbone"))
