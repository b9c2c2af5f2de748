"""``ptd inspect``: measure what a tuned prompt does, for example to choose its number of virtual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ptd.checkpoint import Adapter, load_adapter
from ptd.checkpoint.files import make_folders, write_json
from ptd.data import load_rows
from ptd.distributed.ranks import Ranks
from ptd.files import as_path
from ptd.inspection.effects import effects_on
from ptd.inspection.geometry import describe_tensors, nearest_tokens
from ptd.runs.tuned import Settings, Tuned, find_tuned
from ptd.types import EmptyLayout, PrefixLayout, Reporter, SoftLayout, SoftTokens, UserError

WORDLESS = (
    "a prefix consists of keys and values per layer, not of input embeddings, so no vocabulary token can be compared "
    "with its virtual tokens"
)
ADDS = (
    "without --data, only the prompt itself is described. --data ROWS adds the share of attention that each head gives "
    "to the prompt, the change of the loss without each virtual token, and the loss with only the k most useful tokens"
)


def inspect(
    adapter: str,
    *,
    data: str | None = None,
    backbone: str | None = None,
    settings: Settings | None = None,
    rows: int = 64,
    batch_size: int = 16,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Describe the prompt of ``adapter`` (ptd's or PEFT's) and, with ``data``, measure its effect on the rows.

    At most ``rows`` rows are used, evenly spaced over the file. Rows and backbone are treated as in training, changed
    by ``settings`` (keys of the sections ``backbone`` and ``data``). Without ``data``, a prefix needs no backbone.
    Under a launcher, the ranks share the rows and return the same result. Returns the content of ``inspect.json`` (see
    docs/inspecting.md). Raises `UserError` if an input cannot be used, for example an adapter without a prompt.
    """
    found = load_adapter(adapter)
    if isinstance(found.layout, EmptyLayout):
        trained = "its training tuned a head on the hidden states" if found.head else "nothing was trained"
        raise UserError(
            f"the adapter {adapter} has no prompt to inspect: {trained}; give an adapter with virtual tokens, such as "
            "those of the methods prefix and prompt"
        )
    if data is None and isinstance(found.layout, PrefixLayout):
        return _heading(found) | {"tensors": describe_tensors(found.state(), found.layout.layers), "nearest": None}
    reference, reporter = find_tuned(adapter, backbone, settings=settings), reporter or Reporter()
    ranks = reference.start_ranks()
    try:
        tuned = reference.load(ranks, reporter)
        result = _heading(found) | {
            "tensors": describe_tensors(found.state(), tuned.prepared.shape.layers),
            "nearest": _nearest(found, tuned),
        }
        return result if data is None else result | _on_rows(data, tuned, ranks, rows, batch_size, reporter)
    finally:
        ranks.stop()


def _heading(adapter: Adapter) -> dict[str, Any]:
    layout = adapter.layout
    if isinstance(layout, SoftLayout):
        prompt = "input embeddings " + ("before the sequences" if layout.in_front else "at marks in the sequences")
    else:
        prompt = "keys and values of every attention layer"
    return {
        "method": adapter.facts.get("method", {}).get("name"),
        "peft_type": adapter.peft_type,
        "backbone": Path(adapter.backbone).name if Path(adapter.backbone).is_absolute() else adapter.backbone,
        "fingerprint": adapter.facts.get("fingerprint"),
        "prompt": prompt,
        "num_virtual_tokens": len(adapter.flat),
        "parameters": adapter.flat.numel(),
        "data": None,
        "notes": [WORDLESS] if isinstance(layout, PrefixLayout) else [],
    }


def _nearest(adapter: Adapter, tuned: Tuned) -> list[dict[str, Any]] | None:
    state = adapter.state()
    return nearest_tokens(state, tuned.prepared, tuned.tokenizer) if isinstance(state, SoftTokens) else None


def _on_rows(data: str, tuned: Tuned, ranks: Ranks, most: int, batch_size: int, reporter: Reporter) -> dict[str, Any]:
    given = load_rows(data, tuned.task.data.eval_split, what="--data")
    chosen = np.unique(np.linspace(0, len(given) - 1, min(most, len(given))).round().astype(int))
    used = given.select(chosen.tolist())
    held_out = tuned.held_out(used, batch_size, what=data)
    report = held_out.examples.report
    reporter.note(f"--data: using {len(used):,} of {len(given):,} rows: {report}")
    facts = {"file": Path(data).name, "rows": len(used), "rows_in_file": len(given), "tokens": report.tokens}
    return {"data": facts, **effects_on(held_out, tuned, ranks, reporter)}


def write_inspection(found: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write inspect.json, the figures and an HTML page with everything into ``folder``, and return the files.

    Raises `UserError` if the folder cannot be written.
    """
    from ptd.inspection.figures import save
    from ptd.inspection.page import render_inspection

    folder = as_path(folder)
    try:
        make_folders(folder)
        write_json(folder / "inspect.json", found)
        files = [folder / "inspect.json"]
        for name, picture in save(found).items():
            files.append(folder / f"{name}.png")
            files[-1].write_bytes(picture)
        files.append(folder / "index.html")
        files[-1].write_text(render_inspection(found), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: cannot write into {folder}: {error.strerror or error}") from error
    return files


def output_folder(adapter: str) -> Path:
    """Return the default output folder of an inspection: ``inspect`` in the adapter's folder."""
    return as_path(adapter) / "inspect"


__all__ = ["ADDS", "inspect", "output_folder", "write_inspection"]
