"""Time the library kernels among which `auto` chooses for long causal sequences, and write the table it reads.

    python benchmarks/gpu_segments.py --output benchmarks/results/gpu/segments.json      # measure, on one NVIDIA GPU
    python benchmarks/gpu_segments.py --output benchmarks/results/gpu/segments.json --write-table      # needs no GPU

Each row is one kernel on one kind of segment: a forward and a backward pass over 16,384 own tokens, in sequences of
equal length, as a batch or packed. Before a kernel is timed, its output and gradients are compared with plain torch's
on two sequences of at most that length, with few heads. Times are medians; the kernels of a cell take turns. The table
(segments/timed.py describes it) gets the GPU's measured rows; a kernel that failed or is not installed is not in it.
Writing it changes what `auto` chooses, so it is a step of its own, after all measurements of this code.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_prefix_attention import timed
from ptd_kernels.prefix_attention.segments import EAGER, TIMED_KERNELS, TORCH_FLASH_CPU, Gradients, Kernel, Need, Rule
from ptd_kernels.prefix_attention.segments.timed import TIMED, read_timings
from rows import Rows, Skip, add_arguments, read
from torch import Tensor

ERROR = 2e-2
"""Largest error that bf16 explains, relative to the norm."""


@dataclass(frozen=True)
class Kind:
    """A kind of segment: sequences of ``tokens`` tokens, as a batch or packed; the timed ones have ``total`` in all."""

    head_size: int
    packed: bool
    tokens: int
    total: int = 16384

    @property
    def name(self) -> str:
        return f"head {self.head_size}, {'packed' if self.packed else 'batch'}, {self.tokens}"


KINDS = [Kind(size, packed, tokens) for size in (64, 128) for packed in (False, True) for tokens in (2048, 4096, 16384)]
QUICK = [Kind(16, False, tokens, total=96) for tokens in (32, 48)]
HEADS, FEW_HEADS = (32, 8), (4, 2)
"""Query heads and key heads of what is timed, and of what is compared with plain torch."""
CHECKED = 2048
"""Tokens of the segment that is compared with plain torch, whose scores take memory."""


def segment(
    kind: Kind, heads: tuple[int, int], lengths: list[int], device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], Rule]:
    """Return q, k, v and dout ``[B, H, S, D]`` in the memory layout of Hugging Face models, and the causal rule.

    ``lengths``: of the sequences; equal unless they are packed.
    """
    batch, length = (1, sum(lengths)) if kind.packed else (len(lengths), lengths[0])
    generator = torch.Generator(device).manual_seed(0)
    made = [
        torch.randn(batch, length, count, kind.head_size, generator=generator, device=device, dtype=dtype)
        for count in (heads[0], heads[1], heads[1], heads[0])
    ]
    rule = Rule(kind.head_size**-0.5, offset=0)
    if kind.packed:
        bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        rule = rule._replace(cu_seqlens=bounds, max_seqlen=max(lengths))
    return [x.transpose(1, 2) for x in made], rule


def both_passes(kernel: Kernel, x: list[Tensor], rule: Rule) -> tuple[Tensor, Gradients]:
    q, k, v, dout = x
    out, lse = kernel.forward(q, k, v, rule)
    return out, kernel.backward(dout, q, k, v, out.to(q.dtype), lse, rule)


def check(kernel: Kernel, kind: Kind, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest relative error of output and gradients. Raises `ArithmeticError` above `ERROR`."""
    length = min(kind.tokens, CHECKED)
    lengths = [length // 3, length - length // 3] if kind.packed else [length] * 2
    x, rule = segment(kind, FEW_HEADS, lengths, device, dtype)
    out, gradients = both_passes(kernel, x, rule)
    if rule.cu_seqlens is not None:  # plain torch knows packed sequences by the number of each row
        number = torch.searchsorted(rule.cu_seqlens, torch.arange(length, device=device), right=True)
        rule = rule._replace(cu_seqlens=None, sequences=(number, number))
    exact, exact_gradients = both_passes(EAGER, x, rule)
    pairs = zip((out, *gradients), (exact, *exact_gradients), strict=True)
    error = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)
    if not error < ERROR:
        raise ArithmeticError(f"its results are off by {error:.1e}")
    return error


