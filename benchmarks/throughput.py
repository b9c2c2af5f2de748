"""Measure training throughput against PEFT on a small Llama, in cells and curves: ``ptd bench`` on generated data.

    python benchmarks/throughput.py [--repeats 25] [--only NAME ...] [--output benchmarks/results/throughput]

The backbone is a Llama of 8 layers, hidden 512, 8 query and 4 key/value heads, vocabulary 32,000 and random weights. It
is prefix-tuned with 8 rows per step and 45 % of the tokens supervised. ``e2e``: rows have the lengths of the E2E data
set; ``instructions``: skewed lengths (log-normal, mean 180 tokens, σ 0.9, at most 1,024). PEFT runs as its users run it
(random batches), and in its best working setting (rows of similar length together); docs/benchmarking.md describes the
measurement. The curves show the cost over virtual tokens, rows, sequence length and layers, against PEFT at its best.
``compiled`` cells use `backbone.compile`, against PEFT as run, at its best, and with its layers compiled in the same
way.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

SUPERVISED = 0.45
SEED = 0
ROWS = 512
MODEL = {
    "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192,
}  # fmt: skip
QUICK_MODEL = {**MODEL, "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SPECIALS = ("<pad>", "</s>", "<unk>")


def e2e(random: np.random.Generator, rows: int) -> np.ndarray:
    """Draw the tokens per row as in E2E's development set under a 32k byte-level BPE (4,672 rows, measured).

    Prompts 50.7 ± 12.7 tokens, completions 29.4 ± 8.9, correlation 0.67.
    """
    covariance = 0.67 * 12.7 * 8.9
    drawn = random.multivariate_normal([50.7, 29.4], [[12.7**2, covariance], [covariance, 8.9**2]], rows)
    return np.clip(drawn.round(), [15, 8], [70, 60]).astype(int).sum(1)


def instructions(random: np.random.Generator, rows: int) -> np.ndarray:
    """Draw skewed lengths, as in instruction data: log-normal with mean 180 and σ 0.9, 8 to 1,024 tokens."""
    drawn = random.lognormal(np.log(180) - 0.9**2 / 2, 0.9, rows)
    return np.clip(drawn.round(), 8, 1024).astype(int)


def all_of(length: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Return a function like `e2e` for rows of one length."""
    return lambda random, rows: np.full(rows, length)


LENGTHS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {"e2e": e2e, "instructions": instructions}


@dataclass(frozen=True)
class Cell:
    """One comparison. ``data``: a name in `LENGTHS`, or the number of tokens of every row."""

    data: str = "e2e"
    virtual_tokens: int = 30
    rows: int = 8
    layers: int = 8
    dtype: str = "float32"
    compiled: bool = False
    settings: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Curve:
    """A cell whose field ``changed`` takes several values."""

    changed: str
    label: str
    values: tuple[int, ...]
    cell: Cell = field(default_factory=lambda: Cell(settings=("best",)))


CELLS = {
    **{
        f"{data}, P = {tokens}, {dtype}": Cell(data, tokens, dtype=dtype)
        for dtype in ("float32", "bfloat16")
        for data, tokens in (("e2e", 30), ("instructions", 30), ("e2e", 2048))
    },
    **{
        f"{data}, P = 30, {dtype}, compiled": Cell(data, dtype=dtype, compiled=True)
        for dtype in ("float32", "bfloat16")
        for data in ("e2e", "instructions")
    },
}
CURVES = {
    "virtual tokens": Curve("virtual_tokens", "virtual tokens", (8, 32, 128, 512, 2048)),
    "rows": Curve("rows", "rows per step", (1, 2, 4, 8, 16, 32)),
    "length": Curve("data", "tokens per row", (32, 64, 128, 256, 512, 1024)),
    "layers": Curve("layers", "layers", (2, 4, 8, 16)),
}


def words(vocabulary: int) -> list[str]:
    """Return the tokenizer's words; each word of a text is one token."""
    return [*SPECIALS, *(f"w{index}" for index in range(vocabulary - len(SPECIALS)))]


