"""Record how each start (attempt) of a run ended, and refuse another start when a person has to look first.

``run.json`` lists the attempts under ``attempts``: ``started``, ``from_step``, ``how`` the attempt ended, the ``step``
of the newest checkpoint at that time, and the ``error`` if one was raised. An attempt that was killed before it could
record its end is ``lost``.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ptd.errors import FATAL
from ptd.types import UserError

Attempt = dict[str, Any]
ORDERLY = ("finished", "preempted", "interrupted", "diverged")
"""Ways to end that are not failures of the program or the machine."""


class RepeatedFailure(UserError):
    """The run has failed repeatedly, and another start would most likely fail as well."""

    exit_code = FATAL


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def begun(attempts: list[Attempt], from_step: int) -> list[Attempt]:
    """Return ``attempts`` plus one that begins now; it records the number of the Slurm job that it runs in, if any."""
    job = os.environ.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format_map(os.environ)
    return [*attempts, {"started": now(), "from_step": from_step, **({"job": job} if job else {})}]


def ended(attempts: list[Attempt], how: str, **facts: Any) -> list[Attempt]:
    """Return ``attempts`` with the end of the last one recorded."""
    return [*attempts[:-1], {**attempts[-1], "ended": now(), "how": how, **facts}]


def settled(attempts: list[Attempt], step: int, *, forgive: bool = False) -> list[Attempt]:
    """Return ``attempts`` as the next start finds them; those without a recorded end become ``lost``.

    ``step``: the step of the newest checkpoint. ``forgive``: earlier failures no longer count.
    """
    found = [{"how": "lost", "step": step, **attempt} for attempt in attempts]
    return [{**attempt, "forgiven": True} for attempt in found] if forgive else found


def check_attempts(attempts: list[Attempt], step: int, max_restarts: int, folder: Path) -> None:
    """Raise `RepeatedFailure` if another start would most likely fail as well.

    That is the case if the newest checkpoint, of ``step``, was already the newest after each of the last two failures,
    or if there were more than ``max_restarts`` failures. Forgiven failures and ends in `ORDERLY` do not count.
    """
    failures = [attempt for attempt in attempts if attempt["how"] not in ORDERLY and not attempt.get("forgiven")]
    if not failures:
        return
    look = f"{_last_words(failures[-1], folder)}. Fix the cause, then give --retry, or --overwrite to start again"
    if [attempt["step"] for attempt in failures[-2:]] == [step, step]:
        place = f"after the checkpoint of step {step}" if step else "before the first checkpoint"
        raise RepeatedFailure(f"the run in {folder} failed twice {place}, and would fail again: {look}")
    if len(failures) > max_restarts:
        raise RepeatedFailure(
            f"the run in {folder} has failed {len(failures)} times, which is more than "
            f"train.max_restarts={max_restarts} allows: {look}"
        )


def _last_words(attempt: Attempt, folder: Path) -> str:
    """Return what is known of a failure, and where to find more."""
    logs = folder / "logs"
    places = [logs / attempt["job"]] if "job" in attempt else []
    places += sorted(logs.glob("*.stacks"))
    there = [str(place) for place in [*places, logs] if place.exists()]
    said = f"the error was {attempt['error']!r}" if "error" in attempt else "it ended without a message"
    return f"{said}; see {' and '.join(there[:4]) if there else 'the output of the launcher'}"
