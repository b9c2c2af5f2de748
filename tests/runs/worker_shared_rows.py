"""Share tokenised rows on four ranks of two nodes, or on a disk that is full or read-only, for test_shared_rows.py.

    torchrun --nproc-per-node 4 worker_shared_rows.py ranks FOLDER
    unshare --user --map-root-user --mount python worker_shared_rows.py disks FOLDER

Ranks 0 and 1 are node 0, ranks 2 and 3 are node 1. ``ranks`` writes ``FOLDER/found.RANK``, ``disks`` prints a line.
"""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptd.config import DataConfig
from ptd.data.collecting import collect
from ptd.distributed.ranks import Ranks
from ptd.runs.shared_rows import Tokenising, cache_of, share_examples
from ptd.types import DataReport, Examples, Reporter

KEY = "a" * 32


class Rows(Reporter):
    """Makes examples, counts how often, and stores the notes."""

    def __init__(self, rows: int) -> None:
        self.rows, self.times, self.notes = rows, 0, list[str]()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def make(self, columns: Any) -> Examples:
        self.times += 1
        tokens = np.arange(self.rows * 100, dtype=np.int32)
        bounds = range(0, self.rows + 1, 500)
        pieces = (
            Examples(
                tokens[first * 100 : stop * 100],
                tokens[first * 100 : stop * 100],
                np.arange(stop - first + 1, dtype=np.int64) * 100,
                DataReport(stop - first, (stop - first) * 100, 0),
            )
            for first, stop in pairwise(bounds)
        )
        return collect(pieces, columns)

    def share(self, folder: Path | str, ranks: Ranks) -> Examples:
        return share_examples(Tokenising(self.make, lambda: KEY), cache_of(DataConfig(cache=str(folder))), ranks, self)


class Metered(Ranks):
    """Counts the bytes that are sent to other nodes."""

    def to_nodes(self, block: torch.Tensor) -> None:
        SENT.append(block.nbytes)
        super().to_nodes(block)


SENT: list[int] = []


def is_mapped(array: Any) -> bool:
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array.obj if isinstance(array, memoryview) else array, mmap.mmap)


def on_ranks(folder: Path) -> None:
    started = Ranks.start()
    ranks = Metered(started.rank, started.world_size, 2, started.device)
    node = ranks.rank // 2
    (folder / "file").touch()
    found = {}
    places: dict[str, Path | str] = {
        "one folder": folder / "one",
        "own folders": folder / ("one" if node == 0 else "other"),
        "own folders again": folder / ("one" if node == 0 else "other"),
        "damaged on node 1": folder / ("one" if node == 0 else "other"),
        "unusable on node 1": folder / ("one" if node == 0 else "file/rows"),
        "none": "none",
    }
    for name, place in places.items():
        if name == "damaged on node 1" and ranks.rank == 2:
            path = Path(place) / KEY / "tokens.bin"
            path.write_bytes(path.read_bytes()[:-4] + b"\7\7\7\7")
        ranks.barrier()
        SENT.clear()
        rows = Rows(2000)
        examples = rows.share(place, ranks)
        entry = Path(place) / KEY
        found[name] = {
            "digest": examples.digest(),
            "mapped": is_mapped(examples.tokens),
            "times": rows.times if name != "none" else 0,
            "notes": rows.notes if ranks.is_main else [],
            "sent": sum(SENT),
            "files": {path.name: path.stat().st_size for path in sorted(entry.glob("*.bin"))},
        }
    (folder / f"found.{ranks.rank}").write_text(json.dumps(found))
    started.barrier()
    started.stop()


def on_disks(folder: Path) -> None:
    alone = Ranks(0, 1, 1, torch.device("cpu"))
    found: dict[str, Any] = {}
    digests = set()

    def share(name: str, rows: Rows) -> None:
        digests.add(rows.share(folder, alone).digest())
        files = sorted(path.name for path in folder.iterdir())
        found[name] = {"notes": rows.notes, "files": files, "times": rows.times}

    def mount(*options: str) -> None:
        subprocess.run(["mount", *options, folder], check=True)

    mount("-t", "tmpfs", "-o", "size=3m", "tmpfs")
    share("full", Rows(10_000))  # 8 MB
    mount("-o", "remount,ro")
    share("read-only, empty", Rows(10_000))
    mount("-o", "remount,rw,size=30m")
    rows = Rows(10_000)
    rows.share(folder, alone)
    mount("-o", "remount,ro")
    share("read-only, written before", rows)
    print(json.dumps({**found, "digests": len(digests)}))


if __name__ == "__main__":
    {"ranks": on_ranks, "disks": on_disks}[sys.argv[1]](Path(sys.argv[2]))
