"""Choose the fastest of a few tiles on this GPU: time them once per kind of problem, and store the choice in a file.

A kind is a GPU, a version of Triton, a kernel, a dtype, head sizes, the compiled-in options, and the sizes rounded up
to powers of two. The candidates come from tile_table.py; the tests check all of them ahead of time. A tile that needs
too much shared memory, too many registers or too much memory is skipped, both when tiles are timed and when one is run.

Nothing is timed

- if there is only one candidate (fp32, the interpreter);
- with ``PTD_KERNELS_TUNE=0``, or under ``torch.use_deterministic_algorithms(True)``: the table's own tile is used, so
  that a result does not depend on a timing (another tile adds in another order);
- while a CUDA graph is captured: a tile chosen before, or the table's own tile, is used.

The file is ``tiles.json`` in ``PTD_KERNELS_CACHE``, else in ``$XDG_CACHE_HOME/ptd_kernels`` or
``~/.cache/ptd_kernels``. It is always safe to delete the file.
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

from ptd_kernels.prefix_attention.fused.tile_table import Tile

T = TypeVar("T")


def cache_file() -> Path:
    """Return the path of the file that stores the choices."""
    folder = os.environ.get("PTD_KERNELS_CACHE")
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ptd_kernels")
    return Path(folder, "tiles.json")


class Choices:
    """Tiles by key, in memory and in `file`. Processes may share the file; the last one to write a key wins."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known: dict[str, Tile] | None = None

    def get(self, key: str) -> Tile | None:
        """Return the tile that this process or an earlier one chose for `key`, or None."""
        if self._known is None:
            self._known = self._read()
        return self._known.get(key)

    def put(self, key: str, tile: Tile) -> None:
        """Store `tile` for `key`. If the file cannot be written, the choice is valid for this process only."""
        known = self._read() | (self._known or {}) | {key: tile}
        self._known = known
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # A reader sees the old file or the new one, never a partial file.
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
    """Return the sizes as text, each rounded up to a power of two."""
    return "x".join(str(1 << max(0, size - 1).bit_length()) if size else "0" for size in sizes)


def allowed() -> bool:
    """Return whether tiles may be chosen by timing."""
    return os.environ.get("PTD_KERNELS_TUNE") != "0" and not torch.are_deterministic_algorithms_enabled()


class NoTileFits(RuntimeError):
    """None of a kernel's tiles can run on this GPU."""


def run_first(kernel: str, tiles: Sequence[Tile], run: Callable[[Tile], T], too_much: Callable[[Exception], bool]) -> T:
    """Return ``run(tile)`` of the first tile that does not need too much (`too_much` judges the error it raises).

    If no tile fits, raises the last tile's error if that is a lack of memory, which other work may hold; else raises
    `NoTileFits`.
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
    raise NoTileFits(f"none of the tiles of the Triton kernel {kernel} fits this GPU ({tried}); use backend='merge'")


def choose_candidate(
    key: str, candidates: Sequence[Tile], measure: Callable[[Tile], float], choices: Choices, may_measure: bool = True
) -> Tile:
    """Return the candidate with the lowest `measure` (inf: it cannot run), measured now or earlier; else the first."""
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
