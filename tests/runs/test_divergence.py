"""Runs that diverge or stop improving, and the frozen backbone's loss, in real runs on the shipped backbone.

At an absurd learning rate, a prefix with an MLP diverges in its second step and does not recover.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from reporting import Notes, Stopped
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptd.commands.train import train
from ptd.config import parse_config
from ptd.errors import DIVERGED, DONE, USAGE
from ptd.quickstart import BACKBONE
from ptd.quickstart.task import write_task
from ptd.report import report
from ptd.runs.artifacts import MOST_RETRIES
from ptd.runs.metrics_log import read_records
from ptd.types import UserError

MLP = {"name": "prefix", "num_virtual_tokens": 32, "prefix_projection": True, "encoder_hidden_size": 256}
DIRECT = {"name": "prefix", "num_virtual_tokens": 8}
TRAIN = {
    "max_steps": 10,
    "per_device_train_batch_size": 4,
    "learning_rate": 1000.0,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": [],
}
HELD_OUT = 16


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with training rows in ``train.jsonl`` and held-out rows in ``few.jsonl``."""
    folder = tmp_path_factory.mktemp("rows")
    _, held_out = write_task(folder)
    few = held_out.read_text(encoding="utf-8").splitlines(keepends=True)[:HELD_OUT]
    (folder / "few.jsonl").write_text("".join(few), encoding="utf-8")
    return folder


