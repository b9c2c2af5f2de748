"""``ptd init``: write a commented RUN.yaml for a method and a task, from the descriptions of the configuration keys."""

from __future__ import annotations

import dataclasses
import importlib
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import yaml

from ptd.backbone import architecture_of
from ptd.config import (
    KEYS_OF_KINDS,
    BackboneConfig,
    DataConfig,
    RunConfig,
    Section,
    TaskConfig,
    TaskKind,
    TrainConfig,
    fields_of,
    load_config,
    parse_config,
)
from ptd.methods import Method, TaskFacts, method, methods
from ptd.shipped import RECIPES
from ptd.tasks import make_task
from ptd.types import Architecture, UserError

FILL_IN = "FILL IN"
"""Marks the values that the user has to give."""
MODEL, TRAIN, EVAL = "./MODEL", "train.jsonl", "eval.jsonl"
WIDTH, COLUMN = 118, 38
SECTIONS: dict[str, type[Section]] = {
    "backbone": BackboneConfig,
    "task": TaskConfig,
    "data": DataConfig,
    "train": TrainConfig,
}
ARCHITECTURES: dict[TaskKind, Architecture] = {"causal_lm": "decoder", "seq2seq_lm": "encoder-decoder"}
"""The usual architecture of the backbone for a task; for tasks that are not listed, an encoder."""
BY_WORDS = {"patterns": ["{text} It was {mask}."], "verbalizer": {"positive": ["great"], "negative": ["terrible"]}}
STARTS: dict[TaskKind, list[dict[str, Any]]] = {"classification": [{}, BY_WORDS]}
"""The keys that a task may set in addition to its kind. `draft` takes the first entry that the method accepts."""


@dataclasses.dataclass(frozen=True)
class Draft:
    """A method for a task: the sections ``method`` and ``task`` of a new run file."""

    method: Method
    kind: TaskKind
    task: dict[str, Any]
    trains: bool


def kinds() -> dict[TaskKind, str]:
    """Return every kind of task with the summary of its module."""
    return {kind: _opening(importlib.import_module(f"ptd.tasks.{kind}").__doc__ or "") for kind in get_args(TaskKind)}


def suitable(kind: TaskKind) -> dict[str, str]:
    """Return the methods that suit a kind of task, with the summaries of their modules."""
    found = {}
    for name, known in sorted(methods().items()):
        try:
            draft(name, kind)
        except UserError:
            continue
        found[name] = re.sub(r" \([^()]*https?:[^()]*\)", "", known.about).rstrip(".:")
    return found


def usual_method(kind: TaskKind) -> str:
    """Return the method of the first shipped recipe for the task."""
    return load_config(sorted(RECIPES.glob(f"{kind}*.yaml"))[0]).method_name


def kind_of(name: str) -> TaskKind:
    """Return ``name`` as a kind of task; raises `UserError` if it is not one."""
    for kind in get_args(TaskKind):
        if kind == name:
            return cast(TaskKind, kind)
    raise UserError(f"--task: there is no kind of task {name!r}; known: {', '.join(get_args(TaskKind))}")


def draft(name: str, kind: TaskKind, backbone: str | None = None) -> Draft:
    """Return the sections that ``method.name`` and ``task.kind`` need; raises `UserError` if they do not fit together.

    ``backbone``: the folder with the architecture; without a folder, the task's usual architecture is assumed.
    """
    chosen = method(name)
    architecture = ARCHITECTURES.get(kind, "encoder")
    if backbone is not None and Path(backbone).is_dir():
        architecture = architecture_of(BackboneConfig(path=backbone))
    refusals: list[UserError] = []
    for start in STARTS.get(kind, [{}]):
        task = {"kind": kind, **start}
        config = parse_config(
            {"backbone": {"path": MODEL}, "method": {"name": name, **chosen.example}, "task": task, "data": {}}
        )
        try:
            made = make_task(config.task, config.data, architecture)
            facts = TaskFacts(kind, made.labels, made.cloze, made.output == "body", made.virtual_tokens)
            chosen.check(config.method_config(), facts)
        except UserError as error:
            refusals.append(error)
            continue
        return Draft(chosen, kind, task, chosen.has_prompt or facts.trained_head)
    raise refusals[0]


