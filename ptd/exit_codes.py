"""Exit codes of ``ptd``, for job scripts and launchers.

| code | name | meaning | start it again |
|---|---|---|---|
| 0 | `DONE` | finished | no |
| 1 | `FATAL` | a defect, a lost rank, a hang, a run that keeps failing; said on stderr | after a look |
| 2 | `USAGE` | something given cannot work; said on stderr | when it is mended |
| 3 | `DIVERGED` | the training diverged and was ended (`train.on_divergence`) | with another learning rate |
| 75 | `REQUEUE` | stopped by a signal, everything kept (``EX_TEMPFAIL`` of sysexits.h) | yes, as it is |
| 130 | `INTERRUPTED` | Ctrl-C (128 + SIGINT, as shells count) | as you like |

A process that a signal kills has no code of its own: shells show 128 + its number (137: SIGKILL).
"""

from __future__ import annotations

DONE = 0
FATAL = 1
USAGE = 2
DIVERGED = 3
REQUEUE = 75
INTERRUPTED = 130
