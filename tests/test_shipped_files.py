"""Files that users copy or read agree with the code: run files, keys, methods, tasks, the map of all files."""

from __future__ import annotations

import dataclasses
import re
import runpy
from pathlib import Path
from typing import get_args

import pytest

from ptd.cli import COMMANDS
from ptd.config import RunConfig, TaskKind, load_config
from ptd.config.deepspeed import apply_deepspeed
from ptd.methods import TaskFacts, method
from ptd.shipped import RECIPES, find_recipe
from ptd.tasks import make_task
from ptd.types import Architecture

ROOT = Path(__file__).parents[1]
RUN_FILES = sorted([*ROOT.glob("launch/**/*.yaml"), *ROOT.glob("ptd/**/*.yaml")])


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_shipped_run_file(path: Path) -> None:
    config, _ = apply_deepspeed(load_config(path))
    assert config.data.train
    assert path.read_text(encoding="utf-8").startswith("#")
    assert re.search(r"ptd (train|launch)", path.read_text(encoding="utf-8").split("backbone:")[0])


ARCHITECTURE: dict[str, Architecture] = {"causal_lm": "decoder", "seq2seq_lm": "encoder-decoder"}


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_method_and_task_suit_each_other(path: Path) -> None:
    """The method accepts the task, as far as that can be checked without a backbone."""
    config = load_config(path)
    kind = config.task.kind
    task = make_task(config.task, config.data, ARCHITECTURE.get(kind, "encoder"))
    facts = TaskFacts(kind, task.labels, task.cloze, task.output == "body", task.virtual_tokens)
    method(config.method_name).check(config.method_config(), facts)


def test_every_kind_of_task_has_a_run_file() -> None:
    assert {load_config(path).task.kind for path in RUN_FILES} == set(get_args(TaskKind))
    listed = (ROOT / "launch" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in ROOT.glob("launch/recipes/*") if f"`recipes/{path.name}`" not in listed] == []


def test_a_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe is found from any folder; a user's file takes precedence, a path in a user's folder stays as given."""
    monkeypatch.chdir(tmp_path)
    assert find_recipe("7b.yaml") == find_recipe("launch/recipes/7b.yaml") == RECIPES / "7b.yaml"
    for mine in ("mine/7b.yaml", "8b.yaml"):
        assert find_recipe(mine) == Path(mine)
    Path("7b.yaml").touch()
    assert find_recipe("7b.yaml") == Path("7b.yaml")


def headings(name: str) -> str:
    lines = (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()
    return " ".join(line for line in lines if line.startswith("## "))


def shown_methods() -> list[str]:
    """Return the methods in docs/configuration.md; a new method is missing until `make docs` writes the page."""
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    shown: list[str] = runpy.run_path(str(ROOT / "docs" / "configuration.py"))["methods_of"](page)
    assert len(shown) >= 6
    return shown


def test_every_method_and_task_is_explained() -> None:
    assert [name for name in shown_methods() if f"## {name} " not in headings("methods.md") + " "] == []
    assert [kind for kind in get_args(TaskKind) if f" {kind} " not in headings("tasks.md") + " "] == []


def test_the_map_is_current() -> None:
    """A file that is new since `make docs` wrote the page may be missing; nothing on the page may be wrong."""
    script = runpy.run_path(str(ROOT / "docs" / "map.py"))
    lines = re.findall(r"^\| `([\w.]+)` +\| (.*) \|$", (ROOT / "docs" / "map.md").read_text("utf-8"), flags=re.M)
    assert len(lines) > 150
    assert set(lines) <= set(re.findall(r"^\| `([\w.]+)` +\| (.*) \|$", script["page"](), flags=re.M))


def test_every_file_that_is_linked_exists() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    keys = {"deepspeed", "output_dir"}
    for section in ("backbone", "task", "data", "train"):
        keys |= {f"{section}.{key}" for key in RunConfig.model_fields[section].annotation.model_fields}
    for name in shown_methods():
        keys |= {f"method.{field.name}" for field in dataclasses.fields(method(name).config)}
    assert {key for key in keys if f"| `{key}` |" not in text} == set()


def test_every_command_is_documented() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `ptd (\w+)", text, flags=re.M)
    assert set(listed) == {*COMMANDS, "launch"}
