"""Measure the start of a run with many rows: seconds and memory of every rank, and what happens after faults.

    python benchmarks/rows_cache.py [--rows 2000000] [--ranks 2] [--output benchmarks/results/rows_cache.json]
    python benchmarks/rows_cache.py --made --rows 10000000 --starts first second

Rows of prompt and completion with random words are written to Parquet files in a temporary folder. All ranks read them
like a run (`ptd.runs.build.read_material`), with the tokenizer of the quickstart's backbone or ``--backbone``, count
the steps of the epoch and prepare the micro-batches of `STEPS` steps. 1,000 of the rows are held out. Each start is a
new process group, in this order:

- ``crash``: all processes are killed while the first tokens are being written;
- ``first``: the next start in this cache folder: rank 0 tokenises, all ranks map the files;
- ``second``: the start after that: no rank tokenises;
- ``row``: one word of one row is another; ``tokenizer``: a token was added to the tokenizer;
- ``full``: the cache is on a disk that becomes full, so every rank holds the rows in its own memory.

With ``--made``, no start tokenises: instead of tokenising, it takes random tokens, 20 to 60 per row, which the digest
of the rows determines. A start that finds the tokens cannot tell the difference. ``--starts`` chooses some starts.

``peak_bytes`` and ``mapped_file_bytes`` are increases during the start: of the process's own memory (anonymous and
shared pages), and of its pages of mapped files, which belong to the page cache, so that the kernel can reclaim them.
``smaps`` has the sums of /proc/self/smaps_rollup after the steps. ``rows_seconds`` are those in which rank 0 loads the
rows from their file, a part of ``seconds``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from loading_memory import peaks
from transformers import AutoTokenizer

from ptd.bench.machine import evidence
from ptd.config import parse_config
from ptd.data import Batches
from ptd.data.collecting import collect
from ptd.data.identity import rows_digest
from ptd.distributed.ranks import Ranks
from ptd.quickstart import BACKBONE
from ptd.runs import build
from ptd.tasks.causal_lm import CausalLM
from ptd.types import DataReport, Examples, Reporter

STARTS = ("crash", "first", "second", "row", "tokenizer", "full")
STEPS = 200
"""Steps, from the whole epoch, whose micro-batches are prepared after the start."""
HELD_OUT = 1000
AT_ONCE = 100_000
"""Rows that are written at a time."""
SMALL_DISK = "64m"
CRASH_AFTER = 1e6
"""Bytes of tokens that are written before the crash."""


def write_rows(path: Path, rows: int, changed: int | None = None) -> None:
    """Write the same rows at every call; the completion of the row ``changed`` has another word."""
    chosen = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = np.array(["".join(chosen.choices(letters, k=chosen.randint(2, 9))) for _ in range(5000)])
    draws = np.random.default_rng(0)
    schema = pa.schema([("prompt", pa.string()), ("completion", pa.string())])
    with pq.ParquetWriter(path, schema) as file:
        for first in range(0, rows, AT_ONCE):
            count = min(AT_ONCE, rows - first)
            texts = []
            for most in (8, 4):
                lengths = draws.integers(1, most + 1, count)
                drawn = iter(words[draws.integers(0, len(words), int(lengths.sum()))].tolist())
                texts.append([" ".join(next(drawn) for _ in range(length)) for length in lengths.tolist()])
            if changed is not None and first <= changed < first + count:
                texts[1][changed - first] += " changed"
            texts[0] = [f"{text} " for text in texts[0]]
            file.write_table(pa.table([pa.array(each) for each in texts], schema=schema))


def random_tokens(self: CausalLM, rows: Any, tokenizer: Any, *, what: str, columns: Any, **_: Any) -> Examples:
    """Take the place of `CausalLM.tokenize`."""

    def pieces() -> Iterator[Examples]:
        draws = np.random.default_rng(int(rows_digest(rows)[:16], 16))
        for first in range(0, len(rows), AT_ONCE):
            count = min(AT_ONCE, len(rows) - first)
            offsets = np.concatenate(([0], np.cumsum(draws.integers(20, 61, count))))
            tokens = draws.integers(0, 250, int(offsets[-1]), dtype=np.int32)
            yield Examples.of_text(
                tokens, np.ones(len(tokens), dtype=np.bool_), offsets, DataReport(count, len(tokens), len(tokens))
            )

    return collect(pieces(), columns)


class Notes(Reporter):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def smaps() -> dict[str, int]:
    """Return the bytes of /proc/self/smaps_rollup by kind."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}


