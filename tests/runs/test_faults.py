"""Faults do not change a run on two ranks: after each fault the run continues with the same losses.

One launched job (worker_faults.py) forks all ranks. The full and the read-only disk are real, which requires root and
mounts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from ptd.checkpoint import latest_complete
from ptd.runs.metrics_log import read_records

STEPS, NAN_STEP = 16, 10
# Relative tolerance for the same sums in a different order, carried through 16 steps of Adam.
OTHER_RANKS = 1e-5
SETTINGS: dict[str, Any] = {
    "method": {
        "name": "prefix",
        "num_virtual_tokens": 4,
        "prefix_projection": True,
        "encoder_hidden_size": 512,
        "embedding_size": 12,
    },
    "train": {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.003,
        "warmup_steps": 2,
        "save_steps": 3,
        "save_total_limit": 2,
        "eval_steps": 8,
        "logging_steps": 1,
    },
}
KILLS = ("mid-step", "mid-backward", "mid-save", "before the rename", "late")


def mounts() -> bool:
    """Return whether a process on this machine can create its own mounts."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def folder(backbone_dir: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run worker_faults.py; return its folder with ``whole``, ``faults``, ``worlds`` and ``report.json``."""
    folder = tmp_path_factory.mktemp("faults")
    data = {"train": str(rows_file), "eval": str(rows_file), "max_length": 64}
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump({"backbone": {"path": str(backbone_dir)}, "data": data, **SETTINGS}))
    command: list[str | Path] = [sys.executable, Path(__file__).with_name("worker_faults.py"), run_file, folder]
    if mounts():
        command = ["unshare", "--mount", *command, "--mounts"]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text()))


def started(report: dict[str, Any], title: str) -> dict[str, Any]:
    if title not in report:
        pytest.skip("a disk that is full or read-only takes root and mounts of one's own (unshare --mount)")
    return dict(report[title])


def series(folder: Path, key: str) -> dict[int, float]:
    return {record["step"]: record[key] for record in read_records(folder) if key in record}


@pytest.mark.parametrize("title", ["whole", "last", "on one again"])
def test_runs_reach_their_end(report: dict[str, Any], title: str) -> None:
    assert set(report[title]["codes"]) == {0}, report[title]["log"]


@pytest.mark.parametrize("title", KILLS)
def test_each_kill_hit(report: dict[str, Any], title: str) -> None:
    assert -9 in report[title]["codes"], report[title]["log"]


@pytest.mark.parametrize("key", ["loss", "grad_norm", "lr", "tokens", "skipped_steps", "eval_loss"])
def test_losses_are_those_of_the_undisturbed_run(folder: Path, key: str) -> None:
    whole = series(folder / "whole", key)
    assert len(whole) == (2 if key == "eval_loss" else STEPS)
    assert series(folder / "faults", key) == whole


def test_all_that_is_left_is_that_of_the_undisturbed_run(folder: Path) -> None:
    whole, faults = folder / "whole", folder / "faults"
    for name in ("adapter", "best"):
        file = Path(name) / "adapter_model.safetensors"
        assert (faults / file).read_bytes() == (whole / file).read_bytes()
    left = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert left == ["latest", "step-000015", "step-000016"]
    assert sorted(path.name for path in (faults / "checkpoints").iterdir()) == left
    shards = sorted((whole / "checkpoints" / "step-000016").glob("*.safetensors"))
    assert len(shards) == 2
    for path in shards:
        tensors, others = load_file(path), load_file(faults / path.relative_to(whole))
        assert tensors.keys() == others.keys()
        assert all(others[name].equal(tensors[name]) for name in tensors)


def test_not_a_number_on_one_rank_is_skipped_on_all(folder: Path, report: dict[str, Any]) -> None:
    assert f"step {NAN_STEP} skipped on all ranks: loss nan" in report["whole"]["log"]
    for name in ("whole", "faults", "worlds"):
        assert [step for step, skipped in series(folder / name, "skipped_steps").items() if skipped] == [NAN_STEP]


