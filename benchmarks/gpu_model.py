"""Predict a training step of 7B and 8B backbones on GPUs from what the code launches: a model, not a measurement.

    PYTHONPATH=.:kernels python benchmarks/gpu_model.py --output benchmarks/results/gpu_model.json
    … --only 'P = 2048' --operators 20                         # the launches of a cell that take longest on an H100
    … --compare benchmarks/results/gpu_model.json              # this code against an earlier prediction or measurement

The real training step of each cell runs on an emulated GPU, on shapes alone (gpu_model_trace.py), and every launch is
priced by a roofline (gpu_model_roofline.py). So a change of the code shows its effect on a GPU without one. OUTPUT has
a row for each cell and GPU (rows.py), and its tables lie next to it (.md).

A file to compare with has rows with the same fields ``cell``, ``gpu`` and ``milliseconds``, and optionally ``parts``: a
mapping from a part to its ``milliseconds``. Nothing is stored then, unless --output is given.

The program needs a CPU build of torch and a C++ compiler, but no GPU. It takes a minute or two.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpu_model_roofline import ACCURACY, GPUS, SHORTEST, operators, prediction
from gpu_model_trace import HOST, PARTS, Cell, Sizes, trace
from rows import Rows, add_arguments, read

from tests.gpu_paper.device import EMULATED

B7 = Sizes(intermediate=11008, kv_heads=32, vocabulary=32000)
B8 = Sizes(intermediate=14336, kv_heads=8, vocabulary=128256)
CELLS = {
    "7B, 8 × 512, P = 32": Cell(B7, 8, 512, 32),
    "7B, 8 × 512, P = 512": Cell(B7, 8, 512, 512),
    "7B, 8 × 512, P = 2048": Cell(B7, 8, 512, 2048),
    "7B, 1 × 4096, P = 32": Cell(B7, 1, 4096, 32),
    "7B, 8 × 512, P = 32, checkpointing": Cell(B7, 8, 512, 32, checkpointing=True),
    "8B GQA, 8 × 512, P = 32": Cell(B8, 8, 512, 32),
}
EMULATION = ("tests/gpu_paper/device.py", "tests/gpu_paper/device.cpp")
SOURCES = (*(f"benchmarks/gpu_model_{name}.py" for name in ("trace", "triton", "roofline")), *EMULATION)
NONE = {"milliseconds": 0.0, "launches": 0}
SHOWN = "H100"
"""The GPU of the table of parts, and of --operators."""


def table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines]) + "\n"


def report(records: list[dict[str, Any]]) -> str:
    """Return the tables of the predicted rows, in Markdown."""
    steps, of_parts = [], []
    for row in records:
        if row["outcome"] != "predicted":
            continue
        total = f"{row['milliseconds']:.0f}", f"{row['tokens_per_second']:,}", f"{row['share_of_floor']:.0%}"
        steps.append([row["cell"], row["gpu"], *total])
        if row["gpu"] == SHOWN:
            parts = [row["parts"].get(part, NONE) for part in PARTS]
            of_parts.append([row["cell"], *(f"{part['milliseconds']:.1f}" for part in parts)])
            of_parts.append(["launches", *(f"{part['launches']:,}" for part in parts)])
    rates = []
    for name, gpu in GPUS.items():
        assumed = {rate: value / 1e12 for rate, value in gpu.rates().items()}
        peaks = {"bf16": gpu.bf16 / 1e12, "fp32": gpu.fp32 / 1e12, "memory": gpu.memory / 1e12}
        both = [f"{peak:.3g} → {assumed[rate]:.3g}" for rate, peak in peaks.items()]
        rates.append([name, *both, f"{assumed['flash forward']:.0f}, {assumed['flash backward']:.0f}"])
    return "\n".join(
        [
            "Predicted from what the code launches; nothing here was measured on a GPU. The assumed accuracy of a step "
            f"is ± {ACCURACY:.0%}.\n",
            table(["cell", "GPU", "ms per step", "tokens/s", "of the floor"], steps),
            f"Milliseconds and launches of a step by part, on an {SHOWN}:\n",
            table(["cell", *PARTS], of_parts),
            "The parts:\n",
            "".join(f"- *{part}*: {what}\n" for part, what in PARTS.items()),
            f"Rates, published peak → assumed. A launch takes at least {1e6 * SHORTEST:.0f} µs.\n",
            table(["GPU", "bf16, TFLOP/s", "fp32, TFLOP/s", "memory, TB/s", "flash forward, backward, TFLOP/s"], rates),
        ]
    )


def comparison(now: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    """Return a table of the milliseconds in other rows and in these rows, in total and by part.

    Raises SystemExit if the two have no cell and GPU in common.
    """
    before = {(row["cell"], row["gpu"]): row for row in other if "milliseconds" in row}
    lines, missing = [], []
    for row in now:
        earlier = before.get((row["cell"], row["gpu"]))
        if earlier is None or row["outcome"] != "predicted":
            missing.append(f"{row['cell']} ({row['gpu']})")
            continue
        pairs = [("step", earlier["milliseconds"], row["milliseconds"])]
        if "parts" in earlier:
            known = dict.fromkeys([*PARTS, *earlier["parts"]])
            times = [[each["parts"].get(part, {}).get("milliseconds") for part in known] for each in (earlier, row)]
            pairs += [pair for pair in zip(known, *times, strict=True) if pair[1:] != (None, None)]
        for part, *both in pairs:
            shown = ["–" if each is None else f"{each:.2f}" for each in both]
            old, new = (each or 0.0 for each in both)
            change = f"{new / old - 1:+.1%}" if old and new else "–"
            lines.append([row["cell"], row["gpu"], part, *shown, f"{new - old:+.2f}", change])
    if not lines:
        raise SystemExit(
            "--compare: the file has no row with the cell and the GPU of a row of this program; give a file whose "
            f"rows have one of the cells {', '.join(map(repr, CELLS))} and one of the GPUs {', '.join(GPUS)}"
        )
    compared = table(["cell", "GPU", "part", "in the file, ms", "this code, ms", "difference, ms", ""], lines)
    return compared + (f"\nNot compared: {'; '.join(missing)}\n" if missing else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="only cells whose name contains one of these texts")
    parser.add_argument("--operators", type=int, default=0, help=f"print so many kinds of launches ({SHOWN})")
    parser.add_argument("--compare", type=Path, help="JSON file of a measurement or of an earlier prediction")
    add_arguments(parser)
    args = parser.parse_args()
    if not EMULATED:
        raise SystemExit(
            "the model emulates a GPU, which needs a CPU build of torch and a C++ compiler; run it in such an "
            "environment, and give this machine's measurement with --compare"
        )
    chosen = {name: cell for name, cell in CELLS.items() if any(text in name for text in args.only)}
    if not chosen:
        raise SystemExit(f"--only: no cell's name contains this text; the cells are {', '.join(map(repr, CELLS))}")
    other = None
    if args.compare is not None:  # read before --output replaces the file
        if not args.compare.is_file():
            raise SystemExit(f"--compare: {args.compare} does not exist; give a JSON file with rows to compare with")
        other = read(args.compare)[0]
    settings = {"rates": {name: gpu.rates() for name, gpu in GPUS.items()}, "shortest_seconds": SHORTEST}
    rows = Rows(
        args.output, ("cell", "gpu"), program="gpu_model", sources=SOURCES, identity=("code", "versions", "settings"),
        device=HOST, settings=settings, replace=args.replace, minutes=args.minutes,
    )  # fmt: skip
    for name, cell in chosen.items():
        step = trace(cell) if args.operators else None
        for gpu, rates in GPUS.items():
            if not rows.has(cell=name, gpu=gpu):
                with rows.row(cell=name, gpu=gpu) as row:
                    step = step or trace(cell)
                    row |= {"outcome": "predicted", **prediction(step, rates)}
        if step is not None and args.operators:
            print(f"{name} on an {SHOWN}:", *operators(step.launches(), GPUS[SHOWN], args.operators), sep="\n")
    rows.close()
    records = [row for row in rows.records if row["cell"] in chosen]
    print(report(records) if other is None else comparison(records, other))
    if args.output is not None:
        args.output.with_suffix(".md").write_text(report(rows.records), encoding="utf-8")
    raise SystemExit(any(row["outcome"] == "failed" for row in records))


if __name__ == "__main__":
    main()
