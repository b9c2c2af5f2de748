"""Stop on a signal: a rank notes the signal immediately, and all ranks stop together between two optimizer steps.

A scheduler that needs the machine sends a warning first (Slurm: ``--signal``; clouds: SIGTERM). Schedulers differ in
which ranks they signal and when. So the ranks agree in the all-reduce that every step needs anyway
(`PromptStep.finish`).
"""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Whether this process was asked to stop: by a signal (``signal`` is the first one received) or by `make`."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._made = False

    @classmethod
    def listen(cls) -> StopRequest:
        """Note `STOP_SIGNALS` from now on instead of being killed by them. Call it in the main thread only."""
        request = cls()
        for number in STOP_SIGNALS:
            signal.signal(number, request._note)
            # Restart interrupted system calls: some C libraries take an interrupted read or wait for an error.
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
        """Ignore further signals, because this process is about to exit; a launcher may signal it when others exit.

        A handler is not enough: at shutdown Python restores the default handler, which kills the process.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
