"""``ptd predict``: predict a label, tags or an answer for each row with a tuned backbone, with probabilities."""

from __future__ import annotations

from typing import Any

from ptd.data import load_rows
from ptd.runs.several import COLUMN, Adapters, find_adapters
from ptd.runs.several_scores import answers_of_parts, measure_parts
from ptd.runs.tuned import Settings
from ptd.types import Reporter, UserError


def predict(
    data: str,
    *,
    adapter: Adapters,
    column: str = COLUMN,
    backbone: str | None = None,
    settings: Settings | None = None,
    batch_size: int = 16,
    reporter: Reporter | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of ``data`` (a file, folder or hub name, as ``data.eval``), each with its prediction added.

    The rows need no labels. The backbone and the rows are treated as in training, except for the keys in ``settings``
    (sections ``backbone`` and ``data``). If a row already has a field of the prediction, such as its own label, the
    prediction's field is added as ``predicted_…``. Of several adapters by name, each row is labelled by the one that
    its ``column`` names. Under a launcher, the ranks share the rows; rank 0 returns them and the other ranks return an
    empty list. Raises `UserError`, also for an adapter that generates text.
    """
    found, reporter = find_adapters(adapter, backbone, settings=settings), reporter or Reporter()
    ranks = found.start_ranks()
    try:
        task = found.first.task
        if task.generates:
            raise UserError("the adapter was trained to generate text, not to label rows; use ptd generate")
        rows = load_rows(data, task.data.eval_split, what="--data")
        several = found.load(ranks, reporter)
        parts = several.parts(rows, column, data)
        measured = measure_parts(
            several,
            parts,
            ranks,
            batch_size=batch_size,
            reporter=reporter,
            what=data,
            labelled=False,
            want_scores=True,
        )
        if not ranks.is_main:
            return []
        answers = answers_of_parts(parts, measured)
        return [_joined(row, answer) for row, answer in zip(rows.with_format(None), answers, strict=True)]
    finally:
        ranks.stop()


def _joined(row: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    return row | {f"predicted_{field}" if field in row else field: value for field, value in answer.items()}
