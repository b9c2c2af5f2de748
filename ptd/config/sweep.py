"""Expand a run into the runs of a sweep: every combination of the values of the varied keys."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import yaml

from ptd.config.load import parse_config, set_key
from ptd.config.schema import RunConfig
from ptd.config.validation import repair_scientific
from ptd.errors import UserError

COMMON = {
    "backbone": "all runs of a sweep share one backbone in memory",
    "deepspeed": "all runs of a sweep share one backbone in memory",
    "task": "all runs of a sweep are compared by the same metric",
    "output_dir": "every run gets a folder of its own inside output_dir",
    "train.save_steps": "all runs are saved after the same steps, so that they continue together",
    "train.save_total_limit": "all runs are saved after the same steps, so that they continue together",
    "train.hang_timeout_minutes": "it belongs to the process, not to a run",
    "train.max_restarts": "it belongs to the process, not to a run",
    "train.metric_for_best_model": "all runs of a sweep are compared by the same metric",
}
"""Sections and keys that cannot differ between the runs of a sweep, with the reason."""


@dataclass(frozen=True)
class SweepCell:
    """A run of a sweep. ``changes``: varied key -> its value here; ``name``: the same in short, a folder's name."""

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
        section = key.split(".")[0]
        reason = COMMON.get(key) or COMMON.get(section)
        if reason is not None:
            raise UserError(f"--vary {key}: cannot differ between the runs of a sweep: {reason}; start one sweep each")
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
    cells = []
    for values in product(*varied.values()):
        changes = dict(zip(varied, values, strict=True))
        name = ",".join(f"{short[key]}={_shown(value)}" for key, value in changes.items())
        changed = copy.deepcopy(raw)
        for key, value in changes.items():
            set_key(changed, key, value, said=f"--vary {key}")
        config = parse_config(changed, source=f"{source} with {name}")
        if config.train.on_divergence == "retry":
            raise UserError(
                "train.on_divergence: retry goes back to an earlier step, which runs that are trained together cannot "
                "do; set it to warn or stop, and vary train.learning_rate"
            )
        limit = max(2, config.train.save_total_limit)  # a process may be killed between the saves of two runs
        train = config.train.model_copy(update={"save_total_limit": limit})
        update = {"output_dir": config.output_dir / name, "train": train}
        cells.append(SweepCell(name, changes, config.model_copy(update=update)))
    names = [cell.name for cell in cells]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(
            f"--vary: two runs would have the folder {sorted(twice)[0]}; give values that differ when written"
        )
    return cells


def _short_names(keys: list[str]) -> dict[str, str]:
    """Return key -> its last part, or the whole key if two keys have the same last part."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def _shown(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(letter if letter.isalnum() or letter in "._+-" else "_" for letter in text)[:60]
