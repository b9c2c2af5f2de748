"""What initialisers read off a backbone that is sharded over two ranks (ZeRO-3)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import families
from families import save_backbone

HERE = Path(__file__).parent


def test_a_sharded_backbone_conditions_as_a_whole_one(tmp_path):
    for family in ("gemma3_text", "bert", "mbart"):
        save_backbone(tmp_path / family, family)
    rendezvous = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    program = [HERE / "worker_conditioning.py", families.__file__, tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *rendezvous, *map(str, program)],
        cwd=HERE.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-8000:]
