"""Bad settings are refused before the backbone is loaded, and what was trained is kept whatever fails afterwards."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer
from reporting import Notes
from safetensors.torch import load_file

from ptd.checkpoint import files
from ptd.commands import doctor
from ptd.commands.train import train
from ptd.config import parse_config
from ptd.distributed import preflight
from ptd.methods import Method, methods
from ptd.types import UserError
from ptd.values import decimal_size

STEPS = 4
ROWS = [{"prompt": f"{number} is ", "completion": "ab" * (1 + number % 3)} for number in range(8)]
OTHERS = [{"prompt": f"{number} was ", "completion": "b"} for number in range(4)]
LABELLED = [{"text": f"t{number}", "label": "xy"[number % 2]} for number in range(6)]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture
def run(tmp_path: Path, backbone_dir: Path) -> Callable[..., dict[str, Any]]:
    """``run(train={…}, data={…})`` returns a run file with these changes."""

    def make(**changes: Any) -> dict[str, Any]:
        raw: dict[str, Any] = {
            "backbone": {"path": str(backbone_dir)},
            "method": {"name": "prefix", "num_virtual_tokens": 4},
            "data": {
                "train": write_rows(tmp_path / "train.jsonl", ROWS),
                "eval": write_rows(tmp_path / "eval.jsonl", OTHERS),
                "max_length": 64,
            },
            "train": {"max_steps": STEPS, "per_device_train_batch_size": 2, "report_to": []},
            "output_dir": str(tmp_path / "out"),
        }
        for section, values in changes.items():
            raw[section] = {**raw.get(section, {}), **values} if isinstance(values, dict) else values
        return raw

    return make


# ---- before the backbone is loaded


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "metric of another task": (
        {"train": {"metric_for_best_model": "accuracy"}},
        "train.metric_for_best_model: an evaluation of this task has no 'accuracy'; known metrics: loss, perplexity",
    ),
    "misspelt metric": (
        {"train": {"metric_for_best_model": "eval_perplexty"}},
        "has no 'perplexty'; did you mean perplexity? Known metrics: loss, perplexity",
    ),
    "no metric but a count": ({"train": {"metric_for_best_model": "supervised_tokens"}}, "has no 'supervised_tokens'"),
    "eval_steps without rows": (
        {"train": {"eval_steps": 2}, "data": {"eval": None}},
        "train.eval_steps: has no effect without rows to evaluate on; set data.eval, or remove it",
    ),
    "metric without rows": (
        {"train": {"metric_for_best_model": "eval_loss"}, "data": {"eval": None}},
        "train.metric_for_best_model: has no effect without rows",
    ),
    "eval batch without rows": (
        {"train": {"per_device_eval_batch_size": 2}, "data": {"eval": None}},
        "train.per_device_eval_batch_size: has no effect without rows",
    ),
    "eval split without rows": (
        {"data": {"eval": None, "eval_split": "test"}},
        "data.eval_split: has no effect without rows",
    ),
    "no such evaluation rows": ({"data": {"eval": "./nowhere.jsonl"}}, "data.eval: there is no file or folder"),
    "text that is not there": (
        {"method": {"name": "prompt", "init": "text", "init_text_file": "./nowhere.txt"}},
        "method.init_text_file: cannot read nowhere.txt: No such file or directory",
    ),
    "no such attention": ({"backbone": {"attention": "magic"}}, "backbone.attention: there is no backend 'magic'"),
    "rows longer than the context": (
        {"data": {"max_length": 300}},
        "data.max_length=300 exceeds the backbone's context of 256 tokens; set data.max_length to at most 256",
    ),
    "column for two fields": (
        {"data": {"columns": {"prompt": "a", "completion": "a"}}},
        "data.columns: 'a' is given for two fields",
    ),
    "output below a file": ({"output_dir": "/dev/null/out"}, "output_dir: /dev/null is a file; give a folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_backbone(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str) -> None:
    monkeypatch.setattr("ptd.runs.build.prepare", None)  # any attempt to load the backbone fails differently
    changes, said = REFUSED[case]
    with pytest.raises(UserError) as caught:
        train(parse_config(run(**changes)))
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def labelled(run: Any, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    data = {
        "train": write_rows(tmp_path / "labelled.jsonl", LABELLED),
        "eval": write_rows(tmp_path / "held_out.jsonl", LABELLED[:2]),
    }
    return run(**{"task": {"kind": "classification"}, "data": data, **changes})


def test_labels_are_looked_at_before_the_backbone(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ptd.runs.build.prepare", None)

    def refusal(**changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            train(parse_config(labelled(run, tmp_path, **changes)))
        return str(caught.value)

    (tmp_path / "other.jsonl").write_text('{"text": "a", "label": "z"}\n')
    data = {"train": str(tmp_path / "labelled.jsonl"), "eval": str(tmp_path / "other.jsonl")}
    assert "other.jsonl has the label 'z', but the labels are x, y" in refusal(data=data)
    said = refusal(method={"name": "prompt", "num_virtual_tokens": 1, "init": "labels"})
    assert "num_virtual_tokens=1 is fewer than the task's 2 labels" in said
    assert "has no 'f1'; did you mean macro_f1?" in refusal(train={"metric_for_best_model": "f1"})


def test_the_metric_may_be_called_as_the_trainer_calls_it(run: Any, tmp_path: Path) -> None:
    result = train(parse_config(labelled(run, tmp_path, train={"metric_for_best_model": "eval_macro_f1"})))
    assert result["best"]["macro_f1"] == result["eval_macro_f1"]
    assert (tmp_path / "out" / "best" / "ptd.json").is_file()


METRICS = {
    "causal_lm": (ROWS, {}),
    "classification": (LABELLED, {}),
    "token_classification": ([{"tokens": ["a", "b"], "tags": ["O", "B-X"]}], {}),
    "question_answering": ([{"question": "q", "context": "a b", "answers": "b"}], {}),
}


@pytest.mark.parametrize("kind", METRICS)
def test_a_task_knows_its_metrics_beforehand(run: Any, tmp_path: Path, kind: str) -> None:
    rows, _ = METRICS[kind]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    config = run(task={"kind": kind}, data={"train": source, "eval": source}, train={"max_steps": 1})
    found = {key.removeprefix("eval_") for key in train(parse_config(config)) if key.startswith("eval_")}
    with pytest.raises(UserError) as caught:
        train(parse_config({**config, "train": {**config["train"], "metric_for_best_model": "none"}}), overwrite=True)
    told = str(caught.value).partition("nown metrics: ")[2].split(", ")
    assert set(told) == found - {"rows", "supervised_tokens"}


# ---- ids that the backbone has no embedding for


@pytest.fixture
def with_tokens(tmp_path: Path) -> Callable[..., Path]:
    """``with_tokens("<tool>")`` saves a backbone with 261 embedding rows and adds these tokens to its tokenizer."""

    def make(*tokens: str, pad: str | None = None) -> Path:
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(list(tokens))
        if pad is not None:
            tokenizer.add_special_tokens({"pad_token": pad})
        tiny_model().save_pretrained(tmp_path / "backbone")
        tokenizer.save_pretrained(tmp_path / "backbone")
        return tmp_path / "backbone"

    return make


def checks(file: Path, config: dict[str, Any]) -> dict[str, doctor.Check]:
    file.write_text(json.dumps(config))
    return {check.name: check for check in doctor.check_run(file, [])}


def test_a_padding_token_beyond_the_embedding(run: Any, with_tokens: Any, tmp_path: Path) -> None:
    config = run(backbone={"path": str(with_tokens(pad="[PAD]"))})
    said = "the tokenizer's padding token '[PAD]' has the id 261, but the backbone's embedding has 261 rows"
    with pytest.raises(UserError) as caught:
        train(parse_config(config))
    assert said in str(caught.value)
    assert checks(tmp_path / "run.yaml", config)["backbone"].found == f"backbone.path: {said}"


def test_a_token_of_a_row_beyond_the_embedding(run: Any, with_tokens: Any, tmp_path: Path, ptd: Any) -> None:
    path = str(with_tokens("<tool>"))
    rows = [*ROWS, {"prompt": "a <tool> b", "completion": "c"}]
    config = run(backbone={"path": path}, data={"train": write_rows(tmp_path / "tools.jsonl", rows)})
    said = "tools.jsonl has the token '<tool>' with the id 261, but the backbone's embedding has 261 rows"
    with pytest.raises(UserError, match=f"row 9 of .*{said}"):
        train(parse_config(config))
    found = checks(tmp_path / "run.yaml", config)
    assert found["tokenizer"].status == "warning"
    assert found["tokenizer"].found == "the tokens <tool> are beyond the 261 embedding rows"
    assert said in found["rows"].found
    # Rows without the token can be used; prompts with the token cannot.
    assert checks(tmp_path / "run.yaml", run(backbone={"path": path}))["rows"].status == "ok"
    outcome = ptd("generate", "--backbone", path, "a <tool>")
    assert outcome.code == 2
    assert "row 1 of the prompts has the token '<tool>' with the id 261" in outcome.err
    outcome = ptd("eval", "--backbone", path, "--data", tmp_path / "tools.jsonl")
    assert (outcome.code, "row 9 of" in outcome.err) == (2, True)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_text_to_start_from_beyond_the_embedding(run: Any, with_tokens: Any, name: str) -> None:
    method = {"name": name, "num_virtual_tokens": 2, "init": "text", "init_text": "<tool> and more"}
    with pytest.raises(UserError, match=r"method.init: the text has the token '<tool>' with the id 261"):
        train(parse_config(run(backbone={"path": str(with_tokens("<tool>"))}, method=method)))


def test_a_label_word_beyond_the_embedding(run: Any, with_tokens: Any, tmp_path: Path) -> None:
    task = {"kind": "classification", "patterns": ["{text} {mask}"], "verbalizer": {"x": ["<tool>"], "y": ["b"]}}
    config = labelled(run, tmp_path, task=task, backbone={"path": str(with_tokens("<tool>"))})
    with pytest.raises(UserError, match=r"task.verbalizer: a word has the token '<tool>' with the id 261"):
        train(parse_config(config))


def test_a_resized_embedding_has_them(run: Any, tmp_path: Path) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model()
    tokenizer.add_tokens(["<tool>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    tokenizer.save_pretrained(tmp_path / "resized")
    rows = write_rows(tmp_path / "tools.jsonl", [{"prompt": "a <tool>", "completion": "c"}] * 2)
    result = train(parse_config(run(backbone={"path": str(tmp_path / "resized")}, data={"train": rows})))
    assert result["steps"] == STEPS


# ---- failures after training


def fail(error: Exception) -> Callable[..., Any]:
    def call(*given: Any, **also: Any) -> Any:
        if isinstance(given[-1], dict) and given[-1].get("step") == 0:  # the record of the frozen backbone
            return
        raise error

    return call


FULL = OSError(errno.ENOSPC, "No space left on device")
BUG = RuntimeError("boom")
# What fails -> the patched function, its error, the error that `train` raises (`UserError`, exit code 2, if the user
# can fix the cause), the train section, and the step of the saved adapter.
FAILURES: dict[str, tuple[str, Exception, type[Exception], dict[str, Any], int]] = {
    "last evaluation": ("ptd.engine.loop.Loop.evaluate", BUG, RuntimeError, {}, STEPS),
    "an evaluation on the way": ("ptd.engine.loop.Loop.evaluate", BUG, RuntimeError, {"eval_steps": 1}, 1),
    "best adapter": ("ptd.runs.artifacts.Artifacts.keep_best", UserError("no"), UserError, {}, STEPS),
    "last record": ("ptd.runs.metrics_log.Records.write", UserError("no"), UserError, {"logging_steps": 9}, STEPS),
    "last checkpoint": ("ptd.checkpoint.saver._write_part", FULL, UserError, {}, STEPS),
    "run.json": ("ptd.runs.run_json.Journal.end", UserError("no"), UserError, {}, STEPS),
}


@pytest.fixture
def whole(run: Any, tmp_path: Path) -> dict[int, torch.Tensor]:
    """Return the trained prompt after steps 1 and `STEPS` of an undisturbed run, by step."""
    found = {}
    for last in (1, STEPS):
        config = {**run(train={"lr_scheduler_type": "constant"}), "output_dir": str(tmp_path / f"whole{last}")}
        config["train"]["max_steps"] = last
        train(parse_config(config))
        found[last] = load_file(tmp_path / f"whole{last}" / "adapter" / "adapter_model.safetensors")
    return {last: tensors["prompt_embeddings"] for last, tensors in found.items()}


@pytest.mark.parametrize("case", FAILURES)
def test_what_was_trained_is_kept(
    run: Any, whole: dict[int, torch.Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    target, error, raised, settings, step = FAILURES[case]
    config = parse_config(run(train={"lr_scheduler_type": "constant", **settings}))
    notes = Notes()
    with monkeypatch.context() as patch:
        patch.setattr(target, fail(error))
        with pytest.raises(raised) as caught:
            train(config, reporter=notes)
    adapter = tmp_path / "out" / "adapter"
    assert torch.equal(load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"], whole[step])
    said = "\n".join(notes.lines) + str(caught.value)
    assert f"the adapter after step {step} is in {adapter}" in said
    # The same command completes the run, with the same result.
    train(config)
    assert torch.equal(load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"], whole[STEPS])
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "finished"


def test_samples_that_cannot_be_written(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The adapter is written before the samples, with the result of its evaluation."""
    from ptd.runs.samples_log import write_samples

    def full(folder: Path, step: int, samples: Any) -> None:
        if step:
            raise FULL
        write_samples(folder, step, samples)

    monkeypatch.setattr("ptd.runs.sampler.write_samples", full)
    with pytest.raises(UserError, match=rf"No space left on device.*after step {STEPS} is in"):
        train(parse_config(run(train={"samples": 1})))
    facts = json.loads((tmp_path / "out" / "adapter" / "ptd.json").read_text())
    assert facts["training"]["evaluation"]["step"] == STEPS


