"""Open a run's output folder: check whether it holds this run, and whether the run can continue.

``run.json`` records the resolved configuration, versions, world size and, at the end, the result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptd.checkpoint.files import make_folders, write_json, writing
from ptd.checkpoint.run_state import checkpoints, latest_complete, read_facts
from ptd.config import RunConfig
from ptd.runs.restarts import Attempt, check_attempts, settled
from ptd.types import UserError

OWN = (
    *("run.json", "metrics.jsonl", "samples.jsonl", "loss.png", "report.html"),
    *("adapter", "best", "checkpoints", "tensorboard", "wandb"),
)
FREE_TO_CHANGE = {
    "backbone": {
        "gradient_checkpointing",
        "compile",
        "liger",
        "attention",
        "sharding",
        "sharding_group_size",
        "offload",
        "offload_folder",
    },
    "data": {"eval", "eval_split", "cache", "cache_gb"},
    "train": {
        "logging_steps",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "max_restarts",
        "hang_timeout_minutes",
        "report_to",
        "run_name",
        "samples",
        "on_divergence",
        "early_stopping_patience",
        "per_device_eval_batch_size",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    },
}
"""Keys that may differ when a run continues, because they do not change what is learned. Of the batch sizes the
product counts, the rows per step."""


FORMER_TRAIN = {"learning_rate": 1e-2, "warmup_ratio": 0.0}
FORMER_INIT = {"prefix": "random", "prompt": "vocabulary", "p_tuning": "random", "p_tuning_v2": "random"}
"""Defaults of runs from before prompts were trained in the backbone's units; newer runs have ``units`` in run.json."""


