"""What ends a command on purpose. Apart from `ptd.types`, so that it can be said without torch."""

from __future__ import annotations

from ptd.exit_codes import DIVERGED, REQUEUE, USAGE


class UserError(Exception):
    """Something the user gave cannot work. The message says what was given, why it cannot work and what to do.

    The command line prints it without a traceback and exits with ``exit_code``.
    """

    exit_code = USAGE


class Preempted(Exception):
    """The run was asked to stop and did, with everything kept: the same command goes on from there.

    The command line prints it without a traceback and exits with ``exit_code``.
    """

    exit_code = REQUEUE


class RankError(UserError):
    """A `UserError` that the other ranks may not know of: each rank that raises it prints it."""


class Diverged(UserError):
    """The training diverged and ``train.on_divergence`` ends such a run: its settings have to change.

    What was trained until then, its report and its records are in the output folder.
    """

    exit_code = DIVERGED
