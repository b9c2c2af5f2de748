"""The quickstart: its task, its backbone, and the result that the README promises, with the command that users run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ptd.quickstart import BACKBONE
from ptd.quickstart.names import is_held_out
from ptd.quickstart.task import make_rows, parse_prompt, render_completion, slot_accuracy


def test_the_shipped_backbone_is_small_and_says_how_it_was_made() -> None:
    files = [path for path in BACKBONE.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10e6
    card = (BACKBONE / "README.md").read_text(encoding="utf-8")
    assert "python tools/quickstart_backbone/pretrain.py" in card


def test_evaluation_names_are_new_to_the_backbone_and_to_the_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools" / "quickstart_backbone"))
    from corpus import collections

    train, held_out = make_rows()
    names = {parse_prompt(row["prompt"])["name"] for row in held_out}
    assert all(is_held_out(name) for name in names)
    assert not names & {parse_prompt(row["prompt"])["name"] for row in train}
    documents = collections(seed=3)
    corpus = " ".join(text for _ in range(300) for text, _ in next(documents))
    assert len(corpus) > 50_000
    assert not any(name in corpus for name in names)
    assert not re.search(r"\w+: [^|\n]+ \| \w+: ", corpus), "the format of the task's records"
    assert "If you want" not in corpus


def test_the_task_is_the_same_every_time_and_solvable_from_the_prompt() -> None:
    assert make_rows() == make_rows()
    assert make_rows(seed=1) != make_rows()
    for row in make_rows()[1]:
        assert render_completion(parse_prompt(row["prompt"])) == row["completion"]
        assert slot_accuracy(row["prompt"], row["completion"]) == 1
        assert slot_accuracy(row["prompt"], "") == 0


def test_slot_accuracy_notices_a_wrong_value() -> None:
    prompt = "name: Soro | food: Thai | family: no"
    assert slot_accuracy(prompt, "Soro serves Thai food and is not for children.") == 1
    assert slot_accuracy(prompt, "Soro serves Thai food and is good for children.") == pytest.approx(2 / 3)
    assert slot_accuracy(prompt, "Soron serves Danish food.") == 0


def test_quickstart_solves_the_task_on_two_sharded_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ptd.cli", "quickstart", "--output", str(tmp_path / "quickstart")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    rows = [line for line in done.stdout.splitlines() if "exact match" in line]
    before, after = (float(row.split("exact match")[1].split("%")[0]) for row in rows[-2:])
    assert before == 0
    perplexity = float(rows[-2].split("perplexity")[1])
    assert 125 < perplexity < 145, "the frozen backbone reads the prompts as the tuned one does"
    assert after >= 82
    run = tmp_path / "quickstart" / "run"
    description = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert description["status"] == "finished"
    assert description["world_size"] == 2
    assert description["result"]["eval_loss"] < 0.1
    assert (run / "adapter" / "adapter_model.safetensors").stat().st_size < 1e6
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