@dataclass(frozen=True)
class RunFolder:
    """An output folder that this run may use; ``checkpoint`` is where it continues from (None: from the start).

    ``attempts``: earlier starts of the run. ``replaces``: the folder holds another run, which will be removed.
    """

    path: Path
    checkpoint: Path | None
    notes: tuple[str, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    replaces: bool = False

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def step(self) -> int:
        """The step after which the run continues."""
        return int(self.facts().get("step", 0))

    def facts(self) -> dict[str, Any]:
        """Return the plain values of the checkpoint, without its tensors; empty if there is no checkpoint."""
        return read_facts(self.checkpoint) if self.checkpoint is not None else {}

    def write(self, content: dict[str, Any]) -> None:
        """Replace run.json. Raises `UserError` if it cannot be written."""
        with writing(self.path):
            make_folders(self.path)
            write_json(self.path / "run.json", content)


def as_begun(config: RunConfig) -> RunConfig:
    """Return the configuration with the former defaults if it continues a run that began before they changed.

    Keys that the run file sets are not changed.
    """
    previous = _previous(config.output_dir)
    if previous is None or previous.get("units") or not any(config.output_dir.glob("checkpoints/step-*")):
        return config
    before, method, train = previous["config"], dict(config.method), {}
    former = FORMER_INIT.get(config.method_name)
    if former is not None and before["method"].get("init", former) == former:
        method.setdefault("init", former)
    for key, value in FORMER_TRAIN.items():
        if key not in config.train.model_fields_set and before["train"].get(key) == value:
            train[key] = value
    return config.model_copy(update={"method": method, "train": config.train.model_copy(update=train)})


def _previous(folder: Path) -> dict[str, Any] | None:
    """Return run.json of the run in this folder; None if it does not exist or cannot be read."""
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        before = found["config"]
        before["train"] = {"optimizer": "adamw", **before["train"]}  # the run may be from before the key
        # The run may be from before all methods had these keys.
        if not found.get("units") and before["method"]["name"] in FORMER_INIT:
            start = {"init": FORMER_INIT[before["method"]["name"]], "init_text": None, "init_text_file": None}
            before["method"] = {**start, **before["method"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(found)


def open_run(config: RunConfig, *, overwrite: bool, retry: bool = False) -> RunFolder:
    """Decide between a fresh start, continuing, and refusal (`UserError`), without writing anything.

    ``retry``: also continue a run that has failed repeatedly.
    """
    folder = config.output_dir
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file; give a folder")
    held = [name for name in OWN if (folder / name).exists()]
    if overwrite or not held:
        return RunFolder(folder, None, replaces=bool(held))
    try:
        previous = _previous(folder)
        if previous is None:
            raise ValueError("not readable")
        same = identity(previous["config"]) == identity(config.to_dict())
        status = previous["status"]
        diverged = dict(previous["diverged"]) if status == "diverged" else {}
        attempts = [dict(attempt) for attempt in previous.get("attempts", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"output_dir: {folder} holds {', '.join(held)} but no readable run.json; "
            "choose another output_dir, or --overwrite to replace these files"
        ) from error
    # The run failed while it was loading, and the new settings may be the fix.
    if not same and held == ["run.json"]:
        return RunFolder(folder, None)
    if not same:
        changed = _differences(identity(previous["config"]), identity(config.to_dict()))
        raise UserError(
            f"output_dir: {folder} holds a run with other settings ({'; '.join(changed)}); choose another output_dir, "
            "or --overwrite to replace it"
        )
    if status == "finished":
        raise UserError(
            f"output_dir: the run in {folder} is finished; choose another output_dir, or --overwrite to redo it"
        )
    if diverged:
        _check_goes_on(config, previous["config"]["train"].get("on_divergence"), diverged)
    checkpoint, skipped = latest_complete(folder / "checkpoints")
    if skipped and checkpoint is None:
        raise UserError(
            f"output_dir: no checkpoint in {folder} is complete ({'; '.join(skipped)}); "
            "--overwrite starts again from the beginning"
        )
    notes = [f"passed over {reason}" for reason in skipped]
    notes.append(
        f"continuing from {checkpoint.name}" if checkpoint else "no checkpoint yet; starting from the beginning"
    )
    found = RunFolder(folder, checkpoint, tuple(notes))
    attempts = settled(attempts, found.step, forgive=retry)
    check_attempts(attempts, found.step, config.train.max_restarts, folder)
    return replace(found, attempts=tuple(attempts))


def read_run_json(folder: Path) -> dict[str, Any]:
    """Return the content of run.json; empty if it does not exist or cannot be read."""
    try:
        return dict(json.loads((folder / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def has_result(folder: Path) -> bool:
    """Return whether the run in this folder has ended, however it ended."""
    return "result" in read_run_json(folder)


def at_a_common_step(folders: Sequence[RunFolder]) -> list[RunFolder]:
    """Let runs that were trained together continue after the same step; without one, all start again.

    A run that had ended earlier (it is complete, stopped early, diverged or failed) keeps its last checkpoint.
    """
    facts = [folder.facts() for folder in folders]
    over = ["ended" in each or (each and each["step"] == each.get("total")) for each in facts]
    going = [folder.step for folder, ended in zip(folders, over, strict=True) if not ended]
    step = min(going) if going else max(folder.step for folder in folders)
    found = []
    for folder, ended in zip(folders, over, strict=True):
        kept = folder.checkpoint if ended and folder.step <= step else folder.checkpoints / f"step-{step:06d}"
        if step == 0 or kept is None or kept not in checkpoints(folder.checkpoints):
            return [replace(folder, checkpoint=None, notes=()) for folder in folders]
        found.append(replace(folder, checkpoint=kept, notes=()))
    return found


def _check_goes_on(config: RunConfig, then: str | None, diverged: dict[str, Any]) -> None:
    """Raise `UserError` if a run that ``diverged`` would diverge again.

    Only a change of ``train.on_divergence``, which was ``then``, makes a difference: to ``warn``, which does not end
    the run, or from ``stop`` to ``retry``.
    """
    if config.train.on_divergence == "warn" or (config.train.on_divergence, then) == ("retry", "stop"):
        return
    rate = diverged.get("learning_rate")
    shown = f"{rate:.3g}" if isinstance(rate, float) else rate
    raise UserError(
        f"output_dir: the run in {config.output_dir} diverged in step {diverged.get('step')} with train.learning_rate "
        f"{shown}, and would diverge again; lower the rate and choose another output_dir, or --overwrite to replace "
        "the run; with train.on_divergence=warn the run continues nevertheless"
    )


def clear(folder: RunFolder) -> None:
    """Remove the files of an earlier run, and only those (for a fresh start)."""
    for name in OWN:
        path = folder.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a resolved configuration that distinguishes this run from others."""
    sections = {key: config[key] for key in ("backbone", "method", "task", "data", "train")}
    return {
        f"{section}.{key}": value
        for section, values in sections.items()
        for key, value in values.items()
        if key not in FREE_TO_CHANGE.get(section, set())
    }


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key}: was {old.get(key)!r}, is now {new.get(key)!r}" for key in keys[:3]]