def start(name: str, folder: Path, backbone: Path, made: bool) -> None:
    """Start like a run on this rank; rank 0 prints the figures of all ranks."""
    cache = folder / ("disk" if name == "full" else "cache")
    cache.mkdir(exist_ok=True)
    if name == "full" and int(os.environ["RANK"]) == 0:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", cache], check=True)
    raw = {
        "backbone": {"path": str(folder / "tokenizer" if name == "tokenizer" else backbone)},
        "method": {"name": "prefix"},
        "data": {
            "train": str(folder / ("changed.parquet" if name == "row" else "rows.parquet")),
            "eval": str(folder / "held_out.parquet"),
            "cache": str(cache),
        },
        "output_dir": str(folder / "out"),
    }
    config, ranks, notes = parse_config(raw), Ranks.start(), Notes()
    if made:
        CausalLM.tokenize = random_tokens  # type: ignore[method-assign]
    spent = {"rows": 0.0}
    load_rows = build.load_rows

    def timed(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return load_rows(*given, **named)
        finally:
            spent["rows"] += time.perf_counter() - began

    build.load_rows = timed  # type: ignore[attr-defined]
    ranks.barrier()
    before, began = smaps(), time.perf_counter()
    with peaks() as peak:
        examples = build.read_material(config, ranks, notes).examples
        seconds = time.perf_counter() - began
        batches = Batches(examples, rank=ranks.rank, world_size=ranks.world_size, per_device_batch_size=8)
        total = batches.total_steps(3)
        batches.step(0)
        first_step = time.perf_counter() - began
        tokens = [batch.tokens for step in range(STEPS) for batch in batches.step(step * total // STEPS)]
        all_steps = time.perf_counter() - began - first_step
    kinds = ("Pss", "Pss_Anon", "Pss_File", "Private_Clean", "Private_Dirty", "Anonymous")
    own = {
        "seconds": round(seconds, 2),
        "first_step_seconds": round(first_step, 2),
        "seconds_of_200_steps_far_apart": round(all_steps, 2),
        "peak_bytes": peak[0],
        "mapped_file_bytes": peak[1],
        "smaps": {kind: smaps()[kind] - before[kind] for kind in kinds},
        "batch_tokens": sum(tokens),
    }
    everywhere = ranks.gather(own)
    if ranks.is_main:
        facts = {"rows": len(examples), "tokens": examples.report.tokens, "digest": examples.digest()}
        by_rank = {key: [one[key] for one in everywhere] for key in own}
        said = [line for line in notes.lines if line.startswith("data.cache")]
        print("RESULT " + json.dumps({**facts, "rows_seconds": round(spent["rows"], 2), **by_rank, "notes": said}))
    ranks.stop()


def command(args: argparse.Namespace, name: str, folder: Path) -> list[str]:
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.ranks), *rendezvous]
    mount = ["unshare", "--user", "--map-root-user", "--mount"] if name == "full" else []
    made = ["--made"] if args.made else []
    given = ["--way", name, "--folder", str(folder), "--backbone", str(args.backbone), *made]
    return [*mount, *launcher, __file__, *given]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}


def launch(args: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run(command(args, name, folder), env=environment(folder), capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"the start {name!r} failed:\n{done.stderr[-3000:]}")
    print(name, lines[-1], file=sys.stderr, flush=True)
    return dict(json.loads(lines[-1].removeprefix("RESULT ")))


def crash(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Kill a first start while it writes; return what it leaves in the cache folder."""
    running = subprocess.Popen(
        command(args, "first", folder), env=environment(folder), start_new_session=True, stderr=subprocess.DEVNULL
    )
    cache = folder / "cache"
    while sum(path.stat().st_size for path in cache.glob(".*/tokens.bin")) < CRASH_AFTER:
        if running.poll() is not None:
            raise SystemExit("the start ended before the crash")
        time.sleep(0.2)
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    ours = [int(line.split()[0]) for line in found.splitlines() if f"--folder {folder}" in line]
    for process in ours:
        os.kill(process, signal.SIGKILL)
    running.wait()
    left = [path for path in cache.iterdir() if path.is_dir()]
    return {"entries": sum(not path.name.startswith(".") for path in left), "leftovers": len(left)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--backbone", type=Path, default=BACKBONE)
    parser.add_argument("--made", action="store_true")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        start(args.way, args.folder, args.backbone, args.made)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder / "rows.parquet", args.rows)
        write_rows(folder / "held_out.parquet", HELD_OUT)
        results: dict[str, Any] = {}
        for name in args.starts:
            if name == "row":
                write_rows(folder / "changed.parquet", args.rows, changed=args.rows // 2)
            if name == "tokenizer":
                tokenizer = AutoTokenizer.from_pretrained(args.backbone)
                shutil.copytree(args.backbone, folder / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
                tokenizer.add_tokens(["<another>"])
                tokenizer.save_pretrained(folder / "tokenizer")
            results[name] = crash(args, folder) if name == "crash" else launch(args, name, folder)
        entries = [path for path in (folder / "cache").glob("[!.]*") if path.is_dir()]
        entries_bytes = [sum(path.stat().st_size for path in place.iterdir()) for place in entries]
    same = [each for name, each in results.items() if name not in ("crash", "row")]
    if len({(each["digest"], str(each["batch_tokens"])) for each in same}) != 1:
        raise SystemExit(f"the starts have different tokens: {json.dumps(results)}")
    if "row" in results and results["row"]["digest"] == same[0]["digest"]:
        raise SystemExit("the changed row has no effect")
    report = {
        "ranks": args.ranks,
        "made": args.made,
        "entries_bytes": entries_bytes,
        **results,
        **evidence("tokenizers"),
    }
    print(json.dumps(report, indent=2))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