def measure(
    kind: Kind, kernels: tuple[Kernel, ...], device: torch.device, dtype: torch.dtype, repeats: int, rows: Rows
) -> None:
    """Add the rows of this kind that are missing; a kernel that fails does not stop the others."""
    missing = [kernel for kernel in kernels if not rows.has(kind=kind.name, kernel=kernel.name)]
    if not missing:
        return
    rows.begin(kind=kind.name, kernel=missing[0].name)
    x, rule = segment(kind, HEADS, [kind.tokens] * (kind.total // kind.tokens), device, dtype)
    need = Need(x[0], x[1].shape[2], kind.head_size, rule)
    errors: dict[str, float] = {}
    times: dict[str, list[float]] = defaultdict(list)
    ready = []
    for kernel in missing:
        rows.mark(kind=kind.name, kernel=kernel.name)
        try:
            if (reason := kernel.refuses(need)) is not None:
                raise Skip(reason)
            errors[kernel.name] = check(kernel, kind, device, dtype)
            both_passes(kernel, x, rule)
            ready.append(kernel)
        except Exception as error:
            rows.failed(error, kind=kind.name, kernel=kernel.name)
    for _ in range(repeats):
        for kernel in list(ready):
            rows.mark(kind=kind.name, kernel=kernel.name)
            try:
                times[kernel.name].append(timed(lambda kernel=kernel: both_passes(kernel, x, rule), device)[0])
            except Exception as error:
                ready.remove(kernel)
                rows.failed(error, kind=kind.name, kernel=kernel.name)
    shared = {"dtype": str(dtype).removeprefix("torch."), "head_size": kind.head_size, "packed": kind.packed}
    for kernel in ready:
        ms = statistics.median(times[kernel.name])
        print(f"{kind.name:28} {kernel.name:24} {ms:9.3f} ms", flush=True)
        rows.add(
            {"kind": kind.name, "kernel": kernel.name, **shared, "tokens": kind.tokens, "ms": ms,
             "error": errors[kernel.name]}
        )  # fmt: skip


def table_entry(records: list[dict[str, Any]], evidence: dict[str, Any]) -> dict[str, Any]:
    """Return a GPU's entry of the table: its timings, of the kinds of which at least two kernels were measured."""
    kinds: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for row in records:
        if row["outcome"] == "measured":
            kinds[row["dtype"], row["head_size"], row["packed"], row["tokens"]][row["kernel"]] = round(row["ms"], 4)
    names = "dtype", "head_size", "packed", "tokens"
    timings = [
        {**dict(zip(names, kind, strict=True)), "milliseconds": dict(sorted(ms.items(), key=lambda each: each[1]))}
        for kind, ms in sorted(kinds.items())
        if len(ms) > 1
    ]
    return {"evidence": evidence, "timings": timings}


def write_table(file: Path, gpu: str, entry: dict[str, Any]) -> None:
    """Add a GPU to the table, or replace its entry. Raises SystemExit if there is nothing to write."""
    if not entry["timings"]:
        raise SystemExit(f"--write-table: no kind of segment has two measured kernels on {gpu}; measure first")
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    text = json.dumps({**found, gpu: entry}, indent=1, sort_keys=True) + "\n"
    part = file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    try:
        read_timings(part)
    finally:
        read_timings.cache_clear()
    part.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a rehearsal: tiny sizes, on a CPU, with its kernels")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--write-table", action="store_true", help="write the table from the rows; measure nothing")
    parser.add_argument("--table", type=Path, default=TIMED, help="the table to write; default: the one that is read")
    add_arguments(parser)
    args = parser.parse_args()
    if args.write_table:
        if args.output is None:
            raise SystemExit("--write-table needs the file with the rows as --output")
        records, evidence = read(args.output)
        if not records:
            raise SystemExit(f"--write-table: {args.output} has no rows; measure first")
        write_table(args.table, evidence["gpu"], table_entry(records, evidence))
        print(f"{args.table} has the timings of {evidence['gpu']}")
        return
    if not args.quick and not torch.cuda.is_available():
        raise SystemExit("this machine has no GPU; --quick rehearses without one")
    device = torch.device("cpu" if args.quick else "cuda")
    kernels = (TORCH_FLASH_CPU, EAGER) if args.quick else TIMED_KERNELS
    repeats = 2 if args.quick else args.repeats
    rows = Rows(
        args.output, ("kind", "kernel"), program="gpu_segments", sources=("benchmarks/bench_prefix_attention.py",),
        packages=("flash-attn", "flash-attn-4"), device=device, settings={"quick": args.quick, "repeats": repeats},
        about={"gpu": "the CPU" if args.quick else torch.cuda.get_device_name(device)}, replace=args.replace,
        minutes=args.minutes,
    )  # fmt: skip
    for kind in QUICK if args.quick else KINDS:
        measure(kind, kernels, device, torch.bfloat16, repeats, rows)
    rows.close()
    raise SystemExit(any(row["outcome"] == "failed" for row in rows.records))


if __name__ == "__main__":
    main()
