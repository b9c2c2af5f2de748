"""Compile the Triton kernels of `prefix_attention` ahead of time, without a GPU, and report what the compiler says.

    python tests/ptd_kernels/compile_triton_kernels.py --head 64,64 --dtype bf16 --variant causal all --arch 90

prints one JSON object per kernel. ``--markdown`` prints a table, ``--tile`` tries another tile, ``--summary FILE …``
makes the tables of the operator's README from the printed objects. Do not set TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import triton
from ptd_kernels.prefix_attention.fused import backward, decode, forward, merge, short_prefix
from ptd_kernels.prefix_attention.fused.tile_table import (
    DELTA,
    MERGE,
    WIDTHS,
    Tile,
    decode_tile,
    decodes,
    short_prefix_tile,
    tiles_for,
)
from ptd_kernels.prefix_attention.fused.tiles import padded
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SOURCES = {
    "forward": forward.forward_kernel,
    "query_gradient": backward.query_gradient_kernel,
    "key_gradient": backward.key_gradient_kernel,
    "prefix_gradient": backward.prefix_gradient_kernel,
    "decode": decode.decode_kernel,
    "merge_splits": decode.merge_splits_kernel,
    "delta": backward.delta_kernel,
    "short_prefix": short_prefix.short_prefix_kernel,
    "merge": merge.merge_kernel,
}
FEATURES = ("CAUSAL", "WINDOW", "SOFTCAP", "PACKED", "BIAS", "SEVERAL")
VARIANTS = {
    "bidirectional": (),
    "causal": ("CAUSAL",),
    "packed": ("CAUSAL", "PACKED"),
    "window": ("CAUSAL", "WINDOW"),
    "softcap": ("CAUSAL", "SOFTCAP"),
    "bias": ("BIAS",),
    "mask": ("BIAS",),
    "several": ("CAUSAL", "PACKED", "SEVERAL"),
    "all": FEATURES,
    "merge": ("ADD",),
}
FP32 = {("decode", "out"), ("merge_splits", "outs"), ("merge_splits", "sums")}
"""Partial sums, which are in fp32 whatever the queries' dtype."""
SCALARS = {
    **dict.fromkeys(("inner", "outer", "scale"), "fp32"),
    **dict.fromkeys(("lse", "delta", "partial", "first_lse", "second_lse"), "*fp32"),
    **dict.fromkeys(
        ("cu_seqlens", "prefix_index", "prefix_bounds", "item_bounds", "item_sequence", "item_row"), "*i32"
    ),
}


def signature(name: str, dtype: str, variant: str) -> tuple[dict[str, str], dict[tuple[int], list[list[Any]]]]:
    """Return the argument types and alignments that a launch with Hugging Face's tensors would give."""
    kernel = SOURCES[name]
    types, attributes = {}, {}
    # Arguments that Triton may not specialise on have no known alignment; pointers and strides are multiples of 16.
    lengths = {"num_sequences", "S", "T", "P", "window", "group", "tiles", "last_item", "num_prefixes", "splits"}
    for i, parameter in enumerate(kernel.params):
        argument = parameter.name
        if parameter.is_constexpr:
            types[argument] = "constexpr"
        elif argument in SCALARS:
            types[argument] = SCALARS[argument]
        elif argument in lengths or re.fullmatch(r"\w+_[bhstp]", argument):
            types[argument] = "i32"
        elif (name, argument) in FP32:
            types[argument] = "*fp32"
        elif argument == "bias" and variant == "mask":
            types[argument] = "*i1"
        else:
            types[argument] = f"*{dtype}"
        if types[argument] not in ("constexpr", "fp32") and argument not in lengths:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return types, attributes


def candidates(name: str, arch: int, dtype: str, D: int, E: int, variant: str) -> tuple[Tile, ...]:
    """Return the tiles that such a call may get; the first one is the tile of the table."""
    if name in ("delta", "merge"):
        return (DELTA if name == "delta" else MERGE,)
    if name == "merge_splits":
        return (DELTA,)
    if name == "short_prefix":
        tiles = (short_prefix_tile(keys, arch, max(D, E)) for keys in (32, 64))
        return () if dtype == "fp32" else tuple(tile for tile in tiles if tile is not None)
    if name == "decode":
        half = dtype != "fp32"
        rows = max(group for group in range(1, 129) if decodes(1, group, half))
        return tuple(dict.fromkeys(decode_tile(n, arch, half, max(D, E)) for n in (rows, 1)))
    return tiles_for(name, arch, dtype != "fp32", max(D, E), "BIAS" in VARIANTS[variant])


