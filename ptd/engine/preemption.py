"""Stopping on a signal: noted at once, acted on by all ranks together between two optimizer steps.

A scheduler that needs the machine warns first (Slurm: ``--signal``; clouds: SIGTERM). Which ranks it tells, and when,
differs, so the ranks agree in the sums that every step makes anyway (`PromptStep.finish`).
"""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Whether this process was asked to stop: by a signal, of which ``signal`` is the first, or by `make`."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._made = False

    @classmethod
    def listen(cls) -> StopRequest:
        """Note `STOP_SIGNALS` from now on, instead of dying of them. Only in a program's main thread."""
        request = cls()
        for number in STOP_SIGNALS:
            signal.signal(number, request._note)
            # Libraries that read or wait in C are not to see an interrupted call: some take it for an error.
            signal.siginterrupt(number, False)
        return request

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)

    def make(self) -> None:
        """Ask this process to stop."""
        self._made = True

    @property
    def wanted(self) -> bool:
        return self._made or self.signal is not None

    @staticmethod
    def ignore_more() -> None:
        """This process ends by itself now: further signals, such as a launcher's for the others' end, do nothing.

        A handler would not do: Python's shutdown replaces it by the default, which kills.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
