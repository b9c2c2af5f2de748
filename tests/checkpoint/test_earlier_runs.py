"""Runs and adapters that earlier versions wrote resume and load.

``run_before_units``: what ptd 0.1.0 at commit b7bf5a1 left of ``ptd train run.yaml`` after the checkpoint of step 3,
over the shipped backbone. Prompts were not yet trained in units of the backbone. ``run_before_rooms``: the same at
commit 9971318, before the modules moved to their present packages, and ``adapter``, the adapter of the finished run. In
each, ``expected.json`` has the losses and learning rates of all six steps of an uninterrupted run at that commit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ptd.commands.evaluate import evaluate
from ptd.commands.train import train
from ptd.config import load_config
from ptd.quickstart import BACKBONE
from ptd.types import UserError


@pytest.fixture
def folder(request, tmp_path, monkeypatch):
    """A copy of the fixture that the test names, as the working directory."""
    shutil.copytree(Path(__file__).parent / request.param, tmp_path, dirs_exist_ok=True)
    (tmp_path / "backbone").symlink_to(BACKBONE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


before_units = pytest.mark.parametrize("folder", ["run_before_units"], indirect=True)
before_rooms = pytest.mark.parametrize("folder", ["run_before_rooms"], indirect=True)


def resumed(folder):
    """Train the remaining steps; return the records of `metrics.jsonl`, after comparing losses and learning rates."""
    assert train(load_config("run.yaml"))["steps"] == 6
    want = json.loads((folder / "expected.json").read_text())
    records = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["lr"] for record in steps] == want["lr"]
    assert [record["loss"] for record in steps] == pytest.approx(want["loss"], rel=1e-6)
    attempts = json.loads((folder / "out" / "run.json").read_text())["attempts"]
    assert [attempt["from_step"] for attempt in attempts] == [0, 3]
    return records


@before_rooms
def test_a_run_from_before_the_rooms_resumes(folder):
    evaluations = [record["eval_loss"] for record in resumed(folder) if "eval_loss" in record]
    assert evaluations == pytest.approx(json.loads((folder / "expected.json").read_text())["eval_loss"], rel=1e-6)


@before_rooms
def test_an_adapter_from_before_the_rooms_loads(folder):
    want = json.loads((folder / "expected.json").read_text())["eval_loss"][-1]
    assert evaluate("train.jsonl", adapter="adapter")["loss"] == pytest.approx(want, rel=1e-6)


@before_units
def test_a_run_from_before_units_continues_without_them(folder):
    resumed(folder)
    facts = json.loads((folder / "out" / "checkpoints" / "step-000006" / "state.json").read_text())
    assert facts["units"] is False
    resolved = json.loads((folder / "out" / "run.json").read_text())["config"]
    assert (resolved["method"]["init"], resolved["train"]["learning_rate"]) == ("random", 0.01)


@before_units
def test_a_different_init_is_refused(folder):
    with pytest.raises(UserError, match=r"holds a run with other settings \(method\.init: was 'random', is now 'zero'"):
        train(load_config("run.yaml", ["method.init=zero"]))


@before_units
def test_overwriting_such_a_run_trains_in_units(folder):
    train(load_config("run.yaml", ["train.max_steps=3"]), overwrite=True)
    facts = json.loads((folder / "out" / "checkpoints" / "step-000003" / "state.json").read_text())
    assert facts["units"] is True
    records = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    got = next(record for record in records if "loss" in record)
    assert got["loss"] < json.loads((folder / "expected.json").read_text())["loss"][0]
