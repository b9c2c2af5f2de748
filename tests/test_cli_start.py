"""``ptd init``, ``ptd ls`` and ``ptd cp``, which give a user the first files."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from ptd.commands.doctor import check_run
from ptd.commands.init import FILL_IN, STARTS, draft, kinds, suitable, usual_method
from ptd.config import RunConfig, TaskKind, load_config
from ptd.methods import TaskFacts, methods
from ptd.shipped import ROOT, shipped_files
from ptd.tasks import make_task
from ptd.types import UserError

PAIRS = [(name, kind) for kind in get_args(TaskKind) for name in suitable(kind)]


def test_every_pair_that_can_work_is_offered() -> None:
    """The pairs are exactly those that pass the method's own check with any of the task's starts."""
    for kind in get_args(TaskKind):
        for name, known in methods().items():
            fine = False
            for start in STARTS.get(kind, [{}]):
                section = {"name": name, **known.example}
                config = RunConfig.model_validate(
                    {"backbone": {"path": "x"}, "method": section, "task": {"kind": kind, **start}, "data": {}}
                )
                task = make_task(config.task, config.data, "encoder-decoder" if kind == "seq2seq_lm" else "decoder")
                facts = TaskFacts(kind, task.labels, task.cloze, task.output == "body", task.virtual_tokens)
                try:
                    known.check(config.method_config(), facts)
                except UserError:
                    continue
                fine = True
            assert ((name, kind) in PAIRS) is fine, (name, kind)


@pytest.mark.parametrize(("name", "kind"), PAIRS, ids=lambda value: value)
def test_the_file_loads_and_shows_the_defaults(ptd: Any, tmp_path: Path, name: str, kind: TaskKind) -> None:
    run = tmp_path / "run.yaml"
    outcome = ptd("init", run, "--method", name, "--task", kind, "--backbone", "folder", "--data", "rows.csv")
    assert outcome.code == 0, outcome.err
    assert outcome.out == ""
    assert f"written: {run} " in outcome.err
    assert f"ptd train {run}" in outcome.err
    config = load_config(run)
    assert (config.method_name, config.task.kind) == (name, kind)
    assert config.backbone.path == "folder"
    assert "rows.csv" in (config.data.train, config.data.eval)
    text = run.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120
    marked = [line for line in text.splitlines() if f"# {FILL_IN}:" in line]
    assert not [line for line in marked if "path:" in line or "rows.csv" in line]
    uncommented = re.sub(r"^( {0,2})# (\w+:)(?= )", r"\1\2", text.split(".\nbackbone:")[1], flags=re.M)
    (tmp_path / "all.yaml").write_text(f"backbone:{uncommented}", encoding="utf-8")
    assert load_config(tmp_path / "all.yaml").to_dict() == config.to_dict(), "what is commented out is what holds"
    given = yaml.safe_load((tmp_path / "all.yaml").read_text(encoding="utf-8"))
    for section in ("backbone", "data", "train"):
        left_out = set(RunConfig.model_fields[section].annotation.model_fields) - set(given[section])  # type: ignore[union-attr]
        assert left_out <= {"format", "prompt_template", "max_target_length"}


def test_the_new_file_only_wants_its_paths(ptd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = ptd("init", "--task", "classification", "--method", "head").err
    assert "written: run.yaml" in said
    assert f"{FILL_IN} (2)" in said
    failed = {check.name: check.found for check in check_run(Path("run.yaml"), []) if check.status == "failed"}
    assert set(failed) == {"data", "backbone"}
    assert "train.jsonl" in failed["data"]
    assert "./MODEL" in failed["backbone"]


def test_the_new_file_trains(ptd: Any, tmp_path: Path, backbone_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.csv").write_text("text,label\ngood,a\nbad,b\n", encoding="utf-8")
    options = ("--task", "classification", "--method", "prompt", "--backbone", backbone_dir, "--data", "mine.csv")
    assert ptd("init", *options).code == 0
    outcome = ptd("train", "run.yaml", "train.max_steps=1", "data.max_length=64")
    assert outcome.code == 0, outcome.err
    assert "ptd predict --adapter out" in outcome.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_it_asks_in_a_terminal(ptd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = list(kinds()).index("token_classification") + 1
    monkeypatch.setattr(sys, "stdin", Terminal(f"{number}\nprefx\nprefix\n"))
    outcome = ptd("init", tmp_path / "run.yaml")
    assert outcome.code == 0, outcome.err
    assert "'prefx' is not one of the options" in outcome.err
    assert "trained keys and values at every layer" in outcome.err
    assert "hard_prompt" not in outcome.err, "what does not suit the task is not offered"
    config = load_config(tmp_path / "run.yaml")
    assert (config.task.kind, config.method_name) == ("token_classification", "prefix")


def test_it_takes_what_is_usual_when_told_so(ptd: Any, tmp_path: Path) -> None:
    assert ptd("init", tmp_path / "run.yaml", "--yes", "--task", "question_answering").code == 0
    config = load_config(tmp_path / "run.yaml")
    assert config.method_name == usual_method("question_answering") == "p_tuning_v2"
    assert draft(config.method_name, "question_answering").trains


BAD = {
    "nobody to ask": ([], "give --task and --method, or --yes"),
    "one is missing": (["--task", "causal_lm"], "give --method, or --yes"),
    "no such task": (["--yes", "--task", "clasification"], "there is no kind of task 'clasification'"),
    "no such method": (["--task", "causal_lm", "--method", "prefx"], "available: hard_prompt, head"),
    "no pair": (["--task", "causal_lm", "--method", "head"], "trains a head on the last hidden states"),
    "no folder": (["nowhere/run.yaml", "--yes"], "give a file in an existing folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_init_refuses_with_advice(ptd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[case]
    outcome = ptd("init", *arguments, stdin="")
    assert outcome.code == 2
    assert message in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_without_force(ptd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command, path in ((("init", "--yes"), Path("run.yaml")), (("cp", "7b.yaml"), Path("7b.yaml"))):
        path.write_text("mine")
        refused = ptd(*command)
        assert refused.code == 2
        assert "--force" in refused.err
        assert path.read_text() == "mine"
        assert ptd(*command, "--force", "--quiet").err == ""
        assert load_config(path).method_name


def test_ls_shows_every_shipped_file(ptd: Any) -> None:
    shown = ptd("ls").out
    told = json.loads(ptd("ls", "--json").out)
    names = {path.name for folder in ("ds_configs", "launch") for path in (ROOT / folder).rglob("*.*")}
    assert {name for files in told.values() for name in files} == names - {"README.md", "template.sbatch.j2"}
    for files in told.values():
        assert len(set(files.values())) == len(files), "no two files say the same of themselves"
        for name, about in files.items():
            assert about
            assert re.search(rf"^  {re.escape(name)} +{re.escape(about)}$", shown, flags=re.M)
            assert len(about) <= 120


def test_cp_copies_to_a_file_or_into_a_folder(ptd: Any, tmp_path: Path) -> None:
    for file in shipped_files():
        outcome = ptd("cp", file.name, tmp_path)
        assert outcome.code == 0, outcome.err
        assert f"written: {tmp_path / file.name} " in outcome.err
        assert (tmp_path / file.name).read_bytes() == file.path.read_bytes()
    assert ptd("cp", "zero3.json", tmp_path / "mine.json").code == 0
    assert f"deepspeed={tmp_path / 'x.json'}" in ptd("cp", "zero3.json", tmp_path / "x.json").err
    for name, advice in (("causal_lm", "did you mean causal_lm.yaml?"), ("zzz", "ptd ls shows all")):
        outcome = ptd("cp", name, tmp_path)
        assert outcome.code == 2
        assert advice in outcome.err
    assert "give a file or an existing folder" in ptd("cp", "7b.yaml", tmp_path / "no" / "7b.yaml").err
