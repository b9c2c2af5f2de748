"""Trackers get a run's records, continue when the run continues, and never make the run fail."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ptd.runs.metrics_log import Records
from ptd.trackers import Behind, Guarded, Status, Tracked, Tracker, start_trackers
from ptd.types import Preempted

RECORDS: list[dict[str, Any]] = [
    {"step": 1, "loss": 2.5, "lr": 0.1, "network": {"inside": 1}},
    {"step": 2, "loss": float("nan"), "lr": 0.05},
    {"step": 2, "eval_loss": 2.25, "eval_rows": 4},
    {"step": 3, "loss": 2.0, "lr": 0.0},
]


def tracked(folder: Path, after_step: int = 0) -> Tracked:
    config = {"train": {"learning_rate": 0.1, "report_to": ["mlflow"]}, "method": {"name": "prefix"}}
    return Tracked.of(folder, "2026-01-02", "a run", config, after_step)


def write(folder: Path, names: list[str], after_step: int, to: int) -> list[str]:
    """Start the run after ``after_step``, write its records up to step ``to``, and return the notes."""
    notes: list[str] = []
    trackers = start_trackers(names, tracked(folder, after_step), notes.append)
    with Records(folder, after_step, trackers=trackers) as records:
        for record in RECORDS:
            if after_step < record["step"] <= to:
                records.write(record)
    return notes


# ---- TensorBoard


def test_tensorboard_shows_a_continued_run_as_one(tmp_path: Path) -> None:
    """A run that reached step 3 and continues from the checkpoint of step 2 is shown with one value per step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert write(tmp_path, ["tensorboard"], 0, 3) == []
    first = next((tmp_path / "tensorboard").iterdir())
    os.utime(first, (1, 1))
    assert write(tmp_path, ["tensorboard"], 2, 3) == []
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "eval_loss", "eval_rows"}
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3]
    assert [losses[0].value, losses[2].value] == [2.5, 2.0]
    assert losses[1].value != losses[1].value
    assert [(event.step, event.value) for event in events.Scalars("eval_loss")] == [(2, 2.25)]


