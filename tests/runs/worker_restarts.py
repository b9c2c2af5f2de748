"""Run attempts of a run, one after another, on two ranks of ``ptd train`` each; used by test_interruptions.py.

    python worker_restarts.py ATTEMPTS.json RESULTS.json

An attempt has ``arguments`` of ``ptd`` and an ``event``: null or ``[rank, where, step, signal]``. The rank sends the
signal to itself right before ``where``: ``resume`` (the backbone is loaded), ``step`` (counted from 1), ``evaluate``
or ``save_state`` (after that step). Nothing is asserted here.

The ranks are forks of this process, which has imported everything once. It acts as a launcher: when a rank has failed,
the others have `GRACE` seconds to exit and are then killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ptd import cli
from ptd.distributed.ranks import Ranks
from ptd.engine.loop import Loop
from ptd.runs.artifacts import Artifacts

GRACE = 20.0
"""Seconds until the other ranks are killed: far more than a rank needs to exit when its peer is gone or hangs."""


def strike(rank: int, where: str, step: int, name: str) -> None:
    """If this process is ``rank``, make it send itself the signal once, when it reaches the place."""
    owner: Any = Loop if where in ("step", "evaluate") else Artifacts
    attribute = {"step": "take_step"}.get(where, where)
    original = getattr(owner, attribute)

    def struck(self: Any, *given: Any, **named: Any) -> Any:
        if where == "resume" or given[0] + (where == "step") == step:
            sent = signal.Signals[name]
            os.kill(os.getpid(), sent)
            if sent is signal.SIGTERM:  # a second signal, which must change nothing
                os.kill(os.getpid(), sent)
        return original(self, *given, **named)

    if int(os.environ["RANK"]) == rank:
        setattr(owner, attribute, struck)


def be_rank(attempt: dict[str, Any], logs: Path) -> None:
    """Run the attempt as a rank in this process; never returns."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(logs.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT), descriptor)
    if attempt["event"] is not None:
        strike(*attempt["event"])
    sys.argv = ["ptd", *attempt["arguments"]]
    code = 1
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def launch(attempt: dict[str, Any], logs: Path) -> dict[str, Any]:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(Ranks.free_port()), "WORLD_SIZE": "2"}
    running: dict[int, int] = {}
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ.update({**address, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"})
            be_rank(attempt, logs.with_name(f"{logs.name}-{rank}"))
        running[child] = rank
    codes: dict[int, int] = {}
    killed: list[int] = []
    deadline = float("inf")
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            rank = running.pop(child)
            codes[rank] = os.waitstatus_to_exitcode(status)
            if codes[rank]:
                # A stopped process does nothing, so it needs no time to exit.
                stopped = attempt["event"] is not None and attempt["event"][3] == "SIGSTOP"
                deadline = min(deadline, time.monotonic() + (0.0 if stopped else GRACE))
        elif time.monotonic() > deadline:
            for stuck, rank in running.items():
                os.kill(stuck, signal.SIGKILL)
                killed.append(rank)
            deadline = float("inf")
        time.sleep(0.05)
    said = {
        name: [logs.with_name(f"{logs.name}-{rank}").with_suffix(f".{name}").read_text() for rank in range(2)]
        for name in ("stdout", "stderr")
    }
    return {"codes": [codes[0], codes[1]], "killed": killed, **said}


def main(attempts_file: str, results_file: str) -> None:
    attempts = json.loads(Path(attempts_file).read_text())
    results = []
    for number, attempt in enumerate(attempts):
        result = launch(attempt, Path(results_file).with_name(f"attempt-{number}"))
        run_file = Path(attempt["output_dir"]) / "run.json"
        result["run"] = json.loads(run_file.read_text()) if run_file.is_file() else None
        results.append(result)
    Path(results_file).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