def compile_kernel(
    name: str, arch: int, dtype: str, D: int, E: int, variant: str, tile: Tile | None = None
) -> dict[str, Any]:
    """Return the registers, spilled bytes, shared memory and use of wgmma of one kernel."""
    tile = tile or candidates(name, arch, dtype, D, E, variant)[0]
    constants: dict[str, Any] = {feature: feature in VARIANTS[variant] for feature in FEATURES}
    constants |= {"ADD": "ADD" in VARIANTS[variant], "QUERIES": True}
    constants |= {"D": D, "E": E, "BLOCK_D": padded(D), "BLOCK_E": padded(E)}
    constants |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "BLOCK_C": 16, "SPLIT": True}
    types, attributes = signature(name, dtype, variant)
    constants = {key: value for key, value in constants.items() if key in types}
    source = ASTSource(SOURCES[name], types, constants, attributes)
    began = time.perf_counter()
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - began
    return {
        "kernel": name, "arch": arch, "dtype": dtype, "D": D, "E": E, "variant": variant,
        "tile": f"{tile.rows}x{tile.keys}", "warps": tile.warps, "stages": tile.stages,
        **resources(compiled.asm["cubin"]), "shared": compiled.metadata.shared,
        "wgmma": "wgmma.mma_async" in compiled.asm["ptx"], "mma": "mma.sync" in compiled.asm["ptx"],
        "seconds": round(seconds, 1), "triton": triton.__version__,
    }  # fmt: skip


def resources(cubin: bytes) -> dict[str, int]:
    """Return registers and bytes of local memory per thread (values that spilled or could not live in registers)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        said = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))
    return {"registers": int(found["REG"]), "local": int(found["STACK"]) + int(found["LOCAL"])}


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the table's own tiles with the compiler's worst numbers over all head sizes, dtypes and variants."""
    columns = [name for name in SOURCES if name not in ("delta", "merge")]
    lines = [f"| GPU, type | head size | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for biased in (False, True):
        for arch, half, width in product((90, 80), (True, False), WIDTHS):
            if arch == 90 and not half:  # same tiles as on sm_80, and the same code except for a register or two
                continue
            cells = []
            for name in columns:
                found = [
                    row
                    for row in rows
                    if row["kernel"] == name
                    and (row["arch"] == arch or not half)
                    and (row["dtype"] != "fp32") == half
                    and width_of(row) == width
                    and ("BIAS" in VARIANTS[row["variant"]]) == biased
                ]
                cells.append(cell(found))
            kind = f"sm_{arch}, 16-bit" if half else "both, fp32"
            lines.append(f"| {kind}{', bias' if biased else ''} | ≤ {width} | {' | '.join(cells)} |")
    return "\n".join(lines)


def width_of(row: dict[str, Any]) -> int:
    return next(width for width in WIDTHS if max(row["D"], row["E"]) <= width)


def cell(rows: list[dict[str, Any]]) -> str:
    """Return ``tile warps stages: registers, bytes spilled, KiB shared`` for the rows with the first row's tile."""
    if not rows:
        return "–"
    first = rows[0]
    same = [row for row in rows if all(row[key] == first[key] for key in ("tile", "warps", "stages"))]
    registers, local, shared = (max(row[key] for row in same) for key in ("registers", "local", "shared"))
    shape = f"{first['tile'].replace('x', '×')} {first['warps']}w {first['stages']}s"
    return f"{shape}: {registers}, {local}, {round(shared / 1024)}"


def main() -> None:
    """Compile what the command line requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", default=tuple(SOURCES), choices=SOURCES)
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 90])
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--head", nargs="+", default=["64,64"], help="head sizes D,E")
    parser.add_argument("--variant", nargs="+", default=["causal"], choices=VARIANTS)
    parser.add_argument("--tile", type=int, nargs=4, help="rows keys warps stages, instead of the table's")
    parser.add_argument("--candidates", action="store_true", help="all tiles that may be chosen, not only the table's")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--summary", nargs="+", type=Path, metavar="FILE", help="compile nothing, sum up these rows")
    args = parser.parse_args()
    if args.summary:
        lines = [line for file in args.summary for line in file.read_text().splitlines()]
        print(summary([json.loads(line) for line in lines]))
        return
    columns = ("head", "kernel", "arch", "dtype", "variant", "tile", "warps", "stages", "registers", "local", "shared")
    if args.markdown:
        print("|", " | ".join(columns), "|\n|", " | ".join("---" for _ in columns), "|")
    tile = Tile(*args.tile) if args.tile else None
    for arch, dtype, head, kernel, variant in product(args.arch, args.dtype, args.head, args.kernel, args.variant):
        D, E = map(int, head.split(","))
        tiles = candidates(kernel, arch, dtype, D, E, variant) if args.candidates else (tile,)
        for one in tiles:
            row = compile_kernel(kernel, arch, dtype, D, E, variant, one)
            if args.markdown:
                print("|", " | ".join(str({**row, "head": head}[column]) for column in columns), "|", flush=True)
            else:
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
