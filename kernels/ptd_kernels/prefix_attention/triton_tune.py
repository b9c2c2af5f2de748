"""Which of a few tiles is the fastest on this GPU: timed once for each kind of problem, and kept in a file.

A kind is a GPU, a version of Triton, a kernel, a dtype, head sizes, the compiled-in options, and the sizes rounded up
to powers of two. The candidates are triton_table.py's, all checked ahead of time by the tests. One that does not fit,
for want of shared memory, registers or memory, is passed over: when tiles are timed, and when one is run.

Nothing is timed

- where there is one candidate (fp32, the interpreter);
- with ``PTD_KERNELS_TUNE=0``, or under ``torch.use_deterministic_algorithms(True)``: the table's own tile, so that a
  result does not hang on a timing (another tile adds in another order);
- while a CUDA graph is captured: a tile chosen before, or the table's own.

The file is ``tiles.json`` in ``PTD_KERNELS_CACHE``, else in ``$XDG_CACHE_HOME/ptd_kernels`` or
``~/.cache/ptd_kernels``. Deleting it is always safe.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from ptd_kernels.prefix_attention.triton_table import Tile

T = TypeVar("T")


def cache_file() -> Path:
    """Where the choices are kept."""
    folder = os.environ.get("PTD_KERNELS_CACHE")
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ptd_kernels")
    return Path(folder, "tiles.json")


class Choices:
    """Tiles by key, in memory and in `file`. Processes may share the file; the last to write a key wins."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known: dict[str, Tile] | None = None

    def get(self, key: str) -> Tile | None:
        """The tile chosen for `key` here or by an earlier process."""
        if self._known is None:
            self._known = self._read()
        return self._known.get(key)

    def put(self, key: str, tile: Tile) -> None:
        """Keep it; where the file cannot be written, for this process only."""
        known = self._read() | (self._known or {}) | {key: tile}
        self._known = known
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # A reader sees the old file or the new one, never a part.
            handle, name = tempfile.mkstemp(dir=self.file.parent, suffix=".json")
            with os.fdopen(handle, "w") as file:
                json.dump(dict(sorted(known.items())), file, indent=1)
            os.replace(name, self.file)

    def _read(self) -> dict[str, Tile]:
        try:
            return {key: Tile(*map(int, tile)) for key, tile in json.loads(self.file.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}


def size_class(*sizes: int) -> str:
    """The sizes, each rounded up to a power of two."""
    return "x".join(str(1 << max(0, size - 1).bit_length()) if size else "0" for size in sizes)


def allowed() -> bool:
    """Whether tiles may be chosen by timing at all."""
    return os.environ.get("PTD_KERNELS_TUNE") != "0" and not torch.are_deterministic_algorithms_enabled()


class NoTileFits(RuntimeError):
    """None of a kernel's tiles can run on this GPU."""


def run_first(kernel: str, tiles: Sequence[Tile], run: Callable[[Tile], T], too_much: Callable[[Exception], bool]) -> T:
    """``run(tile)`` of the first tile for which it does not ask for too much.

    Raises the error of the last tile if that is for want of memory, which other work may hold, else NoTileFits.
    """
    reasons: dict[Tile, str] = {}
    for tile in tiles:
        try:
            return run(tile)
        except Exception as error:
            if not too_much(error):
                raise
            if tile == tiles[-1] and isinstance(error, torch.OutOfMemoryError):
                raise
            reasons[tile] = str(error).strip().partition("\n")[0]
    tried = "; ".join(f"{tile.rows} × {tile.keys}, {tile.warps} warps: {reason}" for tile, reason in reasons.items())
    raise NoTileFits(f"the Triton kernel {kernel} fits this GPU with none of its tiles ({tried}); use backend='merge'")


def choose(
    key: str, candidates: Sequence[Tile], measure: Callable[[Tile], float], choices: Choices, may_measure: bool = True
) -> Tile:
    """The candidate for which `measure` returned least (inf: it cannot run), now or earlier; else the first."""
    known = choices.get(key)
    if known is not None and known in candidates:
        return known
    if not may_measure:
        return candidates[0]
    times = {tile: measure(tile) for tile in candidates}
    best = min(candidates, key=times.__getitem__)
    if math.isfinite(times[best]):
        choices.put(key, best)
        return best
    return candidates[0]
