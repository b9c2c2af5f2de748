"""Checks before a run refuse ranks with different settings, and output that cannot be written or does not fit."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import save_backbone

from ptd.commands.train import train
from ptd.config import parse_config
from ptd.distributed import preflight
from ptd.distributed.preflight import bytes_to_write, check_space
from ptd.distributed.ranks import Ranks
from ptd.files import check_writable
from ptd.types import UserError
from ptd.values import decimal_size

WORKER = Path(__file__).with_name("worker_preflight.py")
ALONE = Ranks(0, 1, 1, torch.device("cpu"))


def test_ranks_that_mean_different_runs(launch, backbone_dir: Path, tmp_path: Path) -> None:
    launch(2, WORKER, backbone_dir, save_backbone(tmp_path / "other", seed=1), tmp_path)
    both = [json.loads((tmp_path / f"said.{rank}").read_text()) for rank in (0, 1)]
    for found in both:
        assert [found[name] for name in ("same run", "other disk", "shared")] == ["fine"] * 3
        assert found["other run"].startswith(
            "train.learning_rate: the ranks have different values: 0.1 on rank 0, 1.1 on rank 1; start every rank"
        )
        assert re.match(
            r"output_dir: out is not the same folder on rank 1 as on rank 0, .* all nodes", found["not shared"]
        )
        assert re.match(
            r"backbone.path: rank 1 loaded a different backbone \(fingerprint .*\) than", found["other weights"]
        )
        assert found["left"] == ""


def test_a_folder_that_can_be_written_to_is_left_as_it_was(tmp_path: Path) -> None:
    assert check_writable(tmp_path / "new" / "deep", "output_dir") == tmp_path
    preflight.check_output(tmp_path / "new", ALONE)
    assert list(tmp_path.iterdir()) == []


def test_output_that_is_a_file_or_below_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match=r"output_dir: .*file is a file; give a folder"):
            check_writable(folder, "output_dir")


def test_output_where_nothing_can_be_written() -> None:
    """The check refuses /proc, in which no user can create a file, not even root."""
    with pytest.raises(UserError, match=r"output_dir: cannot write to /proc \(.*\); give a folder"):
        check_writable(Path("/proc/none"), "output_dir")


def test_space_for_checkpoints(tmp_path: Path) -> None:
    assert bytes_to_write(1000, 10, 2, 8) == 4 * ((3 * 1000 + 10) * 3 + 3 * 10)
    assert bytes_to_write(1000, 10, 2, 2.03125) == math.ceil((6.03125 * 1000 + 40) * 3 + 3 * 40)
    free = shutil.disk_usage(tmp_path).free
    assert "needed" in check_space([tmp_path / "out"], 1000)
    with pytest.raises(UserError, match=r"output_dir: .* free, but .* need .*; give a folder on another disk"):
        check_space([tmp_path], 2 * free + 10**9)
    assert [decimal_size(number) for number in (5, 1500, 12_340_000, 2 * 10**13)] == [
        "5 B",
        "1.5 kB",
        "12.3 MB",
        "20 TB",
    ]


def test_a_run_writes_no_more_than_was_reckoned(
    backbone_dir: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run writes no more than the estimate, and the space of its own checkpoints counts as free."""
    seen = []
    monkeypatch.setattr("ptd.runs.training.check_space", lambda folders, needed: seen.append(needed))
    run = {
        "backbone": {"path": str(backbone_dir), "dtype": "float32"},
        "method": {"name": "prefix", "num_virtual_tokens": 64},
        "data": {"train": str(rows_file), "max_length": 64},
        "train": {"max_steps": 3, "save_steps": 1, "save_total_limit": 2, "per_device_train_batch_size": 2},
        "output_dir": str(tmp_path / "out"),
    }
    train(parse_config(run))
    kept = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors"))
    assert len(seen) == 1
    # Of the space for three checkpoints two are in use, and of three adapters one; names and headers are small.
    assert 0.5 * seen[0] < kept < seen[0]
    own = sum(path.stat().st_size for path in tmp_path.glob("out/checkpoints/*/*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    assert "needed" in check_space([tmp_path / "out"], own + 1000)
    with pytest.raises(UserError):
        check_space([tmp_path / "out"], own + 1001)
