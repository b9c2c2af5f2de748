"""Run any ptd command on the emulated GPU: ``PYTHONPATH=.:kernels python -m tests.gpu_paper train run.yaml``.

Afterwards, print to stderr how often the host waited for the GPU, for which operation and where in the code, and how
many operations it launched.
"""

from __future__ import annotations

import sys
from collections import Counter

from tests.gpu_paper.device import watched

if __name__ == "__main__":
    from ptd.cli import main

    with watched() as seen:
        try:
            main()
        finally:
            for (_, operation, where), times in Counter(seen.waited).most_common():
                print(f"{times:6} × {operation}   {where}", file=sys.stderr)
            print(f"{len(seen.waited)} waits, {seen.launches():,} operations launched", file=sys.stderr)
