"""Read RUN.yaml, ``key=value`` overrides and ``--set`` changes into configuration objects."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    ValidationError,
)

from ptd.config.schema import BackboneConfig, DataConfig, RunConfig, Section, TaskConfig
from ptd.config.validation import explained, repair_scientific
from ptd.errors import UserError
from ptd.files import read_text
from ptd.shipped import find_recipe

NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What PyYAML raises: `ValueError` for a date such as 2026-99-99, `RecursionError` for extremely deep nesting."""


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read RUN.yaml (or the shipped recipe of that name), apply ``a.b=value`` overrides (values are YAML) and validate.

    Raises `UserError` with one line per mistake.
    """
    return parse_config(read_run_file(path, overrides), source=str(path))


def read_run_file(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Return the plain values of RUN.yaml (or the shipped recipe of that name) with the overrides applied."""
    text = read_text(find_recipe(path), "cannot read the run file")
    try:
        raw = yaml.safe_load(text)
    except NOT_YAML as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(
            f"{path} has to be a mapping with the sections backbone, method, data …; got {type(raw).__name__}"
        )
    for override in overrides or []:
        _apply_override(raw, override)
    return raw


LARGEST, DEEPEST = 100_000, 50
"""Maximum number of values in a run file, and of levels of nesting: far more than any run needs."""


def _check_size(raw: Any, source: str) -> None:
    """Raise `UserError` for a file too large to validate: YAML aliases can repeat values, and include themselves."""
    rest, seen = [(raw, 0)], 0
    while rest:
        value, depth = rest.pop()
        inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
        rest += [(each, depth + 1) for each in inner]
        seen += 1
        if seen + len(rest) > LARGEST or depth > DEEPEST:
            raise UserError(
                f"{source}: has more than {LARGEST:,} values, or values more than {DEEPEST} levels deep, including the "
                "values that aliases repeat; no run needs so many, so write the file without nested aliases"
            )


def parse_config(raw: dict[str, Any], *, source: str = "the configuration") -> RunConfig:
    """Validate a plain mapping into a `RunConfig`; raises `UserError`."""
    _check_size(raw, source)
    if "members" in raw:
        raise UserError(
            f"{source}: members: only ptd train, under any launcher, reads several members; for this command, "
            "write a run file of one of them"
        )
    try:
        config = RunConfig.model_validate(repair_scientific(raw))
    except ValidationError as error:
        raise UserError(f"{source}: " + "\n".join(explained(error, RunConfig))) from error
    config.method_config()
    return config


NOT_SETTABLE = {
    "backbone.path": "cannot be set here; give the backbone as --backbone",
    "backbone.revision": "is the revision that the adapter was trained on; for another, give a folder as --backbone",
    "backbone.gradient_checkpointing": "has no effect because this command does not train; remove it",
    "backbone.compile": "has no effect because this command does not train; remove it",
    "data.train": "has no effect because this command does not train; remove it",
    "data.train_split": "has no effect because this command does not train; remove it",
    "data.max_tokens": "has no effect because batches have --batch-size rows here; remove it",
    "data.cache": "has no effect because this command tokenises its rows in memory; remove it",
    "data.cache_gb": "has no effect because this command tokenises its rows in memory; remove it",
    "data.eval": "cannot be set here; give the rows as --data",
}
"""Keys that `parse_settings` refuses, with the reason."""


def parse_settings(pairs: list[str]) -> dict[str, dict[str, Any]]:
    """Parse ``SECTION.KEY=VALUE`` pairs of the sections backbone and data, for verbs that do not train.

    The values are YAML; `backbone_config` and `data_config` check them. Raises `UserError` for any other key and names
    the nearest valid one.
    """
    sections: dict[str, type[Section]] = {"backbone": BackboneConfig, "data": DataConfig}
    names = {key: section for section, model in sections.items() for key in model.model_fields}
    known = [key for name, section in names.items() if (key := f"{section}.{name}") not in NOT_SETTABLE]
    settings: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        given, sign, _ = pair.partition("=")
        key = ".".join(given.split(".")[:2])  # further parts are inside the value, as in data.columns.text
        if not sign or not given:
            raise UserError(f"--set {pair}: write it as SECTION.KEY=VALUE, e.g. backbone.dtype=bfloat16")
        if key in NOT_SETTABLE:
            raise UserError(f"--set {key}: {NOT_SETTABLE[key]}")
        if key not in known:
            near = difflib.get_close_matches(key.rpartition(".")[2], names, n=1, cutoff=0.6)
            meant = f"did you mean {names[near[0]]}.{near[0]}?" if near else f"valid keys: {', '.join(sorted(known))}"
            raise UserError(f"--set {key}: unknown key; {meant}")
        _apply_override(settings, pair)
    return settings


def backbone_config(settings: dict[str, Any]) -> BackboneConfig:
    """Validate a ``backbone`` section on its own; raises `UserError`."""
    try:
        return BackboneConfig.model_validate(repair_scientific(settings))
    except ValidationError as error:
        raise UserError("\n".join(explained(error, BackboneConfig, prefix="backbone"))) from error


def data_config(settings: dict[str, Any]) -> DataConfig:
    """Validate a ``data`` section on its own; raises `UserError`."""
    try:
        return DataConfig.model_validate(settings)
    except ValidationError as error:
        raise UserError("\n".join(explained(error, DataConfig, prefix="data"))) from error


def task_config(settings: dict[str, Any]) -> TaskConfig:
    """Validate a ``task`` section on its own; raises `UserError`."""
    try:
        return TaskConfig.model_validate(settings)
    except ValidationError as error:
        raise UserError("\n".join(explained(error, TaskConfig))) from error


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise UserError(f"override {override!r}: write it as key=value, e.g. train.learning_rate=3e-3")
    try:
        read = yaml.safe_load(value)
    except NOT_YAML as error:
        raise UserError(f"override {override!r}: the value is not valid YAML: {error}") from error
    set_key(raw, key, read, said=f"override {override!r}")


def set_key(raw: dict[str, Any], key: str, value: Any, *, said: str) -> None:
    """Set ``a.b.c`` in a run file's plain values, in place. Raises `UserError`, which begins with ``said``."""
    node = raw
    *parents, last = key.split(".")
    for index, name in enumerate(parents):
        if node.get(name) is None:  # missing, or a section whose keys are all commented out
            node[name] = {}
        child = node[name]
        if not isinstance(child, dict):
            raise UserError(f"{said}: {'.'.join(parents[: index + 1])} is not a section")
        node = child
    node[last] = value
