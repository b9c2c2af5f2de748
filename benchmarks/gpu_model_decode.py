"""Predict a generated token of a 7B backbone with a prefix on GPUs from what the code launches: not a measurement.

    PYTHONPATH=.:kernels python benchmarks/gpu_model_decode.py --output benchmarks/results/gpu_model_decode.json
    … --only static --operators 20                          # the launches of a layer that take longest on an H100

The second pass of a cached generation runs on an emulated GPU, on shapes alone, as in gpu_model_trace.py, and every
launch is priced by the roofline of gpu_model_roofline.py. The floor reads the weights and the used part of the cache
once. The model assumes that the host is ahead of the GPU: with launches this short, only a CUDA graph achieves that.
So the number of launches matters as much as the milliseconds.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from gpu_model_roofline import GPUS, SHORTEST, operators, seconds
from gpu_model_trace import DEVICE, HOST, Cell, Launch, Launches, Sizes, blank_on_gpu
from rows import Rows, add_arguments

# isort: split
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from ptd.types import PrefixKV
from tests.gpu_paper.device import watched

B7 = Sizes(intermediate=11008, kv_heads=32, vocabulary=32000)
B8 = Sizes(intermediate=14336, kv_heads=8, vocabulary=128256)
ROOM = 128
"""Tokens for which a static cache has room beyond the context."""


@dataclass(frozen=True)
class TokenCell:
    """One token for each of ``rows`` texts of ``context`` tokens. ``cache``: dynamic or static, as transformers names
    them. ``padded``: the prompts differ in length."""

    sizes: Sizes
    rows: int = 8
    context: int = 512
    virtual_tokens: int = 32
    cache: str = "dynamic"
    padded: bool = False
    backend: str = "auto"

    @property
    def floor_bytes(self) -> int:
        """Bytes of the weights and of the keys and values of context and prefix, each read once, in bf16."""
        sizes = self.sizes
        width = sizes.hidden * sizes.kv_heads // sizes.heads
        cache = 2 * sizes.layers * width * (self.rows * self.context + self.virtual_tokens)
        return 2 * (sizes.weights + cache)


CELLS = {
    "7B, 8 rows, context 512, P = 32": TokenCell(B7),
    "7B, the same, padded": TokenCell(B7, padded=True),
    "7B, the same, static cache": TokenCell(B7, cache="static"),
    "7B, the same, without a prefix": TokenCell(B7, virtual_tokens=0),
    "7B, the same, by library kernels": TokenCell(B7, backend="merge"),
    "7B, the same, padded, by library kernels": TokenCell(B7, padded=True, backend="merge"),
    "7B, the same, static cache, by library kernels": TokenCell(B7, cache="static", backend="merge"),
    "8B GQA, 8 rows, context 512, P = 32": TokenCell(B8),
    "8B GQA, 1 row, context 4096, P = 32": TokenCell(B8, rows=1, context=4096),
}
PARTS = {
    "GEMMs": "matrix products of the frozen layers and of the output layer",
    "attention": "ptd's attention with the prefix",
    "cache": "transformers' cache: a dynamic one is copied for every token",
    "transformers": "the rest of the model's code",
}


def part_of(launch: Launch) -> str:
    """Return in which of `PARTS` a launch is."""
    if launch.place.startswith("cache_utils.py"):
        return "cache"
    own = {"GEMMs": "GEMMs", "attention": "attention", "merging": "attention"}
    return own.get(launch.part, "transformers")


def launches_of_token(cell: TokenCell) -> Counter[Launch]:
    """Return the launches of a token. Raises `RuntimeError` if the step waits for the GPU."""
    step = Cell(cell.sizes, cell.rows, cell.context, max(1, cell.virtual_tokens))
    seen = Launches()
    with blank_on_gpu(step) as (_, _, prepared, _), torch.no_grad():
        model, attachment = prepared.model, prepared.attachment
        for slot in attachment.slots:
            slot.backend = cell.backend
        keys, values = (
            tuple(torch.empty(cell.virtual_tokens, layer.kv_heads, layer.key_dim, device=DEVICE) for layer in layers)
            for layers in [attachment.shape.layers] * 2
        )
        attachment.set(PrefixKV(keys, values) if cell.virtual_tokens else None)
        dynamic = cell.cache == "dynamic"
        config = model.config
        cache: Any = DynamicCache(config=config) if dynamic else StaticCache(config, max_cache_len=cell.context + ROOM)
        ids = torch.ones(cell.rows, cell.context, dtype=torch.long, device=DEVICE)
        with attachment.padding_known(cell.padded):
            for first, last in (
                (0, cell.context - 2),
                (cell.context - 2, cell.context - 1),
            ):  # the second casts nothing
                _pass(model, ids, first, last, cache)
            with watched(seen):
                _pass(model, ids, cell.context - 1, cell.context, cache)
    if seen.waited:
        raise RuntimeError(f"a generated token waits for the GPU: {seen.waited[0]}")
    return seen.counts


def _pass(model: Any, ids: Tensor, first: int, last: int, cache: Any) -> None:
    positions = torch.arange(first, last, device=DEVICE)[None]
    mask = torch.ones_like(ids[:, :last])
    model(input_ids=ids[:, first:last], attention_mask=mask, position_ids=positions, past_key_values=cache)


def trace_token(cell: TokenCell) -> tuple[Counter[Launch], Counter[Launch]]:
    """Return the launches of a token with all layers of the cell, and those of one layer."""
    few, more = (launches_of_token(replace(cell, sizes=replace(cell.sizes, layers=layers))) for layers in (1, 2))
    layer = Counter(more)
    layer.subtract(few)
    found = Counter(few)
    for launch, count in layer.items():
        found[launch] += (cell.sizes.layers - 1) * count
    return found, +layer


def prediction_of_token(cell: TokenCell, found: Counter[Launch], layer: Counter[Launch], gpu: Any) -> dict[str, Any]:
    """Return the figures of a token on one GPU, in total and by part."""
    rates = gpu.rates()
    parts = {}
    for part in PARTS:
        own = [(launch, count) for launch, count in found.items() if part_of(launch) == part]
        parts[part] = {
            "milliseconds": round(1e3 * sum(count * seconds(launch, rates) for launch, count in own), 3),
            "launches_per_layer": sum(count for launch, count in layer.items() if part_of(launch) == part),
            "megabytes": round(sum(count * (launch.read + launch.written) for launch, count in own) / 1e6, 1),
        }
    total = sum(part["milliseconds"] for part in parts.values())
    floor = 1e3 * cell.floor_bytes / rates["memory"]
    return {
        "milliseconds": round(total, 2),
        "tokens_per_second": round(1e3 * cell.rows / total),
        "floor_milliseconds": round(floor, 2),
        "share_of_floor": round(floor / total, 3),
        "launches": sum(found.values()),
        "launches_per_layer": sum(layer.values()),
        "parts": parts,
    }


def report_on_tokens(records: list[dict[str, Any]]) -> str:
    """Return the tables of the predicted rows, in Markdown."""
    head = "| cell | GPU | ms per token | floor, ms | of the floor | launches per layer |\n|---|---|---|---|---|---|\n"
    lines = [
        f"| {row['cell']} | {row['gpu']} | {row['milliseconds']:.2f} | {row['floor_milliseconds']:.2f} | "
        f"{row['share_of_floor']:.0%} | {row['launches_per_layer']} |\n"
        for row in records
        if row["outcome"] == "predicted"
    ]
    head_of_parts = f"| cell | {' | '.join(PARTS)} |\n{'|---' * (1 + len(PARTS))}|\n"
    parts = [
        f"| {row['cell']} | "
        + " | ".join(
            f"{part['milliseconds']:.2f} ms, {part['launches_per_layer']}, {part['megabytes']:,.0f} MB"
            for part in row["parts"].values()
        )
        + " |\n"
        for row in records
        if row["outcome"] == "predicted" and row["gpu"] == "H100"
    ]
    return (
        "Predicted from what the code launches; nothing here was measured on a GPU. A launch takes at least "
        f"{1e6 * SHORTEST:.0f} µs, and the host is always ahead.\n\n{head}{''.join(lines)}\n"
        "By part on an H100: milliseconds per token, launches per layer, megabytes per token.\n\n"
        f"{head_of_parts}{''.join(parts)}\n" + "".join(f"- *{part}*: {what}\n" for part, what in PARTS.items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="only cells whose name contains one of these texts")
    parser.add_argument("--operators", type=int, default=0, help="print so many kinds of launches of a layer (H100)")
    add_arguments(parser)
    args = parser.parse_args()
    settings = {"rates": {name: gpu.rates() for name, gpu in GPUS.items()}, "shortest_seconds": SHORTEST}
    sources = tuple(f"benchmarks/gpu_model_{name}.py" for name in ("decode", "trace", "triton", "roofline"))
    rows = Rows(
        args.output, ("cell", "gpu"), program="gpu_model_decode", sources=sources,
        identity=("code", "versions", "settings"), device=HOST, settings=settings, replace=args.replace,
        minutes=args.minutes,
    )  # fmt: skip
    for name, cell in CELLS.items():
        if not any(text in name for text in args.only):
            continue
        traced = None
        for gpu, rates in GPUS.items():
            if not rows.has(cell=name, gpu=gpu):
                with rows.row(cell=name, gpu=gpu) as row:
                    traced = traced or trace_token(cell)
                    row |= {"outcome": "predicted", **prediction_of_token(cell, *traced, rates)}
        if args.operators:
            traced = traced or trace_token(cell)
            print(f"{name}, one layer on an H100:", *operators(traced[1], GPUS["H100"], args.operators), sep="\n")
    rows.close()
    print(report_on_tokens(rows.records))
    if args.output is not None:
        args.output.with_suffix(".md").write_text(report_on_tokens(rows.records), encoding="utf-8")


if __name__ == "__main__":
    main()
