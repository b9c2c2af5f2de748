"""Exceptions that end a command deliberately, and the exit codes of ``ptd``. This module does not import torch.

| code | name | meaning | start again? |
|---|---|---|---|
| 0 | `DONE` | finished | no |
| 1 | `FATAL` | a defect, a lost rank, a hang, a run that keeps failing; stderr says which | after finding the cause |
| 2 | `USAGE` | something given cannot work; stderr says what | after correcting it |
| 3 | `DIVERGED` | the training diverged and `train.on_divergence` ended the run | with another learning rate |
| 75 | `REQUEUE` | stopped by a signal, state saved (``EX_TEMPFAIL`` of sysexits.h) | yes, with the same command |
| 130 | `INTERRUPTED` | Ctrl-C (128 + SIGINT, as shells count) | as you like |

A process that a signal kills does not choose its code: shells show 128 + the signal's number (137: SIGKILL).
"""

from __future__ import annotations

DONE = 0
FATAL = 1
USAGE = 2
DIVERGED = 3
REQUEUE = 75
INTERRUPTED = 130


class UserError(Exception):
    """Something the user gave cannot work. The message says what was given, why it cannot work and what to do.

    The command line prints it without a traceback and exits with ``exit_code``.
    """

    exit_code = USAGE


class Preempted(Exception):
    """The run stopped on request and saved its state: the same command continues it.

    The command line prints it without a traceback and exits with ``exit_code``.
    """

    exit_code = REQUEUE


class RankError(UserError):
    """A `UserError` that may occur on some ranks only, so every rank that raises it prints it."""


class Diverged(UserError):
    """The training diverged and ``train.on_divergence`` ended the run: its settings have to change.

    The output folder holds the adapter as trained so far, the report and the records.
    """

    exit_code = DIVERGED
