"""Exit codes of ``ptd``, for job scripts and launchers.

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