def write_backbone(folder: Path, model: dict[str, Any]) -> None:
    """Write a Llama with random fp32 weights, and a tokenizer with one token per word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    vocabulary = words(model["vocab_size"])
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(SEED)
    config = AutoConfig.for_model("llama", **model, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def write_rows(file: Path, lengths: np.ndarray, vocabulary: int, random: np.random.Generator) -> None:
    """Write rows of these lengths in tokens, including EOS; the share `SUPERVISED` of them is the completion."""
    known = words(vocabulary)[len(SPECIALS) :]
    with file.open("w", encoding="utf-8") as out:
        for length in lengths.tolist():
            completion = max(2, round(SUPERVISED * length))
            chosen = [known[index] for index in random.integers(0, len(known), length - 1)]
            cut = length - completion
            row = {"prompt": " ".join(chosen[:cut]), "completion": " ".join(chosen[cut:])}
            out.write(json.dumps(row) + "\n")


class Folders:
    """Backbones and rows that the cells share, written on first use."""

    def __init__(self, folder: Path, model: dict[str, Any]) -> None:
        self.folder, self.model = folder, model
        self.backbone, self.rows = cache(self._backbone), cache(self._rows)

    def _backbone(self, layers: int) -> Path:
        folder = self.folder / f"layers-{layers}"
        write_backbone(folder, {**self.model, "num_hidden_layers": layers})
        return folder

    def _rows(self, data: str, count: int) -> Path:
        random = np.random.default_rng(SEED)
        lengths = (LENGTHS.get(data) or all_of(int(data)))(random, count)
        file = self.folder / f"{data}-{count}.jsonl"
        write_rows(file, lengths, self.model["vocab_size"], random)
        return file

    def config(self, cell: Cell) -> dict[str, Any]:
        """Return the run file of a cell as a mapping."""
        return {
            "backbone": {"path": str(self.backbone(cell.layers)), "dtype": cell.dtype, "compile": cell.compiled},
            "method": {"name": "prefix", "num_virtual_tokens": cell.virtual_tokens},
            "data": {"train": str(self.rows(cell.data, max(ROWS, 16 * cell.rows))), "max_length": 1024},
            "train": {"per_device_train_batch_size": cell.rows, "learning_rate": 1e-3, "seed": SEED},
        }


def measured(folders: Folders, cell: Cell, repeats: int, warmup: int) -> dict[str, Any]:
    """Return the report of `ptd.bench.bench`, without the fields that are the same in all cells."""
    from ptd.bench import bench
    from ptd.config import parse_config

    config = parse_config(folders.config(cell))
    report = bench(config, against="peft", settings=cell.settings, repeats=repeats, warmup=warmup)  # type: ignore[arg-type]
    common = ("command", "commit", "date", "hardware", "versions", "config", "network")
    return {key: value for key, value in report.items() if key not in common}


def rows_of_table(cells: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table of the cells."""
    yield "| rows | PEFT | PEFT, useful tokens/s | ptd | ptd / PEFT (quartiles) | peak memory, PEFT → ptd |"
    yield "|---|---|---|---|---|---|"
    for name, report in cells.items():
        for lane in report["lanes"]:
            mine, theirs, ratio = lane["sides"]["ptd"], lane["sides"]["peft"], lane["ratio"]
            rates = [side["useful_tokens_per_second"]["median"] for side in (theirs, mine)]
            peaks = [side["peak_memory_bytes"] / 1e6 for side in (theirs, mine)]
            low, high = ratio["quartiles"]
            yield (
                f"| {name} | {lane['name']} | {rates[0]:,.0f} | {rates[1]:,.0f} | **{ratio['median']:.2f} ×** "
                f"({low:.2f}, {high:.2f}) | {peaks[0]:,.0f} → {peaks[1]:,.0f} MB |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25, help="timed steps of each side per cell")
    parser.add_argument("--curve-repeats", type=int, default=9, help="timed steps of each side per point of a curve")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument(
        "--only", nargs="*", help="names of the cells and curves to measure: " + "; ".join([*CELLS, *CURVES])
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and few points, to test the script")
    parser.add_argument("--output", type=Path, help="folder for throughput.json and the curves")
    arguments = parser.parse_args()
    from ptd.bench.machine import evidence
    from ptd.bench.report import plot_curve

    def wanted(name: str) -> bool:
        return not arguments.only or name in arguments.only

    result: dict[str, Any] = {**evidence("peft"), "model": MODEL, "cells": {}, "curves": {}}

    def keep() -> None:
        if arguments.output is not None:
            arguments.output.mkdir(parents=True, exist_ok=True)
            text = json.dumps(result, indent=1) + "\n"
            (arguments.output / "throughput.json").write_text(text, encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        folders = Folders(Path(folder), QUICK_MODEL if arguments.quick else MODEL)
        for name, cell in CELLS.items():
            if wanted(name):
                cell = replace(cell, layers=2, virtual_tokens=min(cell.virtual_tokens, 64)) if arguments.quick else cell
                result["cells"][name] = measured(folders, cell, arguments.repeats, arguments.warmup)
                print("\n".join(list(rows_of_table({name: result["cells"][name]}))[2:]), flush=True)
                keep()
        for name, curve in CURVES.items():
            if not wanted(name):
                continue
            points = []
            for value in curve.values[:2] if arguments.quick else curve.values:
                given = str(value) if curve.changed == "data" else value
                cell = replace(curve.cell, **({"layers": 2} if arguments.quick else {}))
                cell = replace(cell, **{curve.changed: given})
                points.append((value, measured(folders, cell, arguments.curve_repeats, arguments.warmup)))
                print(name, value, *list(rows_of_table({"": points[-1][1]}))[2:], flush=True)
            result["curves"][name] = [{"value": value, "report": report} for value, report in points]
            keep()
            if arguments.output is not None:
                plot_curve(curve.label, points, arguments.output / f"{name.replace(' ', '_')}.png")
    print("\n".join(rows_of_table(result["cells"])))


if __name__ == "__main__":
    main()
