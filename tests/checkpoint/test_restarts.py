"""The rules that decide whether a failed run may be started again."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from ptd.errors import FATAL
from ptd.runs.restarts import Attempt, RepeatedFailure, begun, check_attempts, ended, settled


def history(*ends: tuple[str, int]) -> list[Attempt]:
    """Return attempts that ended in these ways, each with the step of its newest checkpoint."""
    attempts: list[Attempt] = []
    for how, step in ends:
        attempts = begun(attempts, 0)
        attempts = attempts if how == "lost" else ended(attempts, how)
        attempts = settled(attempts, step)
    return attempts


def refusal(attempts: list[Attempt], step: int, max_restarts: int = 3, folder: Path = Path("out")) -> str | None:
    try:
        check_attempts(attempts, step, max_restarts, folder)
    except RepeatedFailure as error:
        return str(error)
    return None


@pytest.mark.parametrize("how", ["lost", "failed"])
def test_failing_twice_without_a_new_checkpoint_is_refused(how: str) -> None:
    assert refusal(history((how, 10)), 10) is None
    assert refusal(history((how, 10), (how, 20)), 20) is None
    assert "failed twice after the checkpoint of step 20" in str(refusal(history((how, 10), (how, 20), (how, 20)), 20))
    assert "failed twice before the first checkpoint" in str(refusal(history((how, 0), (how, 0)), 0))
    assert refusal(history((how, 20), (how, 20)), 10) is None, "the newest one was damaged: another place to start"


def test_stops_that_were_asked_for_do_not_count() -> None:
    for how in ("preempted", "interrupted", "finished"):
        assert refusal(history(*[(how, 10)] * 9), 10) is None
        assert refusal(history(("lost", 10), *[(how, 10)] * 9), 10, max_restarts=1) is None
        assert "failed twice" in str(refusal(history(("lost", 10), (how, 10), ("failed", 10)), 10))


def test_failures_are_capped() -> None:
    failures = history(("lost", 10), ("failed", 20), ("lost", 30))
    assert refusal(failures, 30, max_restarts=3) is None
    assert "failed 3 times, which is more than train.max_restarts=2 allows" in str(refusal(failures, 30, 2))
    assert refusal(history(("lost", 10)), 10, max_restarts=0) is not None
    assert refusal([], 0, max_restarts=0) is None


def test_forgiven_failures_do_not_count() -> None:
    attempts = settled(history(("lost", 10), ("lost", 10)), 10, forgive=True)
    assert refusal(attempts, 10, max_restarts=0) is None
    again = settled(begun(attempts, 10), 10)
    assert refusal(again, 10, max_restarts=1) is None
    assert "failed twice" in str(refusal(settled(begun(again, 10), 10), 10))


def test_the_refusal_says_where_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    attempts = settled(begun([], 0), 0)
    assert "without a message; see the output of the launcher" in str(refusal(attempts, 0, 0, tmp_path))
    (tmp_path / "logs" / "42").mkdir(parents=True)
    (tmp_path / "logs" / "rank-1.stacks").write_text("Thread")
    attempts = settled(ended(begun(attempts, 0), "failed", error="OSError: no space"), 0)
    message = str(refusal(attempts, 0, 9, tmp_path))
    assert "the error was 'OSError: no space'" in message
    for place in (tmp_path / "logs" / "42", tmp_path / "logs" / "rank-1.stacks"):
        assert str(place) in message
    assert "--retry" in message
    assert "--overwrite" in message


def test_it_reaches_the_other_ranks_as_it_is() -> None:
    assert pickle.loads(pickle.dumps(RepeatedFailure("why"))).exit_code == FATAL
