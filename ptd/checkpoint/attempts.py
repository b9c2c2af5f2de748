"""What became of the starts of a run: when another one is worth it, and when a person has to look first.

``run.json`` lists them under ``attempts``: ``started``, ``from_step``, ``how`` each ended, the ``step`` of the newest
checkpoint then, and the ``error``, if one was raised. An attempt that could say nothing any more is ``lost``.
"""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ptd.exit_codes import FATAL
from ptd.types import UserError

Attempt = dict[str, Any]
ORDERLY = ("finished", "preempted", "interrupted", "diverged")
"""Ends that are no failure of the program or the machine."""


class RepeatedFailure(UserError):
    """The run fails again and again; starting it once more would change nothing."""

    exit_code = FATAL


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def begun(attempts: list[Attempt], from_step: int) -> list[Attempt]:
    """With one more, which begins now; it carries the number of its Slurm job, if it is one."""
    job = os.environ.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format_map(os.environ)
    return [*attempts, {"started": now(), "from_step": from_step, **({"job": job} if job else {})}]


def ended(attempts: list[Attempt], how: str, **facts: Any) -> list[Attempt]:
    """With the end of the last one."""
    return [*attempts[:-1], {**attempts[-1], "ended": now(), "how": how, **facts}]


def settled(attempts: list[Attempt], step: int, *, forgive: bool = False) -> list[Attempt]:
    """As the next start finds them: the newest checkpoint is that of ``step``. ``forgive``: their failures no longer
    count."""
    found = [{"how": "lost", "step": step, **attempt} for attempt in attempts]
    return [{**attempt, "forgiven": True} for attempt in found] if forgive else found


def check_attempts(attempts: list[Attempt], step: int, max_restarts: int, folder: Path) -> None:
    """Raise `RepeatedFailure` if the last two failures left the same checkpoint that there is now, or if there were
    more than ``max_restarts``. Ends that are `ORDERLY` do not count, nor do forgiven ones."""
    failures = [attempt for attempt in attempts if attempt["how"] not in ORDERLY and not attempt.get("forgiven")]
    if not failures:
        return
    look = f"{_last_words(failures[-1], folder)}. Mend the cause, then --retry; or --overwrite to start again"
    if [attempt["step"] for attempt in failures[-2:]] == [step, step]:
        place = f"behind the checkpoint of step {step}" if step else "before the first checkpoint"
        raise RepeatedFailure(f"the run in {folder} failed twice {place}, and would again: {look}")
    if len(failures) > max_restarts:
        raise RepeatedFailure(
            f"the run in {folder} has failed {len(failures)} times, which is more than "
            f"train.max_restarts={max_restarts} allows: {look}"
        )


def _last_words(attempt: Attempt, folder: Path) -> str:
    """What is known of a failure, and where there is more."""
    logs = folder / "logs"
    places = [logs / attempt["job"]] if "job" in attempt else []
    places += sorted(logs.glob("*.stacks"))
    there = [str(place) for place in [*places, logs] if place.exists()]
    said = f"it said {attempt['error']!r}" if "error" in attempt else "it ended without a word"
    return f"{said}; see {' and '.join(there[:4]) if there else 'what the launcher wrote'}"
