"""Measure milliseconds, TFLOP/s and bytes of every prefix-attention backend, against the usual alternatives.

    python benchmarks/bench_prefix_attention.py --output benchmarks/results/gpu/prefix_attention.json   # a GPU
    python benchmarks/bench_prefix_attention.py --grid quick --output quick.json                   # seconds, on a CPU
    python benchmarks/bench_prefix_attention.py --grid cpu --dtype bfloat16 --output …      # short prefixes on a CPU

Rivals: (i) the prefix expanded over the batch and concatenated to the keys, then SDPA, as PEFT does (packed sequences
become a padded batch); (ii) the same keys with compiled FlexAttention (a pack needs no expanded prefix; GPU only, and
only on some cells, because each needs a compilation); (iii) no prefix: a lower bound.

All rivals run in one process and take turns; a time is the median over `--repeats`. TFLOP/s count the pairs of a query
and a visible key: 4 · D · heads per pair in forward, 2.5 times that in backward. A rival's work on padding therefore
counts as time but not as work. `kept` is the number of bytes saved for backward, without the inputs; `peak` (GPU) is
the highest allocation during forward and backward. Each output is compared with (i) before it is timed. If a rival
refuses a cell, runs out of memory or fails, its row records that, and the other rivals continue. A cell's rows are
written to OUTPUT as soon as the cell is measured (rows.py); the same rows as .csv and a plot are written next to it.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ptd_kernels import available_backends, prefix_attention
from ptd_kernels.prefix_attention import joined
from rows import Rows, Skip, add_arguments
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ptd.engine.host_memory import keep_freed_memory

CONCAT, FLEX, NO_PREFIX = "expand + concat + SDPA", "FlexAttention", "no prefix"
LEAVES = ("q", "k", "v", "prefix_k", "prefix_v")


@dataclass(frozen=True)
class Cell:
    """One problem. With `lengths` it is packed: S is their sum and B is 1. `T` is the number of own keys, None: S."""

    name: str
    B: int
    S: int
    P: int
    Hq: int = 32
    Hkv: int = 8
    D: int = 128
    T: int | None = None
    causal: bool = True
    lengths: tuple[int, ...] | None = None
    flex: bool = False

    @property
    def keys(self) -> int:
        return self.S if self.T is None else self.T

    def pairs(self) -> tuple[int, int]:
        """Return the number of visible (query, own key) pairs and of (query, prefix key) pairs in the batch or pack."""
        own = 0
        for length in self.lengths or (self.S,) * self.B:
            keys = self.keys if self.lengths is None else length
            own += length * keys - (length * (length - 1) // 2 if self.causal else 0)
        return own, self.B * self.S * self.P

    def teraflops(self, who: str, direction: str) -> float:
        own, prefix = self.pairs()
        pairs = own if who == NO_PREFIX else own + prefix
        return 4e-12 * self.Hq * self.D * pairs * (2.5 if direction == "backward" else 1.0)


def _mixed(number: int, mean: int) -> tuple[int, ...]:
    """Return `number` lengths from a quarter of the mean to nearly twice the mean."""
    return tuple(mean // 4 + (3 * mean // 2) * i // max(1, number - 1) for i in range(number))


_PACK = _mixed(32, 512)
FULL = [
    *(Cell(f"P {P}", 4, 4096, P, flex=P in (128, 2048)) for P in (32, 128, 512, 2048, 8192)),
    *(Cell(f"S {S}", 16384 // S, S, 128) for S in (512, 2048, 16384)),
    *(Cell(f"head {D}", 4, 4096, 128, D=D) for D in (64, 80, 256)),
    Cell("multi-head", 4, 4096, 128, Hkv=32),
    Cell("bidirectional", 32, 512, 128, Hq=16, Hkv=16, D=64, causal=False, flex=True),
    *(Cell(f"packed, P {P}", 1, sum(_PACK), P, lengths=_PACK, flex=P == 128) for P in (128, 2048)),
    *(Cell(f"decode, B {B}", B, 1, 128, T=4096) for B in (1, 16)),
]
_SMALL = {"Hq": 4, "Hkv": 2, "D": 32}
QUICK = [
    Cell("P 8", 2, 64, 8, **_SMALL),
    Cell("P 128", 2, 64, 128, **_SMALL),
    Cell("packed", 1, sum(_mixed(4, 32)), 16, lengths=_mixed(4, 32), **_SMALL),
    Cell("decode", 2, 1, 16, T=64, **_SMALL),
]
_EVEN = (78, 112, 61, 85, 70, 94, 55, 89)
_SKEWED = (31, 62, 88, 120, 154, 210, 331, 760)
CPU = [
    Cell(f"{name}, P {P}", 1, sum(lengths), P, Hq=8, Hkv=4, D=64, lengths=lengths)
    for name, lengths in (("even", _EVEN), ("skewed", _SKEWED))
    for P in (8, 30, 64, 128, 256)
]
"""Eight sequences with the lengths of E2E or of instructions, to find where `joined` pays; `main` lifts its limit."""
GRIDS = {"full": FULL, "quick": QUICK, "cpu": CPU}


def tensors(cell: Cell, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v, prefix_k and prefix_v in the memory layout of Hugging Face models."""
    torch.manual_seed(0)
    shapes = [
        (cell.B, cell.S, cell.Hq, cell.D), (cell.B, cell.keys, cell.Hkv, cell.D), (cell.B, cell.keys, cell.Hkv, cell.D),
        (cell.P, cell.Hkv, cell.D), (cell.P, cell.Hkv, cell.D),
    ]  # fmt: skip
    made = [torch.randn(shape, device=device, dtype=dtype).transpose(-3, -2) for shape in shapes]
    return [x.requires_grad_(cell.S > 1) for x in made]