Raw = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def raw(rows: Path) -> Raw:
    """Return a function that makes a run file: ``raw(output_dir, method, learning_rate=1)``."""

    def make(out: Path, method: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
        return {
            "backbone": {"path": str(BACKBONE), "dtype": "float32"},
            "method": method or MLP,
            "data": {
                "train": str(rows / "train.jsonl"),
                "eval": str(rows / "few.jsonl"),
                "prompt_template": "{prompt}\n",
                "max_length": 128,
            },
            "train": {**TRAIN, **settings},
            "output_dir": str(out),
        }

    return make


def run_json(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run.json").read_text()))


def series(folder: Path, key: str) -> dict[int, float]:
    return {record["step"]: record[key] for record in read_records(folder) if key in record}


# ---- the frozen backbone


@pytest.fixture(scope="module")
def warned(raw: Raw, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Train a run that diverges and continues; return its folder and its messages."""
    folder, notes = tmp_path_factory.mktemp("warned") / "run", Notes()
    train(parse_config(raw(folder)), reporter=notes)
    return folder, notes.lines


def test_the_backbone_alone_is_that_of_transformers(warned: tuple[Path, list[str]], rows: Path) -> None:
    """The loss of the frozen backbone on the held-out rows equals one computed by hand with transformers."""
    model = AutoModelForCausalLM.from_pretrained(BACKBONE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    total, count = 0.0, 0
    for line in (rows / "few.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"] + "\n")["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * len(answer)
        count += len(answer)
    folder, notes = warned
    alone = read_records(folder)[0]
    assert (alone["step"], alone["frozen_supervised_tokens"]) == (0, count)
    assert alone["frozen_loss"] == pytest.approx(total / count, rel=1e-5)
    assert alone["frozen_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    said = next(line for line in notes if line.startswith("the frozen backbone, without a prompt: "))
    assert f"held-out loss {alone['frozen_loss']:.4f}" in said
    assert f"training loss {alone['frozen_train_loss']:.4f}" in said


# ---- warn


def test_a_run_that_diverges_says_so_once_and_goes_on(warned: tuple[Path, list[str]]) -> None:
    folder, notes = warned
    run = run_json(folder)
    told = [line for line in notes if "the run diverges" in line]
    assert len(told) == 1
    assert told[0].startswith(f"step {run['diverged']['step']}: the run diverges: ")
    assert "lower train.learning_rate (now 1.0e+03), for example to a third: 3.3e+02" in told[0]
    assert run["status"] == "finished"
    assert len(series(folder, "loss")) == TRAIN["max_steps"]
    losses, found = series(folder, "loss"), run["diverged"]
    assert found.keys() == {"step", "loss", "frozen_loss", "reason", "learning_rate"}
    assert found["step"] <= 8
    assert found["loss"] == pytest.approx(sum(losses[found["step"] - place] for place in range(5)) / 5)
    assert found["frozen_loss"] == read_records(folder)[0]["frozen_train_loss"]
    assert found["learning_rate"] == 1000.0
    assert "retries" not in run
    result = run["result"]
    assert result["worse_than_frozen"] is True
    assert result["eval_loss"] > result["frozen_loss"]
    assert result["diverged_at"] == found["step"]


def test_the_report_of_a_diverged_run(warned: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = warned
    found = report([folder], tmp_path / "page.html")["runs"][0]
    page, run = (tmp_path / "page.html").read_text(), run_json(folder)
    assert (
        f"The run diverged in step {run['diverged']['step']}, with learning rate 1e+03: {run['diverged']['reason']}."
        in page
    )
    assert "is worse than that of the frozen backbone" in page
    assert "held-out loss, frozen backbone (nats)" in page
    assert (found["frozen_loss"], found["diverged"]) == (run["result"]["frozen_loss"], run["diverged"])


# ---- the command line


@pytest.fixture
def run_file(raw: Raw, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw(tmp_path / "out")), encoding="utf-8")
    return path


def test_a_run_that_is_to_stop_ends_with_a_code_of_its_own(ptd: Any, run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = ptd("train", run_file, "train.on_divergence=stop", "train.save_steps=2")
    assert ended.code == DIVERGED
    assert ended.out == ""
    message = ended.err.splitlines()[-1]
    assert message.startswith("ptd: error: the run diverged in step ")
    assert "lower train.learning_rate (now 1.0e+03)" in message
    assert "Traceback" not in ended.err
    run = run_json(out)
    step = run["diverged"]["step"]
    assert (run["status"], run["result"]["steps"]) == ("diverged", step)
    assert (run["attempts"][-1]["how"], run["attempts"][-1]["step"]) == ("diverged", step)
    assert list(series(out, "loss")) == list(range(1, step + 1))
    assert load_file(out / "adapter" / "adapter_model.safetensors")["prompt_embeddings"].isfinite().all()
    assert "The run diverged in step" in (out / "report.html").read_text()

    again = ptd("train", run_file, "train.on_divergence=stop", "train.save_steps=2")
    assert again.code == USAGE
    assert f"diverged in step {step} with train.learning_rate 1e+03, and would diverge again; lower" in again.err
    assert "--overwrite" in again.err
    assert run_json(out) == run
    all_the_same = ptd("train", run_file, "train.on_divergence=warn", "train.save_steps=2")
    assert all_the_same.code == DONE, all_the_same.err
    assert f"continuing from step-{(step - 1) // 2 * 2:06d}" in all_the_same.err
    assert list(series(out, "loss")) == list(range(1, TRAIN["max_steps"] + 1))


def test_the_end_of_a_run_that_is_worse_than_the_backbone_alone(ptd: Any, run_file: Path) -> None:
    ended = ptd("train", run_file)
    assert ended.code == DONE, ended.err
    result = json.loads(ended.out)
    alone, tuned = f"{result['frozen_loss']:.4f}", f"{result['eval_loss']:.4f}"
    assert (
        f"result:  held-out loss: frozen backbone {alone} → tuned {tuned}, worse than the frozen backbone\n"
        in ended.err
    )
    assert f"diverged in step {result['diverged_at']}: train.learning_rate is too high\n" in ended.err
    then = ended.err.split("next:    ")[1]
    assert "ptd generate" not in then
    assert "lower train.learning_rate (now 1.0e+03)" in then


# ---- retry


WARMED_UP = {
    # The learning rate rises by 1/3 per step: the run learns for eight steps and has lost the gain by step 20.
    "learning_rate": 20.0,
    "lr_scheduler_type": "linear",
    "warmup_steps": 60,
    "max_steps": 24,
    "save_steps": 4,
    "on_divergence": "retry",
}


@pytest.fixture(scope="module")
def retried(raw: Raw, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder, notes = tmp_path_factory.mktemp("retried") / "run", Notes()
    train(parse_config(raw(folder, DIRECT, **WARMED_UP)), reporter=notes)
    return folder, notes.lines


def test_a_run_goes_back_to_where_it_was_good_with_a_lower_rate(retried: tuple[Path, list[str]]) -> None:
    folder, notes = retried
    run = run_json(folder)
    assert run["status"] == "finished"
    assert run["retries"] == [{"at_step": 20, "from_step": 8, "learning_rate": pytest.approx(20 / 3)}]
    assert "diverged" not in run
    said = "step 20: the run diverges: the training loss of steps 11 to 20, "
    told = [line for line in notes if line.startswith(said)]
    assert len(told) == 1
    assert told[0].endswith("going back to the checkpoint of step 8 with train.learning_rate 6.7e+00 (retry 1 of 3)")
    records = read_records(folder)
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 25)), "each step once"
    rates = {step: 20.0 * (step - 1) / 60 / (1 if step <= 8 else 3) for step in range(1, 25)}
    assert series(folder, "lr") == pytest.approx(rates)
    assert run["result"]["eval_loss"] < run["result"]["frozen_loss"]
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert kept[-2:] == ["step-000020", "step-000024"]
    facts = json.loads((folder / "checkpoints" / "step-000024" / "state.json").read_text())
    assert facts["retries"] == run["retries"]
    assert "continued from step 8 with learning rate 6.67" in (folder / "report.html").read_text()


def test_a_run_that_is_interrupted_behind_a_retry_goes_on_as_it_would_have(
    raw: Raw, retried: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """A run stopped before and after the first checkpoint at the lower learning rate ends like an undisturbed one."""
    config = parse_config(raw(tmp_path / "run", DIRECT, **WARMED_UP))

    class Later(Notes):
        """Stop in step 11 when the run reaches it for the second time."""

        def advance(self, task: str, done: int, line: str | None = None) -> None:
            if (task, done) == ("train", 11) and any("retry 1" in said for said in self.lines):
                raise Stopped

    first, second, last = Later(), Notes(18), Notes()
    for reporter in (first, second):
        with pytest.raises(Stopped):
            train(config, reporter=reporter)
    train(config, reporter=last)
    assert "continuing from step-000008" in second.lines
    assert "continuing from step-000016" in last.lines
    folder, _ = retried
    for key in ("loss", "lr", "grad_norm", "eval_loss", "frozen_loss"):
        assert series(tmp_path / "run", key) == series(folder, key)
    weights = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (folder / weights).read_bytes()
    assert run_json(tmp_path / "run")["retries"] == run_json(folder)["retries"]


def test_a_run_that_diverges_whatever_the_rate_ends(raw: Raw, tmp_path: Path) -> None:
    notes = Notes()
    settings = raw(tmp_path / "run", learning_rate=3e4, on_divergence="retry", logging_steps=50)
    with pytest.raises(UserError, match=r"the run diverged in step \d+, after 3 retries with lower") as error:
        train(parse_config(settings), reporter=notes)
    assert error.value.exit_code == DIVERGED
    run = run_json(tmp_path / "run")
    assert run["status"] == "diverged"
    assert [retry["from_step"] for retry in run["retries"]] == [0] * MOST_RETRIES
    assert [retry["learning_rate"] for retry in run["retries"]] == pytest.approx([1e4, 1e4 / 3, 1e4 / 9])
    assert run["diverged"]["learning_rate"] == pytest.approx(1e4 / 9)
    (last,) = series(tmp_path / "run", "lr")
    assert last >= run["diverged"]["step"], "the last step has a record"
    assert sum("going back to the start" in line for line in notes.lines) == MOST_RETRIES
    assert series(tmp_path / "run", "frozen_train_loss").keys() == {0}
    with pytest.raises(UserError, match="and would diverge again"):
        train(parse_config(settings))


def test_a_retry_from_the_start_begins_with_the_same_values(raw: Raw, tmp_path: Path) -> None:
    """The first loss of each attempt is that of the initial values, whatever Adam changed in the attempt before."""
    seen: list[float] = []

    class First(Notes):
        def advance(self, task: str, done: int, line: str | None = None) -> None:
            if task == "train" and done == 1 and line is not None and line.startswith("loss"):
                seen.append(float(line.split()[1]))

    train(
        parse_config(raw(tmp_path / "run", on_divergence="retry", max_steps=9, learning_rate=300.0)), reporter=First()
    )
    assert len(seen) >= 2
    assert len(set(seen)) == 1
    once = raw(tmp_path / "once", max_steps=9, learning_rate=run_json(tmp_path / "run")["retries"][-1]["learning_rate"])
    train(parse_config(once))
    assert series(tmp_path / "run", "loss") == series(tmp_path / "once", "loss"), "as a run with that rate alone"


# ---- early stopping


def still(raw: Raw, folder: Path, **settings: Any) -> dict[str, Any]:
    """Return a run file with a learning rate so small that no evaluation differs from the first."""
    return raw(folder, DIRECT, **{"learning_rate": 1e-30, "eval_steps": 2, "early_stopping_patience": 2, **settings})


def test_a_run_ends_when_its_evaluations_do_not_get_better(raw: Raw, tmp_path: Path) -> None:
    notes = Notes()
    result = train(parse_config(still(raw, tmp_path / "run")), reporter=notes)
    assert (result["steps"], result["stopped_early"], result["best"]["step"]) == (6, 6, 2)
    assert list(series(tmp_path / "run", "eval_loss")) == [2, 4, 6]
    run = run_json(tmp_path / "run")
    assert (run["status"], run["result"]["stopped_early"]) == ("finished", 6)
    assert any("train.early_stopping_patience" in line for line in notes.lines)
    with pytest.raises(UserError, match="is finished"):
        train(parse_config(still(raw, tmp_path / "run")))


def test_the_patience_of_a_run_that_is_continued_is_not_new(raw: Raw, tmp_path: Path) -> None:
    settings = still(raw, tmp_path / "run", save_steps=5)
    with pytest.raises(Stopped):
        train(parse_config(settings), reporter=Notes(6))
    result = train(parse_config(settings))
    assert (result["steps"], result["stopped_early"], result["best"]["step"]) == (6, 6, 2)


def test_a_better_evaluation_is_waited_for_anew(raw: Raw, tmp_path: Path) -> None:
    """A run with a learning rate at which it improves never stops early."""
    result = train(parse_config(still(raw, tmp_path / "run", learning_rate=0.5, max_steps=8)))
    assert result["steps"] == 8
    assert "stopped_early" not in result


def test_early_stopping_needs_evaluations(raw: Raw, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.early_stopping_patience: counts evaluations"):
        parse_config(still(raw, tmp_path, eval_steps=None))
    without = still(raw, tmp_path, eval_steps=None)
    del without["data"]["eval"]
    with pytest.raises(UserError, match=r"train\.early_stopping_patience: has no effect without rows"):
        parse_config(without)
