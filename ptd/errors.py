"""Exceptions that end a command deliberately. Unlike `ptd.types`, this module does not import torch."""

from __future__ import annotations

from ptd.exit_codes import DIVERGED, REQUEUE, USAGE


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
