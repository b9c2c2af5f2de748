"""Compare ptd with plain transformers on every text family that transformers can build, and write the family sheet.

    python tests/family_sheet.py                      all types: docs/families.md and tests/sheet/families.json
    python tests/family_sheet.py --only llama,bloom   these types again
    python tests/family_sheet.py --check --fifth      a fifth, and what has changed, compared with the sheet

For each model type and kind of output (causal_lm, seq2seq_lm, masked_lm, or the body that a trained head reads), every
method runs in every layout on a tiny model (`sheet.measure`). Each type has a time limit, and a process that crashes is
replaced, so no type ends the sheet. The fifth is chosen by the commit (``--fifth 0`` to ``4``: by you). A type has
changed if its code, its settings, or ptd's code for prompts are not those of its record in the sheet. A sheet that was
interrupted goes on with what has changed; ``--again`` measures everything.
The exit code is 1 if a value is wrong, a model crashes, or, with ``--check``, a result is not that of the sheet.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
if sys.path[0] == str(HERE):  # where folders have the names of ptd's packages
    sys.path[0] = str(ROOT)
if "sheet" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("sheet", HERE / "sheet" / "__init__.py")
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["sheet"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["sheet"])

LIMIT = 60
"""Seconds of a processor for one model type in one kind of output."""
WAIT = 900.0
"""Seconds to wait for an answer, or for a worker to import what it needs."""
KEEP = 30.0
"""Seconds between two writings of an unfinished sheet."""
FIFTHS = 5


def work() -> None:
    """Read one ``{"type", "kind"}`` per line, and write the record of each as one line."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import resource

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output that a family prints is not an answer
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    from sheet.measure import measure
    from sheet.records import folded

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + LIMIT, resource.RLIM_INFINITY))
        try:
            found = folded(measure(asked["type"], asked["kind"]))
        except Exception as error:
            import traceback

            where = traceback.format_exc().strip().splitlines()[-3:]
            found = {"outcome": "sheet failed", "reason": f"{error!r} {where}"[:600]}
        print(json.dumps(asked | found), file=answers, flush=True)


class Worker:
    """A process that measures; it is started again after it crashes or exceeds its time limit."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def measure(self, model_type: str, kind: str) -> dict[str, Any]:
        """Return the record of a model type; if the process dies or hangs, a record that says so."""
        asked = {"type": model_type, "kind": kind}
        if self.process is None:
            self.start()
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            print(json.dumps(asked), file=self.process.stdin, flush=True)
            answer = self._answer()
        except BrokenPipeError:
            answer = ""
        if answer:
            found: dict[str, Any] = json.loads(answer)
            return found
        dead = self.process.wait() if answer is not None else None
        self.stop()
        reason = f"no answer in {WAIT:.0f} s" if dead is None else f"the process ended with {dead}"
        reason = f"more than {LIMIT} s" if dead == -signal.SIGXCPU else reason
        return {**asked, "outcome": "crashed", "reason": reason}

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
        )  # fmt: skip
        if not self._answer():
            raise SystemExit("the worker does not start; try: python tests/family_sheet.py --worker")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError):  # closes the pipes; what was asked of a dead process is not sent
                self.process.__exit__(None, None, None)
            self.process = None

    def _answer(self) -> str | None:
        """Return the next line of the process; empty: it has ended; None: there was no answer in `WAIT`."""
        assert self.process is not None
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], WAIT)
        return self.process.stdout.readline() if ready else None


def measured(
    wanted: list[tuple[str, str]], workers: int, keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Return the records of these (model type, kind of output), measured by several processes.

    ``keep`` gets the records so far, now and then.
    """
    records: list[dict[str, Any]] = []
    kept = time.monotonic()
    from sheet.records import digest_of

    free: SimpleQueue[Worker] = SimpleQueue()
    everyone = [Worker() for _ in range(workers)]
    for worker in everyone:
        free.put(worker)
    number = count(1)

    def one(pair: tuple[str, str]) -> dict[str, Any]:
        worker = free.get()
        try:
            found = worker.measure(*pair)
        finally:
            free.put(worker)
        outcomes = sorted({*found.get("cells", {}).values()}) or [found.get("outcome", "")]
        print(f"{next(number)}/{len(wanted)} {' '.join(pair)}: {', '.join(outcomes)}", flush=True)
        return found

    try:
        with ThreadPoolExecutor(workers) as pool:
            for found in pool.map(one, wanted):
                records.append(found | {"digest": digest_of(found["type"])})
                if time.monotonic() - kept > KEEP:
                    keep(records)
                    kept = time.monotonic()
        return records
    finally:
        for worker in everyone:
            worker.stop()


def fifth_of(name: str, kind: str) -> int:
    """Return the fifth of the sheet, 0 to 4, to which a model type belongs."""
    return zlib.crc32(f"{name} {kind}".encode()) % FIFTHS


def fifth_of_commit() -> int:
    """Return the fifth that the checked-out commit chooses."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return int(subprocess.run(asked, check=True, capture_output=True, text=True).stdout[:8], 16) % FIFTHS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="model types, separated by commas")
    parser.add_argument("--kinds", default="", help="kinds of output, separated by commas")
    parser.add_argument("--fifth", nargs="?", type=int, const=-1, help="a fifth of the types and those that changed")
    parser.add_argument("--again", action="store_true", help="measure also what has not changed")
    parser.add_argument("--check", action="store_true", help="compare with the sheet, and write nothing")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return
    if arguments.fifth is not None and not arguments.check:
        parser.error("--fifth: part of a sheet is measured only to compare it; add --check")
    from sheet.configs import KINDS, model_types
    from sheet.records import differences, digest_of, faults, read, write

    started = time.monotonic()
    kinds = [name for name in arguments.kinds.split(",") if name] or KINDS
    only = [name for name in arguments.only.split(",") if name]
    before, _ = read()
    known = {(each["type"], each["kind"]): each for each in before}
    wanted = [pair for pair in model_types(kinds) if not only or pair[0] in only]
    changed = {pair for pair in wanted if known.get(pair, {}).get("digest") != digest_of(pair[0])}
    if arguments.fifth is not None:
        chosen = fifth_of_commit() if arguments.fifth < 0 else arguments.fifth
        wanted = [pair for pair in wanted if pair in changed or fifth_of(*pair) == chosen]
        print(f"fifth {chosen} of the types, and {len(changed)} that changed: {len(wanted)}", flush=True)
    elif not (arguments.check or arguments.again or only):
        wanted = [pair for pair in wanted if pair in changed]

    def keep(records: list[dict[str, Any]]) -> None:
        if not arguments.check:
            there = set(model_types(KINDS))
            now = {pair: each for pair, each in known.items() if pair in there}
            write(list((now | {(each["type"], each["kind"]): each for each in records}).values()))

    records = measured(wanted, arguments.workers, keep)
    keep(records)
    told = [f"{each['type']} {each['kind']}: {text}" for each in records for text in faults(each)]
    if arguments.check:
        told += [text for each in records for text in differences(each, known.get((each["type"], each["kind"])))]
    print(f"{len(records)} measured in {(time.monotonic() - started) / 60:.1f} minutes")
    if told:
        print(*told, sep="\n")
        raise SystemExit(
            "the results above are faults, or not those of the sheet; after a change on purpose, write it again with "
            "make families"
        )


if __name__ == "__main__":
    main()
