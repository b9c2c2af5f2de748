"""``ptd eval``: measure an adapter's loss and task metrics; with generation also BLEU, ROUGE-L and exact match."""

from __future__ import annotations

from typing import Any

from ptd.data import load_rows
from ptd.runs.decoding import Decoding
from ptd.runs.scores import check_writes, continue_rows, held_out_metrics, text_metrics
from ptd.runs.tuned import Settings, find_tuned
from ptd.types import Reporter


def evaluate(
    data: str,
    *,
    adapter: str | None,
    backbone: str | None = None,
    settings: Settings | None = None,
    decoding: Decoding | None = None,
    batch_size: int = 16,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Evaluate on ``data`` (as ``data.eval``); with ``decoding`` also generate and compare with the references.

    The backbone and the rows are treated as in the adapter's training, except for the keys in ``settings`` (sections
    ``backbone`` and ``data``). Without ``adapter``, the ``backbone`` is evaluated without a prompt. Under a launcher,
    the ranks share the rows and all return the same result. Raises `UserError`.
    """
    found, reporter = find_tuned(adapter, backbone, settings=settings), reporter or Reporter()
    ranks = found.start_ranks()
    try:
        if decoding is not None:
            check_writes(found.task)
        rows = load_rows(data, found.task.data.eval_split, what="--data")
        tuned = found.load(ranks, reporter)
        result = held_out_metrics(tuned, rows, ranks, batch_size=batch_size, reporter=reporter, what=data)
        if decoding is not None:
            outputs, references = continue_rows(
                tuned, rows, decoding, ranks, batch_size=batch_size, reporter=reporter, what=data
            )
            result |= ranks.on_main(lambda: text_metrics(outputs, references))
        return result
    finally:
        ranks.stop()
