"""``ptd predict``: predict a label, tags or an answer for each row with a tuned backbone, with probabilities."""

from __future__ import annotations

from typing import Any

from ptd.data import load_rows
from ptd.engine.evaluation import scores_of
from ptd.runs.tuned import Settings, find_tuned
from ptd.types import Reporter, UserError


def predict(
    data: str,
    *,
    adapter: str,
    backbone: str | None = None,
    settings: Settings | None = None,
    batch_size: int = 16,
    reporter: Reporter | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of ``data`` (a file, folder or hub name, as ``data.eval``), each with its prediction added.

    The rows need no labels. The backbone and the rows are treated as in training, except for the keys in ``settings``
    (sections ``backbone`` and ``data``). If a row already has a field of the prediction, such as its own label, the
    prediction's field is added as ``predicted_…``. Under a launcher, the ranks share the rows; rank 0 returns them and
    the other ranks return an empty list. Raises `UserError`, also for an adapter that generates text.
    """
    found, reporter = find_tuned(adapter, backbone, settings=settings), reporter or Reporter()
    ranks = found.start_ranks()
    try:
        task = found.task
        if task.generates:
            raise UserError("the adapter was trained to generate text, not to label rows; use ptd generate")
        rows = load_rows(data, task.data.eval_split, what="--data")
        tuned = found.load(ranks, reporter)
        held_out = tuned.held_out(rows, batch_size, what=data, labelled=False)
        report = held_out.examples.report
        reporter.note(f"--data: {report.rows:,} rows, {report.tokens:,} tokens")
        scores = scores_of(held_out, tuned.prepared, tuned.readout, ranks, reporter)
        if not ranks.is_main:
            return []
        answers = task.answers(scores, held_out.examples, rows)
        return [_joined(row, answer) for row, answer in zip(rows.with_format(None), answers, strict=True)]
    finally:
        ranks.stop()


def _joined(row: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    return row | {f"predicted_{field}" if field in row else field: value for field, value in answer.items()}
