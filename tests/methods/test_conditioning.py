"""Initialisers read the same from a backbone that is sharded over two ranks (ZeRO-3) as from a whole one."""

from __future__ import annotations

from pathlib import Path

import families
from families import save_backbone

HERE = Path(__file__).parent


def test_a_sharded_backbone_conditions_as_a_whole_one(launch, tmp_path):
    for family in ("gemma3_text", "bert", "mbart"):
        save_backbone(tmp_path / family, family)
    launch(2, HERE / "worker_conditioning.py", families.__file__, tmp_path)
