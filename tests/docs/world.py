"""Build the folder in which a page's blocks run: the files that the page assumes, small enough to run in seconds."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ptd.quickstart import BACKBONE
from ptd.quickstart.task import make_rows

ROOT = Path(__file__).parents[2]
RUN = """\
backbone: {{path: {backbone}, dtype: float32}}
method: {{name: prefix, num_virtual_tokens: 4}}
task: {{kind: causal_lm}}
data: {{train: train.jsonl, eval: eval.jsonl, max_length: 128}}
train: {{max_steps: 3, per_device_train_batch_size: 4, learning_rate: 1.0e-2, save_steps: 2}}
output_dir: {output}
"""
WORDS = {"PATH_OR_HUB_ID": str(BACKBONE), "[KEY=VALUE …]": ""}
"""Placeholders on pages for the reader's own values, with the values for the tests."""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def build(folder: Path) -> Path:
    """Write rows and a run file; ``ptd train trained.yaml`` there then creates what `settle` copies as ``out``."""
    train, held_out = make_rows(train_rows=12, eval_rows=4)
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "eval.jsonl", held_out)
    write_rows(folder / "notes.jsonl", [{"text": row["completion"]} for row in held_out])
    (folder / "trained.yaml").write_text(RUN.format(backbone=BACKBONE, output="trained"), encoding="utf-8")
    return folder


def settle(world: Path, folder: Path) -> None:
    """Fill a page's own folder, with an adapter in ``out`` and in the folder where ``ptd quickstart`` writes it."""
    for name in ("train.jsonl", "eval.jsonl", "notes.jsonl"):
        shutil.copy(world / name, folder)
        shutil.copy(world / name, _made(folder / "quickstart" / "data"))
    for target in (folder / "out", folder / "quickstart" / "run"):
        shutil.copytree(world / "trained", target)
    for name, output in (("RUN.yaml", "new"), ("run.yaml", "new")):
        (folder / name).write_text(RUN.format(backbone=BACKBONE, output=output), encoding="utf-8")
    shutil.copy(ROOT / "launch" / "hostfile.example", folder / "hostfile")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def without_out(folder: Path) -> None:
    """Remove ``out`` before a block that itself trains into ``out``."""
    shutil.rmtree(folder / "out", ignore_errors=True)


def the_readmes_run(folder: Path) -> None:
    """Write the README's own run file, with the shipped backbone and for three steps."""
    without_out(folder)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    text = page.split("```yaml\n")[1].split("```")[0].replace("PATH_OR_HUB_ID", str(BACKBONE))
    short = re.sub(r"num_virtual_tokens: \d+", "num_virtual_tokens: 4", re.sub(r"max_steps: \d+", "max_steps: 3", text))
    (folder / "run.yaml").write_text(short, encoding="utf-8")


BEFORE: list[tuple[str, str, Callable[[Path], None]]] = [
    ("README.md", "ptd train run.yaml", the_readmes_run),
]
"""Page, part of a block's text, and the function to call with the page's folder before that block."""


def names(page: str) -> dict[str, Any]:
    """Return the names that a page's Python code assumes: ``path`` of a backbone and, by page, tensors or batches."""
    given: dict[str, Any] = {"path": str(BACKBONE), "torch": torch}
    if page == "docs/api.md":
        given["batches"] = list(itertools.islice(_batches(), 2))
        given["texts"] = ["the meal was cheap and the room was dear", "the room was cheap"]
    if page.endswith("prefix_attention/README.md"):
        heads, size, tokens, lengths = 2, 8, 12, (3, 4, 5)
        own = {name: torch.randn(1, heads, tokens, size) for name in ("q", "k", "v")}
        prefix = {name: torch.randn(heads, 6, size) for name in ("prefix_k", "prefix_v", "key_0", "value_0")}
        other = {name: torch.randn(heads, 2, size) for name in ("key_1", "value_1")}
        offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        given |= own | prefix | other | {"cu_seqlens": offsets, "longest": max(lengths)}
    return given


def _batches() -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    for row in make_rows()[0]:
        ids = tokenizer(f"{row['prompt']}\n{row['completion']}", return_tensors="pt")["input_ids"]
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