@pytest.mark.parametrize("title", ["mid-save", "before the rename"])
def test_a_killed_save_leaves_what_was_whole(report: dict[str, Any], title: str) -> None:
    assert report[title]["checkpoints"] == [".writing-000009", "latest", "step-000003", "step-000006"]
    titles = list(report)
    following = report[titles[titles.index(title) + 1]]
    assert "continuing from step-000006" in following["log"]


def test_leftover_temporary_folders_are_removed_at_the_next_start(report: dict[str, Any]) -> None:
    """The worker creates two such folders before the start that follows "before the rename"."""
    for title in ("late", "last"):
        assert not {".writing-000004", ".deleted-step-000001"} & set(report[title]["checkpoints"])


@pytest.mark.parametrize(("title", "said"), [("disk full", "No space left on device"), ("read-only", "Read-only")])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_cleanly(
    report: dict[str, Any], title: str, said: str
) -> None:
    start = started(report, title)
    assert start["codes"] == [2, 2], start["log"]
    error = start["log"].splitlines()[-1]
    assert error.startswith("ptd: error: output_dir: the checkpoint of step 12 could not be written to ")
    assert said in error
    assert error.endswith("is writable; the same command then continues from step-000009")
    assert "Traceback" not in start["log"] + start["other_log"]
    assert start["checkpoints"] == ["latest", "step-000006", "step-000009"]


def test_a_record_that_cannot_be_written_ends_the_run_cleanly(report: dict[str, Any]) -> None:
    """Only rank 0 writes records, so rank 1 fails because it has lost rank 0."""
    start = started(report, "disk full for a record")
    assert start["codes"] == [2, 1], start["log"]
    assert re.search(r"ptd: error: .*metrics.jsonl \(No space left on device\)", start["log"].splitlines()[-1])


def test_a_read_only_folder_is_refused_at_the_start(report: dict[str, Any]) -> None:
    start = started(report, "read-only from the start")
    assert start["codes"] == [2, 2], start["log"]
    assert re.search(r"ptd: error: output_dir: cannot write .*Read-only file system", start["log"])
    assert "Traceback" not in start["log"] + start["other_log"]


def test_ranks_may_come_and_go(folder: Path, report: dict[str, Any]) -> None:
    """A run continues on 1, 2, 4 and again 1 ranks, and is killed before each change."""
    for title, step in (("on two", "0000(03|06)"), ("on four", "0000(06|09)"), ("on one again", "0000(09|12)")):
        assert re.search(f"continuing from step-{step}", report[title]["log"])
    assert "keeping 4 rows per step on 4 ranks" in report["on four"]["log"]
    whole, worlds = series(folder / "whole", "loss"), series(folder / "worlds", "loss")
    finite = [step for step in whole if step != NAN_STEP]
    assert [worlds[step] for step in finite] == pytest.approx([whole[step] for step in finite], rel=OTHER_RANKS)
    assert series(folder / "worlds", "tokens") == series(folder / "whole", "tokens")


@pytest.mark.parametrize("damage", ["emptied", "cut", "flipped", "removed"])
@pytest.mark.parametrize("place", range(4))
def test_damage_to_any_file_is_found(folder: Path, tmp_path: Path, place: int, damage: str) -> None:
    """The files of a checkpoint are two ranks' shards, the facts and the manifest."""
    copied = shutil.copytree(folder / "whole" / "checkpoints", tmp_path / "checkpoints")
    files = sorted((copied / "step-000016").iterdir())
    assert len(files) == 4
    content = bytearray(files[place].read_bytes())
    where = (len(content) * 2) // 3
    if damage == "removed":
        files[place].unlink()
    elif damage == "flipped":
        content[where] ^= 0x10
        files[place].write_bytes(content)
    else:
        files[place].write_bytes(b"" if damage == "emptied" else content[:where])
    found, skipped = latest_complete(copied)
    assert found == copied / "step-000015"
    assert len(skipped) == 1
    assert skipped[0].startswith("step-000016: ")