def test_the_adapter_before_a_run_that_diverges_is_kept(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ten consecutive steps with a NaN loss end a run; what the steps before them trained is saved."""
    from ptd.engine.loop import Loop
    from ptd.engine.member import MAX_SKIPPED

    take_step = Loop.take_step

    def diverging(loop: Loop, index: int, *given: Any) -> Any:
        if index >= 2:
            monkeypatch.setattr(loop.members[0].step.readout, "forward", lambda run, batch, scores: nothing(batch))
        return take_step(loop, index, *given)

    def nothing(batch: Any) -> Any:
        from ptd.readouts import Reading

        return Reading(torch.tensor(float("nan"), requires_grad=True), float(len(batch.rows)))

    monkeypatch.setattr(Loop, "take_step", diverging)
    with pytest.raises(UserError, match=rf"{MAX_SKIPPED} steps in a row.*The trained parameters are saved"):
        train(parse_config(run(train={"max_steps": 40})))
    flat = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
    assert flat.isfinite().all()


def test_one_run_in_a_folder_at_a_time(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    config = parse_config(run())
    (tmp_path / "out").mkdir()
    other = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match=r"output_dir: another process is training into .*out"):
        train(config)
    assert list((tmp_path / "out").iterdir()) == []
    os.close(other)
    train(config)
    os.close(files.claim(tmp_path / "out") or 0)  # the run has released it


# ---- rows that are in both files


def test_rows_that_are_trained_on_and_evaluated_on(run: Any, tmp_path: Path) -> None:
    def said(rows: list[dict[str, Any]]) -> str:
        notes = Notes()
        train(parse_config(run(data={"eval": write_rows(tmp_path / "e.jsonl", rows)})), reporter=notes, overwrite=True)
        return "\n".join(notes.lines)

    assert "in data.train too" not in said(OTHERS)
    assert "data.eval: 3 of its 7 rows are in data.train too" in said([*OTHERS, ROWS[0], ROWS[0], ROWS[5]])


# ---- other commands that write


def test_outputs_are_looked_at_before_the_work(
    ptd: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = labelled(run, tmp_path)
    train(parse_config(config))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    common = ("--adapter", "out", "--data", "labelled.jsonl", "--quiet")
    outcome = ptd("predict", *common, "--output", "missing/deep/o.jsonl")
    assert outcome.code == 0, outcome.err
    written = [json.loads(line) for line in (tmp_path / "missing/deep/o.jsonl").read_text().splitlines()]
    assert [row["text"] for row in written] == [row["text"] for row in LABELLED]
    monkeypatch.setattr("ptd.runs.tuned.prepare", None)
    monkeypatch.setattr("ptd.commands.export.prepare", None)
    for command in (
        ("predict", *common, "--output", "file/o.jsonl"),
        ("predict", *common, "--output", "missing"),
        ("inspect", "out", "--data", "labelled.jsonl", "--output", "file/x"),
        ("export", "out", "file/x"),
        ("import", "out", "file/x"),
        ("predict", "--adapter", "out", "--data", "nowhere.jsonl"),
        ("eval", "--adapter", "out", "--data", "labelled.jsonl", "--generate"),
        ("generate", "--adapter", "out", "a"),
    ):
        outcome = ptd(*command)
        assert outcome.code == 2, (command, outcome)
        assert outcome.err.startswith("ptd: error: ")


def test_a_number_that_is_not_finite_comes_back_as_null(ptd: Any, run: Any, tmp_path: Path) -> None:
    train(parse_config(labelled(run, tmp_path)))
    (tmp_path / "odd.jsonl").write_text('{"text": "a", "n": 1e999, "m": [1e999]}\n')
    outcome = ptd("predict", "--adapter", tmp_path / "out", "--data", tmp_path / "odd.jsonl", "--quiet")
    row = json.loads(outcome.out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert (row["n"], row["m"]) == (None, [None])


# ---- doctor


@pytest.mark.parametrize("init", ["vocabulary", "labels", "text", "random"])
def test_doctor_knows_no_method(run: Any, tmp_path: Path, init: str) -> None:
    text = {"init_text": "a text of words"} if init == "text" else {}
    config = labelled(run, tmp_path, method={"name": "prompt", "num_virtual_tokens": 3, "init": init, **text})
    # 3 virtual tokens of 32 numbers, and a linear head of 32 weights and a bias for each of two labels.
    needed = decimal_size(preflight.bytes_to_write(3 * 32 + 2 * 33, 3 * 32 + 2 * 33, 2, 8))
    found = checks(tmp_path / "run.yaml", config)
    assert {check.status for check in found.values()} == {"ok"}
    assert f"{needed} needed" in found["disk space"].found


def test_doctor_with_a_method_whose_start_has_other_choices(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """doctor asks the method for settings of the same size; it used to set init: random, unknown to this method."""
    from dataclasses import dataclass

    from ptd import methods as registry

    @dataclass
    class Config:
        num_virtual_tokens: int = 3
        init: str = "normal"

        def __post_init__(self) -> None:
            if self.init not in ("normal", "orthogonal"):
                raise UserError(f"method.init: got {self.init}")

    plain = methods()["prompt"]

    def build(config: Config, shape: Any, conditioner: Any, facts: Any) -> Any:
        return plain.construct(plain.config(config.num_virtual_tokens, "random"), shape, conditioner, facts)

    known = Method("other", Config, build, plain.head, lambda config, facts: None, has_prompt=True)
    monkeypatch.setitem(registry._METHODS, "other", known)
    config = run(method={"name": "other", "init": "orthogonal"})
    del config["method"]["num_virtual_tokens"]
    assert checks(tmp_path / "run.yaml", config)["disk space"].status == "ok"
