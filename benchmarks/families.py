"""Compare ptd with plain transformers on every text family that transformers can build, at a tiny size.

    python benchmarks/families.py --output F [--only llama,stablelm] [--kinds body]

For each model type and kind of output (causal_lm, seq2seq_lm, masked_lm, or the body that a trained head reads), every
method runs in every layout (packed, padded, generated). The methods are none (for a body: head), prefix, prompt
(virtual tokens before the others) and marks (virtual tokens among the others). A cell is *right* if

- outputs, loss and gradient are within 1e-4 (in units of the right values' root mean square) of those of plain
  transformers on each row by itself,
- a change of a row's last token changes no earlier output, and
- greedy decoding of a batch has the logits of an argmax loop without a cache.

A cell is *refused* if ptd says why it cannot run it; otherwise it is *wrong* or *crashed*. The same command continues
where it was stopped; ``--only`` measures the named types again, ``--again`` all types. Writes OUTPUT and a table (.md).
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIMIT = 60.0
"""Seconds for one model type in one kind of output."""
START = 180.0
"""Seconds for a worker to import what it needs."""


def work() -> None:
    """Read one ``{"type", "kind"}`` per line, and write the records of each as one line."""
    sys.path.insert(0, str(HERE))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output that a family prints is not an answer
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    from families_measure import measure

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        try:
            found = measure(asked["type"], asked["kind"])
        except Exception as error:
            import traceback

            where = traceback.format_exc().strip().splitlines()[-3:]
            found = [{"method": "*", "layout": "*", "outcome": "sweep failed", "reason": f"{error!r} {where}"[:600]}]
        seconds = round(time.perf_counter() - started, 1)
        found[0]["seconds"] = seconds
        print(json.dumps([{**asked, **each} for each in found]), file=answers, flush=True)


class Worker:
    """A process that measures; it is started again after it crashes or exceeds its time limit."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def measure(self, model_type: str, kind: str) -> list[dict[str, Any]]:
        """Return the records of a model type; if the process dies or hangs, one record that says so."""
        asked = {"type": model_type, "kind": kind}
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
            )  # fmt: skip
            if self._answer(START) is None:
                raise SystemExit("the worker does not start; try: python benchmarks/families.py --worker")
        assert self.process.stdin is not None
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        answer = self._answer(LIMIT)
        if answer is not None:
            found: list[dict[str, Any]] = json.loads(answer)
            return found
        dead = self.process.poll()
        self.stop()
        reason = f"no answer in {LIMIT:.0f} s" if dead is None else f"the process exited with {dead}"
        return [{**asked, "method": "*", "layout": "*", "outcome": "crashed", "reason": reason}]

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _answer(self, limit: float) -> str | None:
        assert self.process is not None
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        return (self.process.stdout.readline() or None) if ready else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "families.json")
    parser.add_argument("--only", default="", help="model types, separated by commas: measure only these, and again")
    parser.add_argument("--again", action="store_true", help="measure everything, even what the file already has")
    parser.add_argument("--kinds", default="", help="kinds of output, separated by commas")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return
    sys.path.insert(0, str(HERE))
    from families_configs import KINDS, model_types
    from families_report import read, write

    from ptd.bench.machine import evidence

    found_by = evidence()
    only = [name for name in arguments.only.split(",") if name]
    kinds = [name for name in arguments.kinds.split(",") if name] or KINDS
    records, before = ([], {}) if arguments.again else read(arguments.output)
    earlier = {*before.get("earlier_commits", ()), before.get("commit")} - {None, found_by["commit"]}
    if earlier and not only:
        raise SystemExit(
            f"{arguments.output} was measured at commit {', '.join(sorted(earlier))}; give --again to measure "
            "everything again, or --only to measure some types"
        )
    found_by["earlier_commits"] = sorted(earlier)
    known = {(each["type"], each["kind"]) for each in records}
    wanted = [pair for pair in model_types(kinds) if pair[0] in only or (not only and pair not in known)]
    worker = Worker()
    written = time.monotonic()
    try:
        for number, (model_type, kind) in enumerate(wanted, 1):
            found = worker.measure(model_type, kind)
            records = [each for each in records if (each["type"], each["kind"]) != (model_type, kind)] + found
            outcomes = sorted({each["outcome"] for each in found})
            print(f"{number}/{len(wanted)} {model_type} {kind}: {', '.join(outcomes)}", flush=True)
            if only or time.monotonic() - written > 10:
                write(arguments.output, records, found_by)
                written = time.monotonic()
    finally:
        worker.stop()
        write(arguments.output, records, found_by)
    print(arguments.output.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
