"""``ptd predict``: what a tuned backbone says about rows: a label, tags or an answer, with probabilities."""

from __future__ import annotations

from typing import Any

from ptd.data import load_rows
from ptd.engine.evaluation import scores_of
from ptd.generate import Settings, find_tuned, start_ranks
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
    """The rows of ``data`` (a file, folder or hub name, as ``data.eval``), each with what the task answers added.

    The rows need no labels. Backbone and rows are treated as in training, changed by ``settings`` (of the sections
    ``backbone`` and ``data``). An answer's field that a row has already, such as its own label, is added as
    ``predicted_…``. Under a launcher the ranks share the rows and rank 0 returns them; the others return nothing.
    Raises `UserError`, also for an adapter that writes text.
    """
    ranks, reporter = start_ranks(settings), reporter or Reporter()
    try:
        found = find_tuned(adapter, backbone, settings=settings)
        task = found.task
        if task.generates:
            raise UserError("the adapter was trained to write, not to label; use ptd generate")
        rows = load_rows(data, task.data.eval_split, what="--data")
        tuned = found.load(ranks)
        held_out = tuned.held_out(rows, batch_size, what=data, labelled=False)
        report = held_out.examples.report
        reporter.note(f"--data: {report.rows:,} rows, {report.tokens:,} tokens")
        scores = scores_of(held_out, tuned.prepared, tuned.readout, ranks, reporter)
        if not ranks.is_main:
            return []
        answers = task.answers(scores, held_out.examples)
        return [_joined(row, answer) for row, answer in zip(rows.with_format(None), answers, strict=True)]
    finally:
        ranks.stop()


def _joined(row: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    return row | {f"predicted_{field}" if field in row else field: value for field, value in answer.items()}
