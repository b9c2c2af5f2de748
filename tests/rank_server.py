"""Run the tests' multi-rank jobs, one at a time; the fixture ``launch`` of conftest.py starts this program once.

Each line of stdin is a job, ``{"ranks": 2, "program": ["worker.py", "argument"], "logs": FOLDER}``. The line that
answers it repeats ``logs`` and gives the exit ``codes`` by rank. The output of rank r is in ``FOLDER/r.log``. Ranks
are forks of this process, which has imported the slow packages; test_resume.py and other tests use real launchers.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # libraries print while they are imported
sys.path[0] = str(Path(__file__).parents[1] / "benchmarks")  # this folder would shadow the package ptd_kernels

import bitsandbytes  # noqa: E402, F401
import deepspeed  # noqa: E402, F401
from forked_ranks import start  # noqa: E402

import ptd.cli  # noqa: E402
import ptd.commands.generate  # noqa: E402
import ptd.commands.predict  # noqa: E402
import ptd.commands.train  # noqa: E402, F401


def run(ranks: int, program: list[str], logs: Path) -> list[int]:
    """Run a job; return its exit codes by rank."""

    def work(rank: int) -> None:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")

    return start(ranks, work, logs).wait()


if __name__ == "__main__":
    for line in sys.stdin:
        job = json.loads(line)
        codes = run(job["ranks"], job["program"], Path(job["logs"]))
        print(json.dumps({"logs": job["logs"], "codes": codes}), file=answers, flush=True)
