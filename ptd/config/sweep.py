"""Expand a run file into runs that are trained together: the combinations of a sweep, or its members."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from ptd.config.load import parse_config, read_run_file, set_key
from ptd.config.schema import RunConfig
from ptd.config.validation import repair_scientific
from ptd.errors import UserError

MEMBERS = "members"
COMMON = {
    "backbone": "all share one backbone in memory",
    "deepspeed": "all share one backbone in memory",
    "task": "all read the same output of the backbone and are compared by the same metric",
    "output_dir": "every run gets a folder of its own inside output_dir",
    "train.save_steps": "all runs are saved after the same steps, so that they continue together",
    "train.save_total_limit": "all runs are saved after the same steps, so that they continue together",
    "train.hang_timeout_minutes": "it belongs to the process, not to a run",
    "train.max_restarts": "it belongs to the process, not to a run",
    "train.metric_for_best_model": "all read the same output of the backbone and are compared by the same metric",
}
"""Sections and keys that cannot differ between runs that are trained together, with the reason."""


@dataclass(frozen=True)
class SweepCell:
    """A run that is trained together with others. ``changes``: key -> its value here; ``name``: that of its folder."""

    name: str
    changes: Mapping[str, Any]
    config: RunConfig


def parse_varied(pairs: Sequence[str]) -> dict[str, list[Any]]:
    """Parse ``KEY=VALUE,VALUE,…``; the values are YAML. Raises `UserError` for a key that cannot differ."""
    varied: dict[str, list[Any]] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign or not key or not text:
            raise UserError(
                f"--vary {pair}: write it as KEY=VALUE,VALUE,…, for example --vary train.learning_rate=1e-2,3e-2,1e-1"
            )
        if key in varied:
            raise UserError(f"--vary {key}: is given twice; give all its values at once")
        varied[key] = _values(key, text)
    for key in varied:
        check_differs(key, f"--vary {key}")
    return varied


def _values(key: str, text: str) -> list[Any]:
    try:
        values = yaml.safe_load(f"[{text}]")
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--vary {key}: {text!r} is not a list of YAML values: {error}") from error
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        raise UserError(f"--vary {key}: has the value {twice[0]!r} twice; remove one")
    return [repair_scientific(value) for value in values]


def sweep_cells(raw: dict[str, Any], varied: Mapping[str, Sequence[Any]], source: str) -> list[SweepCell]:
    """Return the runs of the sweep over ``raw``, a run file as plain values. Raises `UserError`."""
    short = _short_names(list(varied))
    chosen = []
    for values in product(*varied.values()):
        changes = dict(zip(varied, values, strict=True))
        chosen.append((",".join(f"{short[key]}={_shown(value)}" for key, value in changes.items()), changes))
    names = [name for name, _ in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"--vary: two runs would have the folder {twice[0]}; give values that differ when written")
    return [_cell(raw, name, changes, f"{source} with {name}", "--vary {}") for name, changes in chosen]


def member_cells(raw: dict[str, Any], source: str) -> list[SweepCell]:
    """Return the members of a run file, ``members: {NAME: {SECTION: {KEY: VALUE}}}``. Raises `UserError`."""
    base = {key: value for key, value in raw.items() if key != MEMBERS}
    given = raw[MEMBERS]
    if not isinstance(given, dict) or not given:
        raise UserError(f"{MEMBERS}: has to map names to changed keys, for example {MEMBERS}: {{anna: {{data: …}}}}")
    cells = []
    for name, changes in given.items():
        if _shown(name) != name:
            raise UserError(f"{MEMBERS}.{name}: is the name of a folder; use letters, digits and . _ + - only")
        found = {} if changes is None else _flat(changes, f"{MEMBERS}.{name}")
        for key in found:
            check_differs(key, f"{MEMBERS}.{name}.{key}")
        cells.append(_cell(base, name, found, f"{source}, {MEMBERS}.{name}", f"{MEMBERS}.{name}.{{}}"))
    return cells


def runs_of_file(path: str | Path, overrides: list[str] | None = None) -> list[SweepCell]:
    """Read RUN.yaml as ``ptd train`` does: return its members, or one run without a name. Raises `UserError`."""
    raw = read_run_file(path, overrides)
    if MEMBERS in raw:
        return member_cells(raw, str(path))
    return [SweepCell("", {}, parse_config(raw, source=str(path)))]


def check_differs(key: str, said: str) -> None:
    """Raise `UserError`, which begins with ``said``, if a key cannot differ between runs that are trained together."""
    reason = COMMON.get(key) or COMMON.get(key.split(".")[0])
    if reason is not None:
        raise UserError(f"{said}: cannot differ between runs that are trained together: {reason}")


def _cell(raw: dict[str, Any], name: str, changes: dict[str, Any], source: str, said: str) -> SweepCell:
    changed = copy.deepcopy(raw)
    for key, value in changes.items():
        set_key(changed, key, value, said=said.format(key))
    config = parse_config(changed, source=source)
    if config.train.on_divergence == "retry":
        raise UserError(
            "train.on_divergence: retry goes back to an earlier step, which runs that are trained together cannot do; "
            "set it to warn or stop"
        )
    limit = max(2, config.train.save_total_limit)  # a process may be killed between the saves of two runs
    train = config.train.model_copy(update={"save_total_limit": limit})
    update = {"output_dir": config.output_dir / name, "train": train}
    return SweepCell(name, changes, config.model_copy(update=update))


def _flat(changes: Any, said: str) -> dict[str, Any]:
    """Return dotted key -> value for sections of changes."""
    if not isinstance(changes, dict) or not all(isinstance(keys, dict) for keys in changes.values()):
        raise UserError(f"{said}: has to hold sections with keys, for example data: {{train: rows.jsonl}}")
    return {f"{section}.{key}": value for section, keys in changes.items() for key, value in keys.items()}


def _short_names(keys: list[str]) -> dict[str, str]:
    """Return key -> its last part, or the whole key if two keys have the same last part."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def _shown(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(letter if letter.isalnum() or letter in "._+-" else "_" for letter in text)[:60]
