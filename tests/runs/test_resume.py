"""A run that was killed and restarted, launched as a user would and with ZeRO-3, equals an undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from ptd import cli
from ptd.checkpoint.files import write_json
from ptd.checkpoint.run_state import file_entry
from ptd.runs.metrics_log import read_records
from ptd.types import UserError

STEPS, EPOCH, KILLED_AFTER = 14, 6, 7  # killed in the second of three epochs; checkpoints at 3, 6, 9 …
SETTINGS: dict[str, Any] = {
    "method": {
        "name": "prefix",
        "num_virtual_tokens": 4,
        "prefix_projection": True,
        "encoder_hidden_size": 16,
        "embedding_size": 12,
    },
    "train": {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "save_steps": 3,
        "eval_steps": 4,
        "logging_steps": 1,
        "seed": 5,
    },
    # Thresholds of 0: DeepSpeed would otherwise leave a backbone of this size unsharded, and gather it only once.
    "deepspeed": {
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        }
    },
}
# Relative tolerance for the same sums in a different order, carried through up to 14 steps of Adam; the largest
# measured difference is 6e-7.
OTHER_RANKS = 1e-5


def torchrun(*program: str | int | Path) -> subprocess.CompletedProcess[str]:
    """Run the program on two ranks with torchrun."""
    rendezvous = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *rendezvous, *map(str, program)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


class Runs:
    """Launched runs: ``whole`` ran through, ``resumed`` was killed and restarted, ``killed`` is the copy in between."""

    def __init__(self, root: Path, settings: dict[str, Any], launch: Any, train_here: Any) -> None:
        self.whole, self.resumed, self.killed = root / "whole", root / "resumed", root / "killed"
        self.settings, self.train_here = settings, train_here
        run_file = root / "run.yaml"
        run_file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        # The reference run does not need a launcher.
        launch(2, Path(cli.__file__).with_name("__main__.py"), "train", run_file, f"output_dir={self.whole}")
        crash = Path(__file__).with_name("worker_crash.py")
        self.crash = torchrun(crash, KILLED_AFTER, "train", run_file, f"output_dir={self.resumed}")
        shutil.copytree(self.resumed, self.killed)
        unfinished = self.resumed / "checkpoints" / ".writing-000009"
        unfinished.mkdir()
        (unfinished / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
        self.second = torchrun("-m", "ptd.cli", "train", run_file, f"output_dir={self.resumed}")
        assert self.second.returncode == 0, self.second.stderr[-8000:]

    def continue_alone(self, folder: Path, *, stop: int | None = None, **train: int) -> list[str]:
        """Continue a copied folder in this process, unsharded, up to step ``stop``; return the messages."""
        settings = {key: value for key, value in self.settings.items() if key != "deepspeed"}
        settings["train"] = {**settings["train"], **train}
        return list(self.train_here({**settings, "output_dir": str(folder)}, stop=stop))


@pytest.fixture(scope="module")
def runs(
    launch: Any, train_here: Any, backbone_dir: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    data = {"train": str(rows_file), "eval": str(rows_file), "max_length": 64}
    settings = {"backbone": {"path": str(backbone_dir)}, "data": data, **SETTINGS}
    return Runs(tmp_path_factory.mktemp("runs"), settings, launch, train_here)


def series(folder: Path, key: str) -> dict[int, float]:
    return {record["step"]: record[key] for record in read_records(folder) if key in record}


def test_the_crash_left_an_unfinished_run(runs: Runs) -> None:
    assert runs.crash.returncode != 0
    assert json.loads((runs.killed / "run.json").read_text())["status"] == "running"
    assert sorted(path.name for path in (runs.killed / "checkpoints").glob("step-*")) == ["step-000003", "step-000006"]
    assert (runs.killed / "checkpoints" / "latest").read_text() == "step-000006\n"
    assert max(series(runs.killed, "loss")) == KILLED_AFTER
    assert not (runs.killed / "metrics.jsonl").read_text().endswith("\n")


def test_the_second_start_says_that_it_continues(runs: Runs) -> None:
    assert "continuing from step-000006\n" in runs.second.stderr
    assert "\ntrain 6/14" not in runs.second.stderr
    assert "\ntrain 7/14" in runs.second.stderr


@pytest.mark.parametrize("key", ["loss", "grad_norm", "lr", "tokens", "supervised_tokens", "eval_loss"])
def test_resumed_run_is_bit_identical(runs: Runs, key: str) -> None:
    assert series(runs.resumed, key) == series(runs.whole, key)


@pytest.mark.parametrize("name", ["adapter", "best"])
def test_adapters_are_bit_identical(runs: Runs, name: str) -> None:
    whole, resumed = (folder / name / "adapter_model.safetensors" for folder in (runs.whole, runs.resumed))
    assert resumed.read_bytes() == whole.read_bytes()
    assert load_file(whole)["prompt_embeddings"].shape == (4, 64)


def test_resumed_checkpoint_is_bit_identical(runs: Runs) -> None:
    """The parameters and both moments are identical in the file of each rank."""
    for folder in (runs.whole, runs.resumed):
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
            "latest",
            "step-000012",
            "step-000014",
        ]
    last = Path("checkpoints") / "step-000014"
    files = sorted(path.name for path in (runs.whole / last).glob("*.safetensors"))
    assert len(files) == 2
    for name in files:
        whole, resumed = load_file(runs.whole / last / name), load_file(runs.resumed / last / name)
        assert whole.keys() == resumed.keys()
        assert all(resumed[key].equal(whole[key]) for key in whole)


def test_no_step_is_recorded_twice(runs: Runs) -> None:
    lines = [json.loads(line) for line in (runs.resumed / "metrics.jsonl").read_text().splitlines()]
    trained = [record["step"] for record in lines if "loss" in record]
    assert trained == list(range(1, STEPS + 1))
    assert [record["step"] for record in lines if "eval_loss" in record] == [4, 8, 12, 14]


def test_result_of_the_resumed_run(runs: Runs) -> None:
    whole, resumed = (json.loads((folder / "run.json").read_text()) for folder in (runs.whole, runs.resumed))
    assert resumed["status"] == whole["status"] == "finished"
    timing = ("seconds", "peak_memory_bytes")
    results = [{key: value for key, value in run["result"].items() if key not in timing} for run in (whole, resumed)]
    assert results[0] == results[1]
    assert json.loads(runs.second.stdout) == {"output_dir": str(runs.resumed), **resumed["result"]}


def test_one_rank_continues_what_two_began(runs: Runs, tmp_path: Path) -> None:
    folder = shutil.copytree(runs.killed, tmp_path / "alone")
    notes = runs.continue_alone(folder)
    assert "continuing from step-000006" in notes
    kept = "keeping 4 rows per step on 1 ranks: per_device_train_batch_size=2, gradient_accumulation_steps=2"
    assert kept in notes
    for key in ("loss", "grad_norm", "eval_loss"):
        assert series(folder, key) == pytest.approx(series(runs.whole, key), rel=OTHER_RANKS)
    for key in ("tokens", "supervised_tokens", "lr"):
        assert series(folder, key) == series(runs.whole, key)


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "no manifest"])
def test_damaged_checkpoint_is_passed_over(runs: Runs, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(runs.killed, tmp_path / "damaged")
    newest = folder / "checkpoints" / "step-000006"
    shard = newest / "shard-00002-model-00001-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(content[:-8])
    elif damage == "missing":
        shard.unlink()
    else:
        (newest / "manifest.json").unlink()
    notes = runs.continue_alone(folder)
    said = {"flipped": "is damaged", "cut": "is truncated", "missing": "unreadable", "no manifest": "unreadable"}
    assert notes[0].startswith("passed over step-000006: ")
    assert said[damage] in notes[0]
    assert notes[1] == "continuing from step-000003"
    assert list(series(folder, "loss")) == list(range(1, STEPS + 1))
    assert series(folder, "loss") == pytest.approx(series(runs.whole, "loss"), rel=OTHER_RANKS)


def test_damaged_checkpoint_does_not_push_out_whole_ones(runs: Runs, tmp_path: Path) -> None:
    """With ``save_total_limit`` 1, a damaged checkpoint of a later step does not displace a complete one."""
    folder = shutil.copytree(runs.killed, tmp_path / "damaged")
    (folder / "checkpoints" / "step-000006" / "manifest.json").write_text("{")
    runs.continue_alone(folder, stop=5, save_steps=1, save_total_limit=1)
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-000004"]


def test_no_whole_checkpoint_is_refused_instead_of_starting_over(runs: Runs, tmp_path: Path) -> None:
    folder = shutil.copytree(runs.killed, tmp_path / "damaged")
    for manifest in folder.glob("checkpoints/step-*/manifest.json"):
        manifest.unlink()
    records = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"no checkpoint in .* is complete .*--overwrite"):
        runs.continue_alone(folder)
    assert (folder / "metrics.jsonl").read_bytes() == records


@pytest.mark.parametrize("what", ["backbone_fingerprint", "train_data_digest"])
def test_changed_backbone_or_data_under_the_same_name_is_refused(runs: Runs, tmp_path: Path, what: str) -> None:
    folder = shutil.copytree(runs.killed, tmp_path / "moved")
    checkpoint = folder / "checkpoints" / "step-000006"
    state = json.loads((checkpoint / "state.json").read_text())
    write_json(checkpoint / "state.json", {**state, what: "0" * 16})
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    write_json(checkpoint / "manifest.json", {**manifest, "state.json": file_entry(checkpoint / "state.json")})
    with pytest.raises(UserError, match=f"another {what}"):
        runs.continue_alone(folder)
