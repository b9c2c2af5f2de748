"""Time a step of many prompts over one backbone against the same steps one prompt after the other.

    python benchmarks/many_training.py MODEL ROWS.jsonl [--members 8] [--rows 1 4] [--output FILE]

ROWS.jsonl has rows of prompt and completion. For each number of rows per step and prompt, one step of all members
together and one step of each member alone run in turn in one process, so that a change of the machine's speed affects
both. Loading the backbone is not included; a sweep does it once and single runs once each. Memory is the largest
resident memory of a process that only trains one member, and of one that trains all of them.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ptd.bench.machine import evidence
from ptd.config import parse_config
from ptd.distributed.ranks import Ranks
from ptd.engine.loop import Loop
from ptd.engine.member import Member
from ptd.runs.build import build_member, load_backbone, read_material
from ptd.types import Reporter


def loop_of(asked: argparse.Namespace, rows: int, members: int) -> Loop:
    """Return a loop with members that differ in their seed and learning rate."""
    ranks, built = Ranks.start(), []
    configs = [
        parse_config(
            {
                "backbone": {"path": asked.model, "dtype": asked.dtype},
                "method": {"name": "prefix", "num_virtual_tokens": asked.virtual_tokens},
                "data": {"train": asked.data, "max_length": 512, "cache": "none"},
                "train": {
                    "max_steps": 10_000, "per_device_train_batch_size": rows, "seed": number,
                    "learning_rate": 0.05 / (1 + number),
                },
                "output_dir": "unused",
            }
        )
        for number in range(members)
    ]  # fmt: skip
    material = read_material(configs[0], ranks, Reporter())
    prepared = load_backbone(configs[0], None, ranks, [material])
    for config in configs:
        step, batches = build_member(config, prepared, ranks, config.train, material)
        built.append(Member(config.train, step, batches))
    for member in built[1:]:
        member.step.meter, member.step.clock = built[0].step.meter, built[0].step.clock
    return Loop(prepared, ranks, Reporter(), built)


def measure(asked: argparse.Namespace, rows: int) -> dict[str, Any]:
    """Return the seconds of both ways (medians), and the median, smallest and largest ratio of neighbours."""
    loop = loop_of(asked, rows, asked.members)
    found: dict[str, list[float]] = {"together": [], "one after the other": []}
    for index in range(asked.times + 1):
        batches = [member.batches.step(index) for member in loop.members]
        began = time.perf_counter()
        for pending in loop.take_step(index, batches):
            pending.read()
        between = time.perf_counter()
        for member, own in zip(loop.members, batches, strict=True):
            loop.take_step(index, [own], [member])[0].read()
        if index:  # the first of each is a warm-up
            found["together"].append(between - began)
            found["one after the other"].append(time.perf_counter() - between)
    ratios = [alone / both for both, alone in zip(*found.values(), strict=True)]
    return {
        "members": asked.members,
        "rows per member": rows,
        "seconds": {name: round(statistics.median(each), 3) for name, each in found.items()},
        "faster": round(statistics.median(ratios), 3),
        "smallest and largest": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def peak(asked: argparse.Namespace, rows: int, members: int) -> int:
    """Return the largest resident memory, in bytes, of a process that takes two steps with so many members."""
    command = [sys.executable, *sys.argv, "--peak", str(rows), str(members)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--virtual-tokens", type=int, default=30)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", type=int, nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak is not None:
        rows, members = asked.peak
        loop = loop_of(asked, rows, members)
        for index in range(2):
            loop.take_step(index, [member.batches.step(index) for member in loop.members])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    records = []
    for rows in asked.rows:
        memory = {f"{count} member{'s' * (count > 1)}": peak(asked, rows, count) for count in (1, asked.members)}
        records.append({**measure(asked, rows), "peak bytes": memory})
        print(json.dumps(records[-1]), flush=True)
    if asked.output is not None:
        shown = {"evidence": evidence(), "records": records}
        asked.output.write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
