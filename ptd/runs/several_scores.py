"""Evaluate, label and continue rows that name their adapters: mixed in batches, with results per adapter and in all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptd.distributed.ranks import Ranks
from ptd.engine.evaluation import HeldOut, Measured, measure, metrics_of, text_loss
from ptd.runs.decoding import Decoding
from ptd.runs.generation import decode
from ptd.runs.scores import rows_to_continue, text_metrics
from ptd.runs.several import ALONE, Part, Several
from ptd.types import Reporter


def measure_parts(
    several: Several,
    parts: Sequence[Part],
    ranks: Ranks,
    *,
    batch_size: int,
    reporter: Reporter,
    what: str,
    labelled: bool = True,
    want_scores: bool,
) -> list[tuple[HeldOut, Measured]]:
    """Read the rows of all parts, in batches that the parts share, and return what was measured for each part."""
    held_out = [
        part.tuned.held_out(part.rows, batch_size, what=several.named_in(part, what), labelled=labelled)
        for part in parts
    ]
    report = held_out[0].examples.report
    for each in held_out[1:]:
        report += each.examples.report
    reporter.note(f"--data: {report}" if labelled else f"--data: {report.rows:,} rows, {report.tokens:,} tokens")
    readouts = [part.tuned.readout for part in parts]
    prepared = several.first.prepared
    measured = measure(held_out, prepared, readouts, ranks, reporter, want_scores=want_scores)
    return list(zip(held_out, measured, strict=True))


def metrics_of_parts(
    several: Several, parts: Sequence[Part], found: Sequence[tuple[HeldOut, Measured]], rows: Any, ranks: Ranks
) -> dict[str, Any]:
    """Return the metrics of all ``rows``; if rows name their adapters, also those of each adapter (``adapters``).

    The loss in all is the mean over all predictions. Labels in all have metrics only if the adapters share their task.
    """
    each = [metrics_of(held_out, measured, ranks) for held_out, measured in found]
    if not several.named:
        return each[0]
    weight = sum(measured.weight for _, measured in found)
    loss = sum(measured.loss * measured.weight for _, measured in found) / weight
    names = [ALONE if part.name is None else part.name for part in parts]
    of_adapters = {"adapters": dict(zip(names, each, strict=True))}
    first = found[0][0].task
    if first.generates:
        return text_loss(loss, sum(measured.supervised for _, measured in found)) | of_adapters
    one_task = all(held_out.task.facts() == first.facts() for held_out, _ in found)
    one_task = one_task and all(held_out.task.data.columns == first.data.columns for held_out, _ in found)
    labelling = first
    metrics = ranks.on_main(lambda: labelling.metrics(answers_of_parts(parts, found), rows)) if one_task else {}
    return {"loss": loss, **metrics, "rows": sum(len(part.numbers) for part in parts), **of_adapters}


def _answers(held_out: HeldOut, measured: Measured) -> list[dict[str, Any]]:
    task = held_out.task
    assert not task.generates
    return task.answers(measured.scores, held_out.examples, held_out.rows)


def answers_of_parts(parts: Sequence[Part], found: Sequence[tuple[HeldOut, Measured]]) -> list[dict[str, Any]]:
    """Return the answer to every row, in the order of the rows. Rank 0 only."""
    return in_row_order(parts, [_answers(held_out, measured) for held_out, measured in found])


def in_row_order(parts: Sequence[Part], values: Sequence[Sequence[Any]]) -> list[Any]:
    """Return the values of all parts' rows in the order of the rows."""
    numbered = [pair for part, of in zip(parts, values, strict=True) for pair in zip(part.numbers, of, strict=True)]
    return [value for _, value in sorted(numbered, key=lambda pair: int(pair[0]))]


def continue_parts(
    several: Several,
    parts: Sequence[Part],
    decoding: Decoding,
    ranks: Ranks,
    *,
    batch_size: int,
    reporter: Reporter,
    what: str,
) -> tuple[list[str], list[str]]:
    """Return the text generated for each row's prompt (rank 0; an empty list elsewhere), and each row's reference.

    Rows of different adapters share batches.
    """
    reporter = OnceReporter(reporter)
    found = [
        rows_to_continue(part.tuned, part.rows, decoding, reporter, several.named_in(part, what)) for part in parts
    ]
    prompts = in_row_order(parts, [each.prompts for each in found])
    references = in_row_order(parts, [each.references for each in found])
    writers = in_row_order(parts, [[part.tuned] * len(part.numbers) for part in parts])
    return decode(writers, prompts, decoding, ranks, batch_size=batch_size, reporter=reporter), references


def text_metrics_of_parts(
    parts: Sequence[Part], texts: Sequence[str], references: Sequence[str]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Return the text metrics of all rows, and of the rows of each part."""
    of_parts = [
        text_metrics([texts[number] for number in part.numbers], [references[number] for number in part.numbers])
        for part in parts
    ]
    return (text_metrics(texts, references) if len(parts) > 1 else of_parts[0]), of_parts


class OnceReporter(Reporter):
    """Passes everything on, but each note only once, however many adapters it holds for."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._noted: set[str] = set()

    def note(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self._reporter.note(text)

    def start(self, task: str, total: int, done: int = 0) -> None:
        self._reporter.start(task, total, done)

    def advance(self, task: str, done: int, line: str | None = None) -> None:
        self._reporter.advance(task, done, line)

    def finish(self, task: str) -> None:
        self._reporter.finish(task)
