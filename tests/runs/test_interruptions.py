"""Runs on two ranks that are stopped, hang or fail, and continue: the losses are those of an undisturbed run.

One run is interrupted five times before it finishes; another fails at the same step until it is refused.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ptd.errors import DIVERGED, DONE, FATAL, REQUEUE, USAGE
from ptd.quickstart import BACKBONE
from ptd.quickstart.task import write_task
from ptd.runs.metrics_log import read_records

STEPS = 12
HANG = 5 / 60
TRAIN = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "save_steps": 5,
    "eval_steps": 4,
    "logging_steps": 1,
    "hang_timeout_minutes": HANG,
    "seed": 5,
}
METHOD = {"name": "prefix", "num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 16}
EVENTS: dict[str, list[Any] | None] = {
    "SIGUSR1 while loading": [1, "resume", 0, "SIGUSR1"],
    "SIGUSR1 to rank 1, where an evaluation is due": [1, "step", 4, "SIGUSR1"],
    "SIGKILL behind the evaluation that was made up for": [0, "step", 5, "SIGKILL"],
    "SIGTERM twice to rank 0 while it saves": [0, "save_state", 5, "SIGTERM"],
    "SIGSTOP": [1, "step", 9, "SIGSTOP"],
    "last": None,
}
Results = dict[str, dict[str, Any]]


class Folders:
    def __init__(self, root: Path) -> None:
        self.root, self.whole, self.cut, self.failing = root, root / "whole", root / "cut", root / "failing"
        self.diverging = root / "diverging"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("interruptions"))


def diverging(root: Path) -> list[str]:
    """Return overrides that make the run diverge whatever its learning rate.

    They select the shipped backbone, whose loss can get worse.
    """
    train, held_out = write_task(root)
    return [
        *(f"backbone.path={BACKBONE}", "backbone.dtype=float32", f"data.train={train}", f"data.eval={held_out}"),
        *("data.max_length=128", r'data.prompt_template="{prompt}\n"', "method.num_virtual_tokens=32"),
        *("method.encoder_hidden_size=256", "train.learning_rate=3.0e4", "train.lr_scheduler_type=constant"),
        *("train.eval_steps=null", "train.save_steps=null", "train.on_divergence=retry"),
    ]


@pytest.fixture(scope="module")
def results(folders: Folders, backbone_dir: Path, rows_file: Path) -> Results:
    run_file = folders.root / "run.yaml"
    data = {"train": str(rows_file), "eval": str(rows_file), "max_length": 64}
    settings = {"backbone": {"path": str(backbone_dir)}, "data": data, "method": METHOD, "train": TRAIN}
    run_file.write_text(yaml.safe_dump(settings), encoding="utf-8")

    def attempt(folder: Path, event: list[Any] | None, *more: str) -> dict[str, Any]:
        arguments = ["train", str(run_file), f"output_dir={folder}", *more]
        return {"arguments": arguments, "event": event, "output_dir": str(folder)}

    # A killed attempt continues from a complete checkpoint and dies before the next save begins, because a write in
    # progress might or might not complete.
    asked, dying = [0, "step", 4, "SIGTERM"], [1, "step", 5, "SIGKILL"]
    attempts = {
        "whole": attempt(folders.whole, None),
        **{name: attempt(folders.cut, event) for name, event in EVENTS.items()},
        "asked": attempt(folders.failing, asked),
        "killed": attempt(folders.failing, dying),
        "killed again": attempt(folders.failing, dying),
        "refused": attempt(folders.failing, None),
        "retried": attempt(folders.failing, None, "--retry"),
        "diverging": attempt(folders.diverging, None, *diverging(folders.root)),
        "diverged": attempt(folders.diverging, None, *diverging(folders.root)),
    }
    plan, found = folders.root / "attempts.json", folders.root / "results.json"
    plan.write_text(json.dumps(list(attempts.values())))
    worker = Path(__file__).with_name("worker_restarts.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(plan), str(found)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = dict(zip(attempts, json.loads(found.read_text()), strict=True))
    assert results["whole"]["codes"] == [DONE, DONE], results["whole"]["stderr"]
    return results


def series(folder: Path, key: str) -> dict[int, float]:
    return {record["step"]: record[key] for record in read_records(folder) if key in record}


@pytest.mark.parametrize("key", ["loss", "grad_norm", "lr", "tokens", "supervised_tokens", "eval_loss"])
def test_losses_are_those_of_an_undisturbed_run(results: Results, folders: Folders, key: str) -> None:
    assert results["last"]["codes"] == [DONE, DONE], results["last"]["stderr"]
    assert results["retried"]["codes"] == [DONE, DONE], results["retried"]["stderr"]
    whole = series(folders.whole, key)
    assert list(whole) == ([4, 8, 12] if key == "eval_loss" else list(range(1, STEPS + 1)))
    assert len([record for record in read_records(folders.cut) if key in record]) == len(whole), "each once"
    assert series(folders.cut, key) == whole
    assert series(folders.failing, key) == whole


@pytest.mark.parametrize("name", ["adapter", "best"])
def test_adapters_are_those_of_an_undisturbed_run(results: Results, folders: Folders, name: str) -> None:
    weights = Path(name) / "adapter_model.safetensors"
    assert (folders.cut / weights).read_bytes() == (folders.whole / weights).read_bytes()


def test_a_signal_stops_all_ranks_with_a_checkpoint(results: Results, folders: Folders) -> None:
    """All ranks stop after the step in which one rank receives the signal, or after the next step if it is saving.

    Before training they stop without a checkpoint.
    """
    asked = [name for name in EVENTS if name.startswith(("SIGUSR1", "SIGTERM"))]
    for name, step in zip(asked, (0, 4, 6), strict=True):
        result = results[name]
        assert result["codes"] == [REQUEUE, REQUEUE], result["stderr"]
        assert result["killed"] == []
        assert result["run"]["status"] == result["run"]["attempts"][-1]["how"] == "preempted"
        assert result["run"]["attempts"][-1]["step"] == step
        said = f"ptd: stopped after step {step}, as requested; run the same command again to continue\n"
        assert result["stderr"][0].endswith(said)
        assert "Traceback" not in "".join(result["stderr"])
    second, third = (results[name]["stderr"][0] for name in asked[1:])
    assert "no checkpoint yet" in second
    assert "continuing from step-000004\n" in third
    # The next attempts run the evaluation that was due before their first step.
    assert "eval loss" not in second
    for said in (results["SIGKILL behind the evaluation that was made up for"]["stderr"][0], third):
        assert "train 4/12  eval loss" in said.partition("train 5/12  loss")[0]


def test_a_rank_that_stands_still_ends_the_others_with_their_stacks(results: Results, folders: Folders) -> None:
    result = results["SIGSTOP"]
    assert result["codes"] == [FATAL, -9]
    assert result["killed"] == [1]
    stacks = folders.cut / "logs" / "rank-0.stacks"
    content = stacks.read_text()
    assert "rank 0 on " in content
    assert "no progress for 5 s in step 9\n" in content
    for frame in ('loop.py", line', "in take_step", "in encode", "in flat"):
        assert frame in content
    assert "in _watch" in content
    said = f"no progress for 5 s in step 9; stopping this process. Stacks of all threads: {stacks}\n"
    assert said in result["stderr"][0]
    assert "continuing from step-000006\n" in results["last"]["stderr"][0]


def test_a_finished_run_leaves_no_empty_logs(results: Results, folders: Folders) -> None:
    assert not (folders.whole / "logs").exists()


def test_attempts_are_listed(results: Results) -> None:
    attempts = [
        {key: attempt[key] for key in ("from_step", "how", "step")} for attempt in results["last"]["run"]["attempts"]
    ]
    assert attempts == [
        {"from_step": 0, "how": "preempted", "step": 0},
        {"from_step": 0, "how": "preempted", "step": 4},
        {"from_step": 4, "how": "lost", "step": 4},
        {"from_step": 4, "how": "preempted", "step": 6},
        {"from_step": 6, "how": "lost", "step": 6},
        {"from_step": 6, "how": "finished", "step": STEPS},
    ]
    assert results["last"]["run"]["status"] == "finished"


def test_a_step_that_fails_twice_is_not_tried_again(results: Results, folders: Folders) -> None:
    for name in ("killed", "killed again"):
        codes = results[name]["codes"]
        assert codes[1] == -9
        assert codes[0] not in (DONE, REQUEUE)
    refused = results["refused"]
    assert refused["codes"] == [FATAL, FATAL]
    message = refused["stderr"][0]
    assert f"ptd: error: the run in {folders.failing} failed twice after the checkpoint of step 4" in message
    assert "--retry" in message
    assert "Traceback" not in message
    assert refused["stderr"][1] == ""
    assert refused["run"] == results["killed again"]["run"]
    assert "continuing from step-000004\n" in results["retried"]["stderr"][0]
    last = results["retried"]["run"]["attempts"]
    assert [attempt.get("forgiven", False) for attempt in last] == [True, True, True, False]


def test_all_ranks_go_back_and_end_together_when_they_diverge(results: Results, folders: Folders) -> None:
    ended, refused = results["diverging"], results["diverged"]
    assert ended["codes"] == [DIVERGED, DIVERGED], ended["stderr"]
    assert ended["killed"] == []
    assert ended["run"]["status"] == ended["run"]["attempts"][-1]["how"] == "diverged"
    assert [retry["from_step"] for retry in ended["run"]["retries"]] == [0, 0, 0]
    assert ended["stderr"][0].splitlines()[-1].startswith("ptd: error: the run diverged in step ")
    assert "ptd: error" not in ended["stderr"][1]
    assert refused["codes"] == [USAGE, USAGE]
    assert "and would diverge again; lower the rate" in refused["stderr"][0]
    assert refused["run"] == ended["run"]
    losses = series(folders.diverging, "loss")
    assert list(losses) == list(range(1, len(losses) + 1))


def test_records_name_the_slowest_rank(results: Results, folders: Folders) -> None:
    for record in read_records(folders.whole):
        if "loss" in record:
            assert record["slowest_rank"] in (0, 1)
            assert record["slowest_rank_seconds"] >= record["mean_rank_seconds"] >= record["slowest_rank_seconds"] / 2
            assert record["mean_rank_seconds"] > 0
