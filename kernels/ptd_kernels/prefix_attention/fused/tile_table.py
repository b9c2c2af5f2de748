"""Tile sizes of the Triton kernels, by architecture, precision and head size. Chosen by what the compiler reports.

Nothing here has been timed yet. The tiles are the largest ones that spill no registers up to head size 128 and fit into
shared memory (tests/ptd_kernels/test_triton_compile.py asserts both; README.md has the numbers). On a GPU, the tile of
`TABLE` is timed against the few of `ALTERNATIVES` (tuning.py), which meet the same two conditions.
"""

from __future__ import annotations

from typing import NamedTuple

KERNELS = ("forward", "query_gradient", "key_gradient", "prefix_gradient")


class Tile(NamedTuple):
    """`rows` query rows × `keys` keys, computed by `warps` warps. The loop loads `stages` - 1 tiles ahead."""

    rows: int
    keys: int
    warps: int
    stages: int


def _tiles(forward: Tile, query: Tile, key: Tile, prefix: Tile | None = None) -> dict[str, Tile]:
    return dict(zip(KERNELS, (forward, query, key, prefix or key), strict=True))


# (architecture, is it 16-bit, largest head size): an entry covers the head sizes above the next smaller entry's.
# All sm_80 tiles fit into the 99 KiB of shared memory of 8.6, 8.9 and 12.0; every GPU except 9.x uses them.
TABLE: dict[tuple[int, bool, int], dict[str, Tile]] = {
    (90, True, 32): _tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    (90, True, 64): _tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    (90, True, 128): _tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    (90, True, 256): _tiles(Tile(128, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    (80, True, 32): _tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 3)),
    (80, True, 64): _tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(32, 64, 4, 3), Tile(64, 64, 8, 2)),
    (80, True, 128): _tiles(Tile(128, 32, 8, 3), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
    (80, True, 256): _tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (80, False, 32): _tiles(Tile(64, 64, 8, 2), Tile(32, 64, 4, 1), Tile(32, 64, 4, 2)),
    (80, False, 64): _tiles(Tile(64, 32, 8, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    (80, False, 128): _tiles(Tile(32, 16, 8, 1), Tile(16, 64, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1)),
    (80, False, 256): _tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
# fp32 in IEEE precision runs on the CUDA cores, so both architectures use the same tiles.
TABLE |= {(90, half, width): tiles for (arch, half, width), tiles in TABLE.items() if arch == 80 and not half}

# Smaller tiles and fewer warps: they may be faster for small problems, or where registers limit the occupancy.
ALTERNATIVES: dict[tuple[int, int], dict[str, tuple[Tile, ...]]] = {
    (90, 64): {
        "forward": (Tile(128, 64, 8, 3), Tile(64, 128, 4, 3), Tile(64, 64, 4, 3)),
        "query_gradient": (Tile(64, 64, 4, 3), Tile(128, 32, 8, 3)),
        "key_gradient": (Tile(64, 64, 4, 2), Tile(64, 64, 8, 3)),
        "prefix_gradient": (Tile(64, 64, 4, 2), Tile(64, 64, 8, 3)),
    },
    (90, 128): {
        "forward": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        "query_gradient": (Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        "prefix_gradient": (Tile(64, 64, 8, 2),),
    },
    (90, 256): {"forward": (Tile(128, 32, 8, 2), Tile(64, 32, 4, 2))},
    (80, 64): {
        "forward": (Tile(64, 64, 4, 3), Tile(128, 32, 4, 3)),
        "query_gradient": (Tile(64, 32, 4, 3),),
        "prefix_gradient": (Tile(32, 64, 4, 2),),
    },
    (80, 128): {
        "forward": (Tile(64, 32, 4, 3),),
        "query_gradient": (Tile(64, 32, 8, 2),),
        "key_gradient": (Tile(64, 64, 8, 1),),
        "prefix_gradient": (Tile(64, 64, 8, 1),),
    },
    (80, 256): {"forward": (Tile(32, 32, 4, 2),)},
}

# With a bias, `tiles_for` halves the keys of a tile. These entries replace the tiles that spill even so, all in fp32.
BIASED: dict[int, dict[str, Tile]] = {
    32: {"key_gradient": Tile(32, 64, 8, 1)},
    64: {"forward": Tile(32, 16, 8, 1), "query_gradient": Tile(32, 16, 8, 1)},
    128: {"forward": Tile(16, 16, 8, 1), "query_gradient": Tile(16, 16, 8, 1)},
}

# For the interpreter: small, so that short sequences have several tiles, and mostly not square, so that tests notice
# when rows and keys are swapped.
INTERPRETED = _tiles(Tile(64, 16, 4, 1), Tile(32, 32, 4, 1), Tile(16, 64, 4, 1), Tile(64, 16, 4, 1))
# For the decode kernel: (is it 16-bit, largest head size) -> tile without its rows, whose number depends on the call.
DECODE: dict[tuple[bool, int], Tile] = {
    (True, 128): Tile(0, 32, 4, 3),
    (True, 256): Tile(0, 32, 8, 2),
    (False, 256): Tile(0, 16, 8, 1),
}
DELTA = Tile(32, 0, 4, 1)
MERGE = Tile(16, 0, 4, 1)
# For the kernel of a prefix that fits into one tile: (architecture, largest head size) -> tiles by number of keys.
SHORT_PREFIX: dict[tuple[int, int], tuple[Tile, ...]] = {
    (90, 64): (Tile(64, 32, 8, 3), Tile(64, 64, 8, 3)),
    (90, 128): (Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    (90, 256): (Tile(32, 32, 8, 2),),
    (80, 64): (Tile(32, 32, 4, 3), Tile(32, 64, 4, 2)),
    (80, 128): (Tile(32, 32, 4, 2), Tile(32, 64, 8, 2)),
    (80, 256): (Tile(32, 32, 8, 2),),
    (0, 256): (Tile(16, 32, 4, 1), Tile(32, 64, 4, 1)),
}
WIDTHS = (32, 64, 128, 256)


def tiles_for(kernel: str, architecture: int, half: bool, head_size: int, biased: bool = False) -> tuple[Tile, ...]:
    """Return the tiles of `kernel` for a device of this compute capability (90 is 9.0), or for the interpreter (0).

    The first tile is the one to use without timing.
    """
    if architecture == 0:
        return (INTERPRETED[kernel],)
    architecture, width = 90 if architecture // 10 == 9 else 80, next(w for w in WIDTHS if head_size <= w)
    tiles = TABLE[architecture, half, width][kernel], *_alternatives(kernel, architecture, half, width)
    if biased and not half and kernel in BIASED.get(width, {}):
        return (BIASED[width][kernel],)
    if biased and kernel in ("forward", "query_gradient"):
        # The tile of biases and its addresses need the registers that half of the scores would occupy.
        wide = [tile for tile in tiles if tile is tiles[0] or tile.keys >= 64]
        tiles = tuple(tile._replace(keys=max(16, tile.keys // 2)) for tile in wide)
    return tuple(dict.fromkeys(tiles))


def short_prefix_tile(keys: int, architecture: int, head_size: int) -> Tile | None:
    """Return the tile that holds a prefix of so many keys in 16-bit precision, or None if none of the tiles does."""
    if architecture:
        architecture = 90 if architecture // 10 == 9 else 80
    width = min(w for arch, w in SHORT_PREFIX if arch == architecture and head_size <= w)
    return next((tile for tile in SHORT_PREFIX[architecture, width] if keys <= tile.keys), None)


def _alternatives(kernel: str, architecture: int, half: bool, width: int) -> tuple[Tile, ...]:
    return ALTERNATIVES.get((architecture, max(64, width)), {}).get(kernel, ()) if half else ()


def decodes(queries: int, group: int, half: bool) -> bool:
    """Return whether the decode kernel supports this many queries, with `group` query heads per key/value head.

    It needs few queries whose rows fit into one tile.
    """
    return queries <= 4 and queries * group <= (64 if half else 16)


def decode_tile(rows: int, architecture: int, half: bool, head_size: int) -> Tile:
    """Return the tile of the decode kernel for this many query rows per key/value head."""
    width = min(w for is_half, w in DECODE if is_half == half and head_size <= w)
    tile = Tile(0, 16, 4, 1) if architecture == 0 else DECODE[half, width]
    return tile._replace(rows=max(16, 1 << (rows - 1).bit_length()))