def test_a_full_disk_ends_tensorboard_and_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A limit on the file size represents a full disk: the same call fails, after it has written a part."""
    notes: list[str] = []
    (tracker,) = start_trackers(["tensorboard"], tracked(tmp_path), notes.append)
    signalled = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        for step in range(2000):
            tracker.log(step, {"loss": 1.0, "accuracy": 0.5})
        tracker.close("finished")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, signalled)
    (note,) = notes
    assert note.startswith("train.report_to: tensorboard gets no more records (OSError: ")
    assert next((tmp_path / "tensorboard").iterdir()).stat().st_size == 20_000
    gc.collect()
    assert capfd.readouterr().err == ""


def test_no_tracker_leaves_no_folder(tmp_path: Path) -> None:
    assert write(tmp_path, [], 0, 3) == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# ---- a tracker that fails


class Recorder:
    """A tracker that records its calls; the call named ``breaks`` fails."""

    def __init__(self, breaks: str = "", wait: threading.Event | None = None) -> None:
        self.calls: list[Any] = []
        self.breaks, self.wait = breaks, wait
        self._call("start")

    def _call(self, name: str, *given: Any) -> None:
        if self.wait is not None and name != "start":
            self.wait.wait(60)
        if name == self.breaks:
            raise RuntimeError(f"no {name}\nin two lines")
        self.calls.append((name, *given))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._call("log", step, dict(values))

    def close(self, status: Status) -> None:
        self._call("close", status)


@pytest.mark.parametrize("kind", [Guarded, Behind])
@pytest.mark.parametrize("breaks", ["start", "log", "close"])
def test_a_tracker_that_fails_is_named_once(tmp_path: Path, kind: Any, breaks: str) -> None:
    notes: list[str] = []
    other = Recorder()
    broken = kind("broken", lambda: Recorder(breaks), notes.append)
    with Records(tmp_path, 0, trackers=[broken, other]) as records:
        for record in RECORDS:
            records.write(record)
            time.sleep(0.01)
    said = "broken gets no more records (RuntimeError: no {} in two lines); the run continues without it"
    assert notes == [f"train.report_to: {said.format(breaks)}"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(RECORDS)
    assert [call[0] for call in other.calls] == ["start", *["log"] * len(RECORDS), "close"]


def test_a_package_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "ptd.trackers.wandb", raising=False)
    (note,) = write(tmp_path, ["wandb"], 0, 3)
    assert "wandb gets no more records (it is not installed: pip install 'ptd[wandb]')" in note


def test_a_tracker_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules["ptd.trackers"].PATIENCE, "preempted", 0.05)
    notes: list[str] = []
    release = threading.Event()
    inner = Recorder(wait=release)
    tracker: Tracker = Behind("slow", lambda: inner, notes.append)
    for step in range(100):
        tracker.log(step, {"loss": 1.0})
    tracker.close("preempted")
    release.set()
    assert inner.calls == [("start",)]
    assert notes == ["train.report_to: slow did not take all records within 0 s"]


@pytest.mark.parametrize(
    ("error", "status"), [(None, "finished"), (Preempted("x"), "preempted"), (KeyboardInterrupt(), "failed")]
)
def test_trackers_are_told_how_the_run_ended(tmp_path: Path, error: BaseException | None, status: str) -> None:
    recorder = Recorder()

    def run() -> None:
        with Records(tmp_path, 0, trackers=[recorder]):
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    assert recorder.calls[-1] == ("close", status)


def test_every_start_of_a_run_has_its_id(tmp_path: Path) -> None:
    first = Tracked.of(tmp_path, "then", None, {}, 0)
    assert Tracked.of(tmp_path / "x" / "..", "then", None, {}, 7).id == first.id
    assert Tracked.of(tmp_path, "later", None, {}, 0).id != first.id
    assert first.name == tmp_path.name


# ---- the real clients, if they are installed: pip install 'ptd[wandb,mlflow]'


@pytest.mark.filterwarnings("default")
def test_mlflow_has_a_continued_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    from mlflow.tracking import MlflowClient

    (tmp_path / "run").mkdir()
    for after_step, to in ((0, 3), (2, 3)):
        assert write(tmp_path / "run", ["mlflow"], after_step, to) == []
    client = MlflowClient()
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a run")
    assert run.data.params["train.learning_rate"] == "0.1"
    history = client.get_metric_history(run.info.run_id, "lr")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.1), (2, 0.05), (3, 0.0)]
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "eval_loss")] == [2]


@pytest.mark.filterwarnings("default")
def test_mlflow_without_its_server_is_only_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (note,) = write(tmp_path, ["mlflow"], 0, 3)
    assert note.startswith("train.report_to: mlflow gets no more records (MlflowException: ")


OFFLINE = """
import sys
from pathlib import Path
from ptd.trackers import Tracked, start_trackers
folder = Path(sys.argv[1])
run = Tracked.of(folder, "then", "a run", {"train": {"learning_rate": 0.1}}, 0)
[tracker] = start_trackers(["wandb"], run, lambda text: print(text))
for step in (1, 2, 3):
    tracker.log(step, {"loss": 3.0 - step / 2})
tracker.close("finished")
print(run.id)
"""


def in_a_process(folder: Path, **environment: str) -> str:
    """Run `OFFLINE` in a new process, because wandb keeps a service and its settings as long as a process lives."""
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, folder],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "WANDB_CONFIG_DIR": str(folder), "WANDB_CACHE_DIR": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=200,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    said = in_a_process(tmp_path, WANDB_MODE="offline").split()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert said == [folder.name.rpartition("-")[2]]
    (written,) = folder.glob("*.wandb")
    content = written.read_bytes()
    for word in (b"learning_rate", b"a run", b"loss"):
        assert word in content


def test_wandb_without_a_key_is_only_said(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    note, _ = in_a_process(tmp_path, WANDB_API_KEY="", HOME=str(tmp_path), NETRC=str(tmp_path / "none")).splitlines()
    assert note.startswith("train.report_to: wandb gets no more records (")
