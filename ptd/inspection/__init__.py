"""``ptd inspect``: what a tuned prompt does, so that the number of its tokens can be chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ptd.checkpoint import Adapter, load_adapter
from ptd.checkpoint.files import make_folders, write_json
from ptd.data import load_rows
from ptd.engine.ranks import Ranks
from ptd.files import as_path
from ptd.generate import Settings, Tuned, load_tuned, start_ranks
from ptd.inspection.effects import effects_on
from ptd.inspection.geometry import nearest_tokens, tensors_of
from ptd.types import EmptyLayout, PrefixLayout, Reporter, SoftLayout, SoftTokens, UserError

WORDLESS = (
    "a prefix consists of keys and values of each layer, not of input embeddings: no vocabulary token has such, so "
    "none is near"
)
ADDS = (
    "without --data: only what the prompt is by itself. --data ROWS adds the share of attention that each head gives "
    "to it, the change of the loss without each virtual token, and the loss with the k most useful tokens only"
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
    """Look into the prompt of ``adapter`` (ptd's or PEFT's); with ``data`` also at what it does to its rows.

    At most ``rows`` of them are used, evenly spaced over the file. They and the backbone are treated as in training,
    changed by ``settings`` (of the sections ``backbone`` and ``data``). A prefix by itself needs no backbone. Under a
    launcher the ranks share the rows and return the same. What comes back is what ``inspect.json`` holds (see
    docs/inspecting.md). Raises `UserError`, also for an adapter without a prompt.
    """
    found = load_adapter(adapter)
    if isinstance(found.layout, EmptyLayout):
        trained = "a head on the backbone's hidden states was trained" if found.head else "nothing was trained"
        raise UserError(
            f"the adapter {adapter} has no prompt to look into: {trained}; ptd inspect takes adapters with virtual "
            "tokens, such as those of the methods prefix and prompt"
        )
    ranks, reporter = start_ranks(settings), reporter or Reporter()
    try:
        if data is None and isinstance(found.layout, PrefixLayout):
            return _heading(found) | {"tensors": tensors_of(found.state(), found.layout.layers), "nearest": None}
        tuned = load_tuned(adapter, backbone, ranks, settings=settings)
        result = _heading(found) | {
            "tensors": tensors_of(found.state(), tuned.prepared.shape.layers),
            "nearest": _nearest(found, tuned),
        }
        return result if data is None else result | _on_rows(data, tuned, ranks, rows, batch_size, reporter)
    finally:
        ranks.stop()


def _heading(adapter: Adapter) -> dict[str, Any]:
    layout = adapter.layout
    if isinstance(layout, SoftLayout):
        prompt = "input embeddings " + ("in front of the sequences" if layout.in_front else "at marks in the sequences")
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
    reporter.note(f"--data: {len(used):,} of {len(given):,} rows are used: {report}")
    facts = {"file": Path(data).name, "rows": len(used), "rows_in_file": len(given), "tokens": report.tokens}
    return {"data": facts, **effects_on(held_out, tuned, ranks, reporter)}


def write(found: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write inspect.json, the figures and a page that holds everything into ``folder``; returns the files.

    Raises `UserError` if the folder cannot be written.
    """
    from ptd.inspection.figures import save
    from ptd.inspection.page import render

    folder = as_path(folder)
    try:
        make_folders(folder)
        write_json(folder / "inspect.json", found)
        files = [folder / "inspect.json"]
        for name, picture in save(found).items():
            files.append(folder / f"{name}.png")
            files[-1].write_bytes(picture)
        files.append(folder / "index.html")
        files[-1].write_text(render(found), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: cannot write into {folder}: {error.strerror or error}") from error
    return files


def output_folder(adapter: str) -> Path:
    """Where the result of ``adapter`` goes unless told otherwise: ``inspect`` in its folder."""
    return as_path(adapter) / "inspect"


__all__ = ["ADDS", "inspect", "output_folder", "write"]
