"""A run that began before prompts were trained in the backbone's units continues as it began.

``earlier_run`` is the state that ``ptd train run.yaml`` of ptd 0.1.0 at commit b7bf5a1, with the shipped backbone, left
after the checkpoint of step 3; ``expected.json`` holds the losses and learning rates of all six steps of the same run
at that commit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ptd.commands.train import train
from ptd.config import load_config
from ptd.quickstart import BACKBONE
from ptd.types import UserError

FIXTURE = Path(__file__).parent / "earlier_run"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    (tmp_path / "backbone").symlink_to(BACKBONE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_goes_on_as_it_began(folder):
    result = train(load_config("run.yaml"))
    want = json.loads((folder / "expected.json").read_text())
    got = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    got = [record for record in got if "loss" in record]
    assert [record["lr"] for record in got] == want["lr"]
    assert [record["loss"] for record in got] == pytest.approx(want["loss"], rel=1e-6)
    assert result["steps"] == 6
    facts = json.loads((folder / "out" / "checkpoints" / "step-000006" / "state.json").read_text())
    assert facts["units"] is False
    resolved = json.loads((folder / "out" / "run.json").read_text())["config"]
    assert (resolved["method"]["init"], resolved["train"]["learning_rate"]) == ("random", 0.01)


def test_another_start_than_it_had_is_refused(folder):
    with pytest.raises(UserError, match=r"holds a run with other settings \(method\.init: was 'random', is now 'zero'"):
        train(load_config("run.yaml", ["method.init=zero"]))


def test_to_begin_anew_is_to_begin_in_units(folder):
    train(load_config("run.yaml", ["train.max_steps=3"]), overwrite=True)
    facts = json.loads((folder / "out" / "checkpoints" / "step-000003" / "state.json").read_text())
    assert facts["units"] is True
    records = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    got = next(record for record in records if "loss" in record)
    assert got["loss"] < json.loads((folder / "expected.json").read_text())["loss"][0]
