"""What a run writes into its folder, and which folders it accepts; without a launcher, in the tests' process."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image
from safetensors.torch import load_file

from ptd.config import parse_config
from ptd.engine.phases import PHASES
from ptd.report.plots import plot_loss
from ptd.runs.metrics_log import Records, read_records
from ptd.types import UserError

STEPS = 20
# Recorded on x86-64 with AVX-512, torch 2.13.0, one thread; to record again, print series(finished, "loss").
# fmt: off
GOLDEN_LOSSES = [
    6.6173656, 6.7394772, 6.4418203, 6.4516207, 6.5576675,
    6.4412013, 6.5286165, 6.3764331, 6.4498596, 6.3870328,
    6.3554882, 6.2000315, 6.2187177, 6.1726033, 6.3948752,
    6.3621703, 6.4190048, 6.2788356, 6.3531473, 6.2586763,
]
# fmt: on
GOLDEN_TOLERANCE = 1e-5  # CPU kernels differ in the last bits between machines: by 1.3e-7 with AVX2 or without AVX

RECORD_FIELDS = {
    "step": int,
    "loss": float,
    "lr": float,
    "grad_norm": float,
    "tokens": int,
    "supervised_tokens": int,
    "tokens_per_second": float,
    "step_seconds": float,
    "phase_seconds": dict,
    "peak_memory_bytes": int,
    "network_bytes": int,
    "network_bytes_prompt": int,
    "network_bytes_backbone": int,
    "network_bytes_between_nodes": int,
    "network": dict,
    "skipped_steps": int,
}
EVAL_FIELDS = {"step": int, "eval_loss": float, "eval_perplexity": float, "eval_supervised_tokens": int}
ALONE_FIELDS = {
    "step": int,
    "frozen_loss": float,
    "frozen_perplexity": float,
    "frozen_supervised_tokens": int,
    "frozen_train_loss": float,
}

Start = Callable[..., list[str]]


@pytest.fixture(scope="module")
def start(backbone_dir: Path, rows_file: Path, train_here: Start) -> Start:
    """``start(folder, {"train.seed": 3}, stop=7)`` trains into ``folder`` and returns the messages."""
    settings: dict[str, Any] = {
        "backbone": {"path": str(backbone_dir)},
        "method": {"name": "prefix", "num_virtual_tokens": 4},
        "data": {"train": str(rows_file), "eval": str(rows_file), "max_length": 64},
        "train": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "eval_steps": 5,
            "save_steps": 5,
        },
    }

    def run(
        folder: Path, changes: dict[str, Any] | None = None, *, stop: int | None = None, overwrite: bool = False
    ) -> list[str]:
        raw = {**copy.deepcopy(settings), "output_dir": str(folder)}
        for key, value in (changes or {}).items():
            section, name = key.split(".")
            raw[section][name] = value
        return train_here(raw, stop=stop, overwrite=overwrite)

    return run


@pytest.fixture(scope="module")
def finished(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run, which tests must not change."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    start(folder)
    return folder


@pytest.fixture(scope="module")
def stopped(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that stopped at step 7 of 20, with a checkpoint at 5; tests must not change it."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    start(folder, stop=7)
    return folder


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def series(folder: Path, key: str) -> list[float]:
    return [record[key] for record in read_records(folder) if key in record]


# ---- what a run writes


def test_golden_losses(finished: Path) -> None:
    assert series(finished, "loss") == pytest.approx(GOLDEN_LOSSES, rel=GOLDEN_TOLERANCE)


def test_metrics_are_complete(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "loss" in record]
    evaluated = [record for record in records if "eval_loss" in record]
    assert len(trained) + len(evaluated) == len(records) - 1
    alone = records[0]
    assert alone["step"] == 0
    assert alone["frozen_perplexity"] == pytest.approx(math.exp(alone["frozen_loss"]))
    assert [record["step"] for record in trained] == list(range(1, STEPS + 1))
    assert [record["step"] for record in evaluated] == [5, 10, 15, 20]
    for rows, fields in (([alone], ALONE_FIELDS), (trained, RECORD_FIELDS), (evaluated, EVAL_FIELDS)):
        for record in rows:
            assert {key: type(value) for key, value in record.items()} == fields
    for record in trained:
        assert record["grad_norm"] > 0
        assert record["tokens"] > record["supervised_tokens"] > 0
        assert record["step_seconds"] > 0
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["step_seconds"])
        split = record["phase_seconds"]
        assert list(split) == [*PHASES, "other"]
        assert sum(split.values()) == pytest.approx(record["step_seconds"], rel=1e-9)
        assert all(split[phase] > 0 for phase in split)
        assert record["peak_memory_bytes"] > 2**20
        assert record["network_bytes"] == record["skipped_steps"] == 0
        assert record["network"] == {}
    for record in evaluated:
        assert record["eval_perplexity"] == pytest.approx(math.exp(record["eval_loss"]))
    # An epoch is 22 rows in steps of 4: its six steps see every token once, as an evaluation does.
    assert sum(record["supervised_tokens"] for record in trained[:6]) == evaluated[0]["eval_supervised_tokens"]


def test_training_learns(finished: Path) -> None:
    losses = series(finished, "eval_loss")
    assert losses[-1] < losses[0] < series(finished, "loss")[0]


def test_windows_of_several_steps(start: Start, finished: Path, tmp_path: Path) -> None:
    start(tmp_path / "run", {"train.logging_steps": 3})
    windows = [record for record in read_records(tmp_path / "run") if "loss" in record]
    every = {record["step"]: record for record in read_records(finished) if "loss" in record}
    assert [record["step"] for record in windows] == [3, 6, 9, 12, 15, 18, 20]
    assert {record["step"]: record["loss"] for record in windows}.items() <= {
        (step, record["loss"]) for step, record in every.items()
    }
    for key in ("tokens", "supervised_tokens"):
        assert windows[0][key] == sum(every[step][key] for step in (1, 2, 3))
        assert windows[-1][key] == every[19][key] + every[20][key]


def test_a_warm_up_as_long_as_the_run_is_said(start: Start, tmp_path: Path) -> None:
    said = "never reaches 0.01"
    notes = start(tmp_path / "as-long", {"train.warmup_steps": 3, "train.max_steps": 3})
    assert [note for note in notes if said in note] == [
        "the warm-up takes 3 steps and the run has 3, so the learning rate never reaches 0.01; lower "
        "train.warmup_steps or train.warmup_ratio"
    ]
    assert not [
        note for note in start(tmp_path / "shorter", {"train.warmup_steps": 2, "train.max_steps": 3}) if said in note
    ]


def test_run_json_is_complete(finished: Path, backbone_dir: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    assert run.keys() >= {"command", "device", "started", "versions", "backbone_fingerprint"}
    assert run["status"] == "finished"
    assert run["world_size"] == 1
    assert run["trained_parameters"] == 4 * 64
    assert run["versions"].keys() >= {"ptd", "python", "torch", "transformers", "deepspeed"}
    sections = {"backbone", "method", "task", "data", "train", "deepspeed", "output_dir"}
    assert run["config"].keys() == sections
    assert run["config"]["backbone"]["path"] == str(backbone_dir)
    assert run["config"]["method"]["prefix_projection"] is False  # defaults are filled in
    assert run["config"]["train"]["adam_beta2"] == 0.999
    result = run["result"]
    assert result["steps"] == STEPS
    assert result["seconds"] > 0
    assert result["loss"] == series(finished, "loss")[-1]
    assert result["eval_loss"] == series(finished, "eval_loss")[-1]
    assert result["eval_perplexity"] == series(finished, "eval_perplexity")[-1]
    alone = read_records(finished)[0]
    assert {key: result[key] for key in result if key.startswith("frozen_")} == {
        key: value for key, value in alone.items() if key != "step"
    }
    assert "worse_than_frozen" not in result
    losses = series(finished, "eval_loss")
    assert result["best"]["loss"] == min(losses)
    assert result["best"]["step"] == 5 * (1 + losses.index(min(losses)))


def test_run_json_can_be_given_back(finished: Path) -> None:
    """The recorded configuration can be used as a run file."""
    recorded = json.loads((finished / "run.json").read_text())["config"]
    assert parse_config(recorded).to_dict() == recorded


def test_tensorboard_file_is_readable(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == (RECORD_FIELDS.keys() | EVAL_FIELDS.keys() | ALONE_FIELDS.keys()) - {
        "step",
        "network",
        "phase_seconds",
    }
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, STEPS + 1))
    assert [event.value for event in losses] == pytest.approx(series(finished, "loss"), rel=1e-6)  # stored in fp32
    assert [event.step for event in events.Scalars("eval_loss")] == [5, 10, 15, 20]
    assert [event.step for event in events.Scalars("frozen_loss")] == [0]


def test_loss_curve_is_a_picture(finished: Path) -> None:
    pixels = image.imread(finished / "loss.png")
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 500
    assert (
        len({tuple(pixel) for row in pixels[::4] for pixel in row[::4].tolist()}) > 3
    )  # curves are drawn, not an empty frame


def test_adapters(finished: Path) -> None:
    prompt = load_file(finished / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
    assert prompt.shape == (4, 64)
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "latest",
        "step-000015",
        "step-000020",
    ]
    state = load_file(finished / "checkpoints" / "step-000020" / "shard-00001-model-00001-of-00001.safetensors")
    units = state["encoder.units.origin"], state["encoder.units.unit"], state["encoder.embedding"]
    assert torch.addcmul(*units).equal(prompt)
    assert state["optimizer.step.encoder.embedding"] == STEPS


# ---- records that are not finite, or torn


def test_records_that_are_not_finite_are_valid_json(tmp_path: Path) -> None:
    records = Records(tmp_path, 0)
    records.write({"step": 1, "loss": 2.0})
    records.write({"step": 2, "loss": math.nan, "grad_norm": math.inf})
    records.write({"step": 3, "loss": 1.0})
    records.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1], parse_constant=refuse) == {"step": 2, "loss": None, "grad_norm": None}
    assert plot_loss(tmp_path) is not None


def test_torn_and_later_records_are_dropped_on_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    Records(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


# ---- which folders a run accepts


def test_finished_run_is_refused(start: Start, finished: Path) -> None:
    before = contents(finished)
    with pytest.raises(UserError, match="is finished; choose another output_dir, or --overwrite to redo it"):
        start(finished)
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("train.learning_rate", 0.02, "train.learning_rate: was 0.01, is now 0.02"),
        ("train.max_steps", 30, "train.max_steps: was 20, is now 30"),
        ("train.seed", 1, "train.seed: was 0, is now 1"),
        ("method.num_virtual_tokens", 5, "method.num_virtual_tokens: was 4, is now 5"),
        ("data.max_length", 32, "data.max_length: was 64, is now 32"),
        ("backbone.dtype", "float32", "backbone.dtype: was 'auto', is now 'float32'"),
    ],
)
def test_other_settings_are_refused_and_named(start: Start, stopped: Path, key: str, value: Any, named: str) -> None:
    before = contents(stopped)
    with pytest.raises(UserError, match="holds a run with other settings") as raised:
        start(stopped, {key: value})
    assert f"({named})" in str(raised.value)
    assert contents(stopped) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"train.logging_steps": 7},
        {"train.save_steps": 4, "train.eval_steps": 9, "train.save_total_limit": 1},
        {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 2},
        {"backbone.gradient_checkpointing": True},
        {"data.eval": None, "train.eval_steps": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_nothing_may_change(
    start: Start, stopped: Path, finished: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = copy_of(stopped, tmp_path)
    assert "continuing from step-000005" in start(folder, changes)
    # Different micro-batches and recomputed layers sum in a different order; Adam propagates the difference.
    assert series(folder, "loss")[-1] == pytest.approx(series(finished, "loss")[-1], rel=1e-5)


def test_batch_size_that_changes_the_rows_of_a_step_is_kept(
    start: Start, stopped: Path, finished: Path, tmp_path: Path
) -> None:
    folder = copy_of(stopped, tmp_path)
    notes = start(folder, {"train.per_device_train_batch_size": 3})
    kept = "keeping 4 rows per step on 1 ranks: per_device_train_batch_size=2, gradient_accumulation_steps=2"
    assert kept in notes
    assert series(folder, "tokens") == series(finished, "tokens")


def test_interrupted_run_continues_bit_for_bit(start: Start, stopped: Path, finished: Path, tmp_path: Path) -> None:
    folder = copy_of(stopped, tmp_path)
    notes = start(folder)
    assert notes[0] == "continuing from step-000005"
    for key in ("loss", "grad_norm", "lr", "eval_loss"):
        assert series(folder, key) == series(finished, key)
    weights = Path("adapter") / "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (finished / weights).read_bytes()


def test_run_that_ended_before_its_first_checkpoint_begins_again(start: Start, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start(folder, stop=3)
    assert "no checkpoint yet; starting from the beginning" in start(folder)
    assert series(folder, "loss") == series(finished, "loss")


def test_run_that_ended_behind_its_last_checkpoint_is_completed(start: Start, finished: Path, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path)
    shutil.rmtree(folder / "adapter")
    run = json.loads((folder / "run.json").read_text())
    del run["result"]
    (folder / "run.json").write_text(json.dumps({**run, "status": "running"}))
    assert "continuing from step-000020" in start(folder)
    assert series(folder, "loss") == series(finished, "loss")
    weights = Path("adapter") / "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (finished / weights).read_bytes()
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_overwrite_replaces_the_run_and_nothing_else(start: Start, finished: Path, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path)
    foreign = {"notes.txt": b"mine", "figures/loss.png": b"mine", "checkpoint.bak": b"mine", "adapter2/x": b"mine"}
    for name, content in foreign.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "best" / "stale").write_bytes(b"of the earlier run")
    notes = start(folder, {"train.learning_rate": 0.02, "train.max_steps": 4}, overwrite=True)
    assert not any("continuing" in note for note in notes)
    after = contents(folder)
    assert {name: after[name] for name in foreign} == foreign
    assert "best/stale" not in after
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-000004"]
    assert len(series(folder, "loss")) == 4
    assert len(list((folder / "tensorboard").iterdir())) == 1


def test_folder_with_foreign_files_only_can_be_used(start: Start, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    start(tmp_path, {"train.max_steps": 1})
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "adapter").is_dir()


@pytest.mark.parametrize("content", [None, "{", "[]", '{"status": "running"}', '{"status": "running", "config": 3}'])
def test_folder_without_a_readable_run_json_is_refused(start: Start, tmp_path: Path, content: str | None) -> None:
    (tmp_path / "adapter").mkdir()
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"no readable run\.json"):
        start(tmp_path)


def test_output_dir_that_is_a_file_is_refused(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; give a folder"):
        start(tmp_path / "file")


BAD: list[tuple[str, Any]] = [
    ("data.train", "nowhere.jsonl"),
    ("data.eval", "nowhere.jsonl"),
    ("backbone.path", "/nowhere/model"),
    ("method.num_virtual_tokens", 300),  # the context is 256
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_nothing_is_written_when_something_given_is_bad(start: Start, tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=key.split(".")[1]):
        start(tmp_path / "run", {key: value})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("key", "value"), BAD)
def test_overwrite_removes_nothing_when_something_given_is_bad(
    start: Start, finished: Path, key: str, value: Any
) -> None:
    before = contents(finished)
    with pytest.raises(UserError):
        start(finished, {key: value}, overwrite=True)
    assert contents(finished) == before


# ---- runs that end before training begins


class Killed(BaseException):
    """Stands for a SIGKILL: no code of the run catches it."""


@pytest.fixture
def at_loading(start: Start, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``at_loading(error, folder)`` starts a run that fails with ``error`` when it loads the backbone."""

    def run(error: BaseException, folder: Path, changes: Any = None, overwrite: bool = False) -> None:
        def fail(*arguments: Any, **named: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("ptd.runs.build.prepare", fail)
            with pytest.raises(type(error)):
                start(folder, changes, overwrite=overwrite)

    return run


def test_a_run_that_cannot_be_loaded_is_not_tried_for_ever(
    start: Start, at_loading: Callable[..., None], tmp_path: Path
) -> None:
    at_loading(torch.OutOfMemoryError("no room for the backbone"), tmp_path)
    at_loading(Killed(), tmp_path)
    first, second = json.loads((tmp_path / "run.json").read_text())["attempts"]
    assert (first["how"], first["from_step"], first["step"]) == ("failed", 0, 0)
    assert "no room for the backbone" in first["error"]
    assert "how" not in second
    with pytest.raises(UserError, match="failed twice before the first checkpoint"):
        start(tmp_path)
    start(tmp_path, {"backbone.dtype": "bfloat16", "train.max_steps": 1})  # fixed, and not refused as another run
    assert [attempt["how"] for attempt in json.loads((tmp_path / "run.json").read_text())["attempts"]] == ["finished"]


@pytest.mark.parametrize("error", [UserError("what is given cannot be"), KeyboardInterrupt()])
def test_what_a_person_ends_before_training_leaves_no_trace(
    at_loading: Callable[..., None], stopped: Path, tmp_path: Path, error: BaseException
) -> None:
    at_loading(error, tmp_path / "fresh" / "run")
    assert not (tmp_path / "fresh").exists()
    folder = copy_of(stopped, tmp_path)
    before = contents(folder)
    at_loading(error, folder)
    assert contents(folder) == before


def test_a_run_that_is_to_be_replaced_stays_until_its_follower_is_loaded(
    at_loading: Callable[..., None], stopped: Path, tmp_path: Path
) -> None:
    folder = copy_of(stopped, tmp_path)
    before = contents(folder)
    at_loading(Killed(), folder, {"train.seed": 1}, True)
    assert contents(folder) == before