def rivals(cell: Cell, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Return functions of q, k, v, prefix_k, prefix_v by name; all return ``[B, Hq, S, D]``."""
    cu_seqlens = None
    if cell.lengths is not None:
        cu_seqlens = torch.tensor([0, *cell.lengths], device=device).cumsum(0).int()
    longest = None if cell.lengths is None else max(cell.lengths)
    options: dict[str, Any] = {"causal": cell.causal, "cu_seqlens": cu_seqlens, "max_seqlen": longest}
    named: dict[str, Callable[..., Tensor]] = {}
    for backend in available_backends():
        if backend not in ("reference", "merge-plain-torch"):
            named[backend] = lambda *x, backend=backend: attend(*x, backend=backend, **options)
    named[CONCAT] = lambda *x: concat_sdpa(cell, *x)
    named[NO_PREFIX] = lambda q, k, v, *_: without_prefix(cell, options, q, k, v)
    if cell.flex and device.type == "cuda":
        compiled = functools.cache(lambda: flex(cell, cu_seqlens, device))
        named[FLEX] = lambda *x: compiled()(*x)
    return named


def attend(*x: Tensor, backend: str, **options: Any) -> Tensor:
    """Call `prefix_attention`. Raises `Skip` for a problem that the backend refuses."""
    try:
        return prefix_attention(*x, backend=backend, **options)
    except ValueError as refusal:
        if "cannot do this" in str(refusal):
            raise Skip(str(refusal)) from None
        raise


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    rows, keys = q.shape[2], k.shape[2]
    if not causal or rows == 1:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    if rows == keys:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # SDPA passes this mask to flash attention as a flag; a dense mask would rule that kernel out.
    bias = causal_lower_right(rows, keys)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


def concat_sdpa(cell: Cell, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """Compute rival (i). A pack becomes a batch padded on the right; the causal rule hides the padding."""
    if cell.lengths is not None:
        q, k, v = (_pad(x, cell.lengths) for x in (q, k, v))
    k = torch.cat([prefix_k.expand(len(k), -1, -1, -1), k], dim=2)
    v = torch.cat([prefix_v.expand(len(v), -1, -1, -1), v], dim=2)
    out = _sdpa(q, k, v, cell.causal)
    if cell.lengths is None:
        return out
    return torch.cat([out[i, :, :length] for i, length in enumerate(cell.lengths)], dim=1)[None]


def _pad(x_1HNX: Tensor, lengths: tuple[int, ...]) -> Tensor:
    parts = [part.transpose(1, 2)[0] for part in x_1HNX.split(lengths, dim=2)]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).transpose(1, 2)


def without_prefix(cell: Cell, options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute rival (iii)."""
    if cell.lengths is not None or cell.keys != cell.S:
        return prefix_attention(q, k, v, None, None, backend="merge", **options)
    return _sdpa(q, k, v, cell.causal)


def flex(cell: Cell, cu_seqlens: Tensor | None, device: torch.device) -> Callable[..., Tensor]:
    """Return rival (ii)."""
    P, offset = cell.P, cell.keys - cell.S
    sequence_S = torch.zeros(cell.S, dtype=torch.int64, device=device)
    if cu_seqlens is not None:
        sequence_S = torch.searchsorted(cu_seqlens, torch.arange(cell.S, device=device), right=True)

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        own = key - P
        seen = own <= row + offset if cell.causal else own >= 0
        if cu_seqlens is not None:
            seen = seen & (sequence_S[row] == sequence_S[own.clamp(min=0)])
        return (key < P) | seen

    mask = create_block_mask(visible, None, None, cell.S, P + cell.keys, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        k = torch.cat([prefix_k.expand(len(k), -1, -1, -1), k], dim=2)
        v = torch.cat([prefix_v.expand(len(v), -1, -1, -1), v], dim=2)
        return compiled(q, k, v, block_mask=mask, enable_gqa=True)

    return run


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the milliseconds of ``run()``, and its result."""
    if device.type != "cuda":
        began = time.perf_counter()
        result = run()
        return 1e3 * (time.perf_counter() - began), result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), result


def kept_bytes(run: Callable[[], Tensor], inputs: list[Tensor]) -> int:
    """Return the bytes of the storages saved for backward, without those of the inputs."""
    storages: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = run()
    given = {x.untyped_storage().data_ptr() for x in inputs}
    size = sum(size for where, size in storages.items() if where not in given)
    del out
    return size


def try_out(
    run: Callable[..., Tensor], needed: list[Tensor], x: list[Tensor], dout: Tensor | None, expected: Tensor | None
) -> dict[str, Any]:
    """Warm up, compile and tune; return the error of the output and the memory needed. ``dout`` None: no backward."""

    def both() -> Tensor:
        out = run(*x)
        if dout is not None:
            torch.autograd.grad(out, needed, dout)
        return out.detach()

    found: dict[str, Any] = {"error": None, "peak": None}
    out = both()
    if expected is not None:
        found["error"] = ((out.float() - expected.float()).norm() / expected.float().norm()).item()
        bound = 1e-4 if out.dtype == torch.float32 else 2e-2
        if not found["error"] < bound:
            raise ArithmeticError(f"its output is off by {found['error']:.1e}")
    del out
    if x[0].device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        found["peak"] = torch.cuda.max_memory_allocated() - before
    return {**found, "kept": kept_bytes(lambda: run(*x), x)}


def measure(cell: Cell, device: torch.device, dtype: torch.dtype, repeats: int, rows: Rows) -> None:
    """Add a row for each rival that has none yet; a rival that fails does not stop the others."""
    named = {who: run for who, run in rivals(cell, device).items() if not rows.has(name=cell.name, who=who)}
    if not named:
        return
    rows.begin(name=cell.name, who=next(iter(named)))
    x = tensors(cell, device, dtype)
    dout = None
    if cell.S > 1:
        dout = torch.randn(cell.B, cell.S, cell.Hq, cell.D, device=device, dtype=dtype).transpose(1, 2)
    try:
        expected = concat_sdpa(cell, *x).detach()
    except torch.OutOfMemoryError:  # outputs are then not compared; the row of (i) records the failure
        expected = None
    tried: dict[str, dict[str, Any]] = {}
    for who, run in named.items():
        rows.mark(name=cell.name, who=who)
        needed = x[:3] if who == NO_PREFIX else x
        try:
            tried[who] = try_out(run, needed, x, dout, None if who == NO_PREFIX else expected)
        except Exception as error:
            rows.failed(error, name=cell.name, who=who)
    times: dict[str, dict[str, list[float]]] = {who: {"forward": [], "backward": []} for who in tried}
    for _ in range(repeats):
        for who in list(times):
            rows.mark(name=cell.name, who=who)
            try:
                ms, out = timed(lambda who=who: named[who](*x), device)
                times[who]["forward"].append(ms)
                if dout is not None:
                    needed = x[:3] if who == NO_PREFIX else x
                    ms, _ = timed(lambda out=out, needed=needed: torch.autograd.grad(out, needed, dout), device)
                    times[who]["backward"].append(ms)
                del out
            except Exception as error:
                del times[who]
                rows.failed(error, name=cell.name, who=who)
    sizes = {key: value for key, value in asdict(cell).items() if key not in ("flex", "lengths")}
    sizes |= {"T": cell.keys, "dtype": str(dtype).removeprefix("torch."), "packed": cell.lengths is not None}
    found = []
    for who, directions in times.items():
        row = {**sizes, "who": who, **tried[who]}
        for direction, all_ms in directions.items():
            if all_ms:
                ms = statistics.median(all_ms)
                rate = 1e3 * cell.teraflops(who, direction) / ms
                row[direction] = {"ms": ms, "teraflops_per_second": rate}
                print(f"{cell.name:16} {who:24} {direction:9} {ms:9.3f} ms {rate:8.2f} TFLOP/s", flush=True)
        found.append(row)
    rows.add(*found)


def by_direction(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a flat row for each measured rival and direction."""
    flat = []
    for record in records:
        shared = {key: value for key, value in record.items() if not isinstance(value, dict) and key != "outcome"}
        flat += [
            {**shared, "direction": direction, **record[direction]}
            for direction in ("forward", "backward")
            if record["outcome"] == "measured" and direction in record
        ]
    return flat


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Plot the time relative to (i): one group of bars per cell, one panel per direction."""
    from matplotlib.figure import Figure

    who = [name for name in dict.fromkeys(row["who"] for row in rows) if name != CONCAT]
    cells = list(dict.fromkeys(row["name"] for row in rows))
    ms = {(row["name"], row["direction"], row["who"]): row["ms"] for row in rows}
    figure = Figure(figsize=(max(7, 1.1 * len(cells)), 7), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, direction in zip(panels, ("forward", "backward"), strict=True):
        for i, name in enumerate(who):
            heights = [
                ms.get((cell, direction, name), math.nan) / ms.get((cell, direction, CONCAT), math.nan)
                for cell in cells
            ]
            axes.bar(
                [c + (i + 0.5) / (len(who) + 1) for c in range(len(cells))], heights, 1 / (len(who) + 1), label=name
            )
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_ylabel(f"{direction}: time / {CONCAT}")
        axes.set_ylim(bottom=0)
    panels[0].legend(fontsize="small", ncols=3)
    panels[1].set_xticks([c + 0.5 for c in range(len(cells))], cells, rotation=30, ha="right")
    figure.savefig(file, dpi=120)


def show(records: list[dict[str, Any]], output: Path) -> None:
    """Write the rows as .csv and .png next to their file."""
    rows = by_direction(records)
    if not rows:
        return
    with output.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    try:
        plot(rows, output.with_suffix(".png"))
    except ImportError as error:
        print(f"no plot was drawn: {error}")


def main() -> None:
    """Measure the cells of the grid that have no rows yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=GRIDS, default="full", help="quick: four tiny cells; cpu: short prefixes")
    parser.add_argument("--threads", type=int, help="on a CPU; default: torch's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16, CPU float32")
    parser.add_argument("--repeats", type=int, default=15)
    add_arguments(parser)
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.grid == "cpu":
        keep_freed_memory()  # as a run does
        joined.LONGEST_PREFIX = max(cell.P for cell in CPU)
    settings = {"grid": args.grid, "dtype": str(dtype), "repeats": args.repeats, "threads": torch.get_num_threads()}
    rows = Rows(
        args.output, ("name", "who"), program="bench_prefix_attention", packages=("triton",), device=device,
        settings=settings, replace=args.replace, minutes=args.minutes,
    )  # fmt: skip
    try:
        for cell in GRIDS[args.grid]:
            measure(cell, device, dtype, args.repeats, rows)
    finally:
        if args.output is not None:
            show(rows.records, args.output)
    rows.close()


if __name__ == "__main__":
    main()
