"""Runs the tests' jobs of several ranks, one after the other; the fixture ``launch`` of conftest.py starts it once.

A line that it reads is a job, ``{"ranks": 2, "program": ["worker.py", "argument"], "logs": FOLDER}``; the line with
which it answers repeats ``logs`` and has the exit ``codes`` by rank. What rank r wrote is in ``FOLDER/r.log``. Ranks
are forks of this process, which has imported what takes long; real launchers are in test_resume.py and other tests.
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
    """Exit codes by rank of a job that ran."""

    def work(rank: int) -> None:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")

    return start(ranks, work, logs).wait()


if __name__ == "__main__":
    for line in sys.stdin:
        job = json.loads(line)
        codes = run(job["ranks"], job["program"], Path(job["logs"]))
        print(json.dumps({"logs": job["logs"], "codes": codes}), file=answers, flush=True)
