"""Measure the start of a run with many rows: seconds and memory of every rank, with and without the cache of tokens.

    python benchmarks/rows_cache.py [--rows 2000000] [--ranks 2] [--output benchmarks/results/rows_cache.json]

Rows of prompt and completion with random words are written to a temporary folder. All ranks read them like a run
(`ptd.runs.build.read_material`), with the tokenizer of the quickstart's backbone, and prepare the micro-batches of
`STEPS` steps. Each start is a new process group, in this order:

- ``memory``: ``data.cache: none``; every rank holds the rows in its own memory. This start also fills the cache of
  ``datasets``, which the others find;
- ``first``: the first start with an empty cache folder: rank 0 tokenises, all ranks map the files;
- ``second``: the start after that: no rank tokenises.

Memory is the increase of the process's own memory (anonymous and shared pages). Pages of mapped files belong to the
page cache, which the kernel can reclaim; they are reported separately. ``rows`` are the seconds in which rank 0 loads
the rows from their file, a part of ``seconds``. All starts have to find the same digest of the tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loading_memory import peaks

from ptd.bench.machine import evidence
from ptd.config import parse_config
from ptd.data import Batches
from ptd.distributed.ranks import Ranks
from ptd.quickstart import BACKBONE
from ptd.runs import build
from ptd.types import Reporter

STARTS = ("memory", "first", "second")
STEPS = 200
"""Steps, from the whole epoch, whose micro-batches are prepared after the start."""


def write_rows(path: Path, rows: int) -> None:
    chosen = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(chosen.choices(letters, k=chosen.randint(2, 9))) for _ in range(5000)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            prompt, completion = (chosen.choices(words, k=chosen.randint(3, most)) for most in (30, 15))
            file.write(json.dumps({"prompt": f"{' '.join(prompt)} ", "completion": " ".join(completion)}) + "\n")


def start(name: str, folder: Path) -> None:
    """Start like a run on this rank; rank 0 prints the figures of all ranks."""
    raw = {
        "backbone": {"path": str(BACKBONE)},
        "method": {"name": "prefix"},
        "data": {"train": str(folder / "rows.jsonl"), "cache": "none" if name == "memory" else str(folder / "cache")},
        "output_dir": str(folder / "out"),
    }
    config, ranks = parse_config(raw), Ranks.start()
    spent = {"rows": 0.0}
    load_rows = build.load_rows

    def timed(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return load_rows(*given, **named)
        finally:
            spent["rows"] = time.perf_counter() - began

    build.load_rows = timed  # type: ignore[attr-defined]
    ranks.barrier()
    began = time.perf_counter()
    with peaks() as peak:
        examples = build.read_material(config, ranks, Reporter()).examples
        seconds = time.perf_counter() - began
        batches = Batches(examples, rank=ranks.rank, world_size=ranks.world_size, per_device_batch_size=8)
        total = batches.steps_in_epoch(0)
        tokens = [batch.tokens for step in range(STEPS) for batch in batches.step(step * total // STEPS)]
    own = {
        "seconds": seconds,
        "rows_seconds": spent["rows"],
        "peak_bytes": peak[0],
        "mapped_file_bytes": peak[1],
        "batch_tokens": sum(tokens),
    }
    everywhere = ranks.gather(own)
    if ranks.is_main:
        facts = {"rows": len(examples), "tokens": examples.report.tokens, "digest": examples.digest()}
        by_rank = {key: [one[key] for one in everywhere] for key in own if key != "rows_seconds"}
        print("RESULT " + json.dumps({**facts, "rows_seconds": own["rows_seconds"], **by_rank}), flush=True)
    ranks.stop()


def launch(name: str, folder: Path, ranks: int) -> dict[str, Any]:
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *rendezvous]
    done = subprocess.run(
        [*command, __file__, "--way", name, "--folder", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "datasets")},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"the start {name!r} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(lines[-1].removeprefix("RESULT ")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--way", choices=STARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        start(args.way, args.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder / "rows.jsonl", args.rows)
        results = {name: launch(name, folder, args.ranks) for name in STARTS}
        on_disk = sum(path.stat().st_size for path in (folder / "cache").glob("*/*"))
    if len({(each["digest"], str(each["batch_tokens"])) for each in results.values()}) != 1:
        raise SystemExit(f"the starts have different tokens: {json.dumps(results)}")
    report = {"ranks": args.ranks, "cache_bytes": on_disk, **results, **evidence("tokenizers")}
    print(json.dumps(report, indent=2))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
