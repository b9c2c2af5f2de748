"""Shell completion of run files, keys and their values, and shipped files. Nothing here imports torch."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from ptd.files import as_path

METHODS = Path(__file__).parents[1] / "methods"


def run_files(incomplete: str) -> list[str]:
    """Return candidates for ``RUN.yaml``: YAML files and folders in the folder typed so far, and shipped recipes."""
    from ptd.shipped import RECIPES

    there = as_path(incomplete if incomplete.endswith("/") else os.path.dirname(incomplete) or ".")
    found = [f"{path.name}/" if path.is_dir() else path.name for path in _listed(there)]
    prefix = incomplete[: incomplete.rfind("/") + 1]
    mine = [prefix + name for name in found if name.endswith(("/", ".yaml", ".yml"))]
    return [*mine, *(path.name for path in sorted(RECIPES.glob("*.yaml")))]


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def overrides(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return candidates for ``section.key=`` of a run file, or for the value after the equals sign.

    Bash splits ``key=val`` at the equals sign. There the incomplete word is only ``val``, so only values are returned.
    """
    before = list(ctx.params.get("overrides") or ())
    if _at_sign() and before:
        return _values().get(before[-1], [])
    if before[-1:] == ["="] and len(before) > 1:
        return _values().get(before[-2], [])
    key, sign, _ = incomplete.partition("=")
    if sign:
        return [f"{key}={value}" for value in _values().get(key, [])]
    return _assignments(incomplete, _values())


def settings(incomplete: str) -> list[str]:
    """Return the same candidates for ``--set``, which accepts only keys of the sections ``backbone`` and ``data``."""
    from ptd.config import NOT_SETTABLE

    known = {
        key: values
        for key, values in _values().items()
        if key.startswith(("backbone.", "data.")) and key not in NOT_SETTABLE
    }
    key, sign, _ = incomplete.partition("=")
    return [f"{key}={value}" for value in known.get(key, [])] if sign else _assignments(incomplete, known)


def _assignments(incomplete: str, values: dict[str, list[str]]) -> list[str]:
    """Return ``key=`` for each key that begins with ``incomplete``; for a single key, also its values.

    Bash and zsh append a space if there is only one candidate, but the value has to follow without a space. A single
    key without known values therefore gets ``…`` as a second candidate.
    """
    found = [key for key in values if key.startswith(incomplete)]
    if len(found) != 1:
        return [f"{key}=" for key in found]
    key = found[0]
    shown = values[key] or (["…"] if _completes_for("bash", "zsh") else [])
    return [f"{key}=", *(f"{key}={value}" for value in shown)]


def _completes_for(*shells: str) -> bool:
    asked = {value for name, value in os.environ.items() if name.endswith("_COMPLETE")}
    return not asked.isdisjoint(f"complete_{shell}" for shell in shells)


def _at_sign() -> bool:
    """Return whether the incomplete word is the equals sign, which bash passes as a separate word and typer drops."""
    words, place = os.environ.get("COMP_WORDS", "").split("\n"), int(os.environ.get("COMP_CWORD", 0))
    return _completes_for("bash") and place < len(words) and words[place] == "="


def shipped_names() -> list[tuple[str, str]]:
    """Return the file names that ``ptd cp`` accepts, each with its description."""
    from ptd.shipped import shipped_files

    return [(file.name, file.about) for file in shipped_files()]


def method_names() -> list[str]:
    """Return the names of all methods."""
    return sorted(_methods())


def task_kinds() -> list[str]:
    """Return the kinds of tasks."""
    from ptd.config import TaskKind

    return list(get_args(TaskKind))


@cache
def _values() -> dict[str, list[str]]:
    """Return the candidates for the value of each key: its choices, or else its default."""
    from ptd.config import RunConfig, Section

    found: dict[str, list[str]] = {}
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            for key, inner in section.model_fields.items():
                default = [] if inner.is_required() else [inner.get_default(call_default_factory=True)]
                found[f"{name}.{key}"] = _choices(inner.annotation) or _shown(default)
    found["deepspeed"] = _deepspeed_files()
    found["output_dir"] = []
    found["method.name"] = method_names()
    for keys in _methods().values():
        for key, values in keys.items():
            found.setdefault(f"method.{key}", values)
    return found


def _deepspeed_files() -> list[str]:
    from ptd.shipped import DS_CONFIGS

    return [path.name for path in sorted(DS_CONFIGS.glob("*.json"))]


def _choices(annotation: Any) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    options = [annotation, *get_args(annotation)]
    values = [value for option in options if get_origin(option) is Literal for value in get_args(option)]
    return [str(value).lower() if isinstance(value, bool) else str(value) for value in values]


def _shown(values: Iterable[Any]) -> list[str]:
    return [str(value) for value in values if isinstance(value, (int, float, str))]


@cache
def _methods() -> dict[str, dict[str, list[str]]]:
    """Return method name → key → values, parsed from the source of the methods; importing it would import torch."""
    return {name: keys for path in sorted(METHODS.glob("*.py")) for name, keys in _registered(path)}


def _registered(path: Path) -> Iterator[tuple[str, dict[str, list[str]]]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        for call in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "register":
                config = next(each.value for each in call.keywords if each.arg == "config")
                yield ast.literal_eval(call.args[0]), dict(_fields(classes[ast.unparse(config)]))


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, list[str]]]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            yield line.target.id, _allowed(line)


def _allowed(line: ast.AnnAssign) -> list[str]:
    annotation = line.annotation
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        return [str(value) for value in ast.literal_eval(annotation.slice)]
    if ast.unparse(annotation) == "bool":
        return ["true", "false"]
    default = line.value.args[0] if isinstance(line.value, ast.Call) and line.value.args else line.value
    return _shown([default.value] if isinstance(default, ast.Constant) else [])