def render_run_file(found: Draft, name: Path, *, backbone: str | None = None, data: str | None = None) -> str:
    """Return the text of the run file: the keys that are set, and every other key with its default, commented out.

    ``name``: path of the file, for the commands in its first lines. ``data``: the rows to train on (or, if the method
    trains nothing, to evaluate on).
    """
    rows = "train" if found.trains else "eval"
    source = data or (TRAIN if found.trains else EVAL)
    values: dict[str, dict[str, Any]] = {
        "backbone": {"path": backbone or MODEL},
        "task": found.task,
        "data": {rows: source},
        "train": {},
    }
    missing = {f"task.{key}" for key in found.task if key != "kind"}
    missing |= set() if backbone else {"backbone.path"}
    missing |= set() if data else {f"data.{rows}"}
    fields = ", ".join(fields_of(found.kind, "prompt_completion"))
    notes = {"data.columns": f"the fields here are {fields}"}
    lines = [
        f"# {found.method.about}",
        f"# task.kind {found.kind}: {kinds()[found.kind]}",
        f"#   ptd doctor {name}",
        f"#   ptd train {name}",
        f"# Replace the values marked {FILL_IN}. Lines that are commented out show the defaults.",
        *_section("backbone", SECTIONS["backbone"], values["backbone"], missing, notes, found.kind),
        *_method(found),
    ]
    for section in ("task", "data", "train"):
        lines += _section(section, SECTIONS[section], values[section], missing, notes, found.kind)
    for key in ("deepspeed", "output_dir"):
        field = RunConfig.model_fields[key]
        lines += _line(key, _plain(field.default), key == "output_dir", _said(field), indent="")
    return "\n".join(lines) + "\n"


def _section(
    section: str,
    model: type[Section],
    values: Mapping[str, Any],
    missing: set[str],
    notes: Mapping[str, str],
    kind: str,
) -> Iterator[str]:
    yield f"{section}:"
    for key, field in model.model_fields.items():
        path = f"{section}.{key}"
        if kind not in KEYS_OF_KINDS.get(section, {}).get(key, (kind,)):
            continue
        about = _said(field) + (f"; {notes[path]}" if path in notes else "")
        default = field.get_default(call_default_factory=True)
        said = f"{FILL_IN}: {about}" if path in missing else about
        yield from _line(key, _plain(values.get(key, default)), key in values, said)


def _method(found: Draft) -> Iterator[str]:
    yield "method:"
    yield from _line("name", found.method.name, True, "")
    hints, defaults = get_type_hints(found.method.config), found.method.config()
    for field in dataclasses.fields(found.method.config):
        default = getattr(defaults, field.name)
        said = with_choices(field.metadata["description"], hints[field.name])
        value = found.method.example.get(field.name, default)
        yield from _line(field.name, _plain(value), field.name in found.method.example, said)


def _said(field: Any) -> str:
    return with_choices(field.description or "", field.annotation)


def with_choices(said: str, annotation: Any) -> str:
    """Return a key's description ``said`` (Markdown), preceded by the key's choices unless ``said`` names them all."""
    found = get_args(annotation) if get_origin(annotation) is Literal else ()
    choices = [str(choice).lower() if isinstance(choice, bool) else choice for choice in found]  # as YAML writes them
    unsaid = [choice for choice in choices if not re.search(rf"\b{choice}\b", said)]
    return f"{', '.join(f'`{choice}`' for choice in choices)}; {said}" if unsaid else said


def in_plain_words(said: str) -> str:
    """Return Markdown as plain text, without backticks. A link becomes its text; a link in parentheses is dropped."""
    without = re.sub(r" \(\[[^\]]*\]\([^)]*\)\)", "", said)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", without).replace("`", "")


def _line(key: str, value: Any, given: bool, said: str, *, indent: str = "  ") -> list[str]:
    """Return the lines of a key with its description as a comment; the key is commented out unless ``given``."""
    shown = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False)
    text = f"{indent}{'' if given else '# '}{key}: {shown.removesuffix('...' + chr(10)).strip()}"
    comments = textwrap.wrap(in_plain_words(said), WIDTH - COLUMN, break_on_hyphens=False)
    first, rest = ([], comments) if len(text) >= COLUMN else (comments[:1], comments[1:])
    beside = [f"{text:<{COLUMN}}# {line}" for line in first] or [text]
    return beside + [f"{'':<{COLUMN}}# {line}" for line in rest]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _opening(text: str) -> str:
    """Return the first sentence of a module's docstring, without the name at its beginning."""
    line = text.partition("\n")[0].partition(". ")[0]
    return re.sub(r"^``[^`]*``: ", "", line).replace("`", "").rstrip(".")
