"""``ptd eval``: measure an adapter's loss and task metrics; with generation also BLEU, ROUGE-L and exact match."""

from __future__ import annotations

from typing import Any

from ptd.data import load_rows
from ptd.runs.decoding import Decoding
from ptd.runs.scores import check_writes
from ptd.runs.several import COLUMN, Adapters, find_adapters
from ptd.runs.several_scores import continue_parts, measure_parts, metrics_of_parts, text_metrics_of_parts
from ptd.runs.tuned import Settings
from ptd.types import Reporter


def evaluate(
    data: str,
    *,
    adapter: Adapters,
    column: str = COLUMN,
    backbone: str | None = None,
    settings: Settings | None = None,
    decoding: Decoding | None = None,
    batch_size: int = 16,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Evaluate on ``data`` (as ``data.eval``); with ``decoding`` also generate and compare with the references.

    The backbone and the rows are treated as in the adapter's training, except for the keys in ``settings`` (sections
    ``backbone`` and ``data``). Without ``adapter``, the ``backbone`` is evaluated without a prompt. Of several adapters
    by name, each row reads the one that its ``column`` names, or none, and the result has those of each adapter under
    ``adapters``. Under a launcher, the ranks share the rows and all return the same result. Raises `UserError`.
    """
    found, reporter = find_adapters(adapter, backbone, settings=settings), reporter or Reporter()
    ranks = found.start_ranks()
    try:
        if decoding is not None:
            for each in found.by_name.values():
                check_writes(each.task)
        rows = load_rows(data, found.first.task.data.eval_split, what="--data")
        several = found.load(ranks, reporter)
        parts = several.parts(rows, column, data)
        want_scores = not found.first.task.generates
        measured = measure_parts(
            several, parts, ranks, batch_size=batch_size, reporter=reporter, what=data, want_scores=want_scores
        )
        result = metrics_of_parts(several, parts, measured, rows, ranks)
        if decoding is not None:
            texts, references = continue_parts(
                several, parts, decoding, ranks, batch_size=batch_size, reporter=reporter, what=data
            )
            in_all, of_parts = ranks.on_main(lambda: text_metrics_of_parts(parts, texts, references))
            result |= in_all
            if several.named:
                for own, more in zip(result["adapters"].values(), of_parts, strict=True):
                    own |= more
                result["adapters"] = result.pop("adapters")  # last
        return result
    finally:
        ranks.stop()
