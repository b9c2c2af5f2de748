"""The process group's timeout comes from the environment."""

from __future__ import annotations

from datetime import timedelta

import pytest

from ptd.engine.ranks import TIMEOUT, Ranks, collective_timeout
from ptd.types import UserError


def test_timeout_is_settable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TIMEOUT, raising=False)
    assert collective_timeout() == timedelta(minutes=30)
    monkeypatch.setenv(TIMEOUT, "1.5")
    assert collective_timeout() == timedelta(seconds=90)


@pytest.mark.parametrize("given", ["", "soon", "0", "-5", "nan", "inf", "1e-9"])
def test_a_timeout_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(TIMEOUT, given)
    with pytest.raises(UserError, match=TIMEOUT):
        Ranks.start(needs_group=True)
