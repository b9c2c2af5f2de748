"""Compute loss and metrics on held-out rows over all ranks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ptd.async_copy import AsyncHostCopy, together
from ptd.data import Batches
from ptd.distributed.ranks import Ranks
from ptd.engine.mixed_batches import MixedReads, Reads, joined_examples
from ptd.engine.setup import Prepared, check_context
from ptd.readouts import Reading, Readout
from ptd.tasks import Task
from ptd.types import Examples, Reporter

T = TypeVar("T")
BEHIND = 4
"""The host reads the scores of a batch from a GPU this many batches after it queued the batch, so that the GPU always
has work; until then the scores are in pinned memory."""


@dataclass(frozen=True)
class HeldOut:
    """Rows to evaluate on: ``examples`` are tokenised on every rank, ``rows`` are the raw rows on rank 0 only.

    ``member``: which of several prompts the rows read, or `NO_MEMBER`; None: there is one prompt.
    """

    task: Task
    examples: Examples
    rows: Any
    batch_size: int
    packing: bool
    pad_token_id: int | None
    member: int | None = None

    def check_context(self, prepared: Prepared) -> None:
        """Raise `UserError` if a row is longer than the context of the backbone."""
        extra = prepared.attachment.extra_for(self.member)
        check_context(prepared.shape.context, extra, self.examples.longest_sequence)

    def batches(self, prepared: Prepared, ranks: Ranks) -> Batches:
        """Return batches of all rows, each row once, distributed over the ranks; padded batches in order of length."""
        return Batches(
            self.examples,
            rank=ranks.rank,
            world_size=ranks.world_size,
            per_device_batch_size=self.batch_size,
            packing=self.packing and prepared.attachment.packable,
            shuffle=False,
            pad_token_id=self.pad_token_id or 0,
        )


@dataclass(frozen=True)
class Measured:
    """What a readout read from some rows, over all ranks.

    ``loss``: the mean loss over all predictions; ``weight``: its divisor. ``scores``: those of every row, in the order
    of the rows, if requested (on rank 0; an empty list elsewhere).
    """

    loss: float
    weight: float
    supervised: int
    scores: list[Tensor]


def evaluate_held_out(
    held_out: HeldOut, prepared: Prepared, readout: Readout, ranks: Ranks, reporter: Reporter
) -> dict[str, Any]:
    """Return the mean loss over all predictions, and the metrics of the task or, for text, the perplexity.

    Every rank calls this together and gets the same result.
    """
    (measured,) = measure([held_out], prepared, [readout], ranks, reporter, want_scores=not held_out.task.generates)
    return metrics_of(held_out, measured, ranks)


def metrics_of(held_out: HeldOut, measured: Measured, ranks: Ranks) -> dict[str, Any]:
    """Return what `evaluate_held_out` returns, from what was measured with scores. All ranks call this together."""
    task, rows, scores = held_out.task, held_out.rows, measured.scores
    if task.generates:
        return text_loss(measured.loss, measured.supervised)
    labelling = task
    metrics = ranks.on_main(lambda: labelling.metrics(labelling.answers(scores, held_out.examples, rows), rows))
    return {"loss": measured.loss, **metrics, "rows": held_out.examples.report.rows}


def text_loss(loss: float, supervised_tokens: int) -> dict[str, Any]:
    """Return the metrics of text for a mean loss."""
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "supervised_tokens": supervised_tokens}


def mean_loss(
    held_out: HeldOut, prepared: Prepared, readout: Reads, ranks: Ranks, reporter: Reporter
) -> tuple[float, int]:
    """Return the mean loss over all predictions and the number of supervised tokens, the same on all ranks."""
    (measured,) = measure([held_out], prepared, [readout], ranks, reporter, want_scores=False)
    return measured.loss, measured.supervised


def scores_of(
    held_out: HeldOut, prepared: Prepared, readout: Readout, ranks: Ranks, reporter: Reporter
) -> list[Tensor]:
    """Return the readout's scores of every row, in the order of the rows (on rank 0; an empty list elsewhere)."""
    return measure([held_out], prepared, [readout], ranks, reporter, want_scores=True)[0].scores


@torch.no_grad()
def measure(
    parts: Sequence[HeldOut],
    prepared: Prepared,
    readouts: Sequence[Reads],
    ranks: Ranks,
    reporter: Reporter,
    *,
    want_scores: bool,
) -> list[Measured]:
    """Read all rows, and return what each part's readout read from its rows.

    A batch may contain rows of several parts, each with the part's own prompt (`ptd.engine.mixed_batches`). Every rank
    calls this together. Raises `UserError` if a row is longer than the context of the backbone, or if the parts' rows
    cannot share batches.
    """
    for part in parts:
        part.check_context(prepared)
    examples = parts[0].examples
    if len(parts) > 1 or parts[0].member is not None:
        examples = joined_examples([part.examples for part in parts], [part.member for part in parts])
    joint = replace(parts[0], examples=examples, packing=all(part.packing for part in parts))
    batches = joint.batches(prepared, ranks)
    mixed = MixedReads(
        [part.examples for part in parts],
        readouts,
        [part.member for part in parts],
        packed=batches.packing,
        pad=joint.pad_token_id or 0,
    )
    sums = [_Sums(ranks.device) for _ in parts]
    unread: deque[_Scores] = deque()
    found: dict[int, Tensor] = {}
    steps = batches.steps_in_epoch(0)
    reporter.start("eval", steps)
    for step in range(steps):
        for batch in batches.step(step):
            for place, own, rows, reading in mixed(prepared.run, batch, want_scores):
                sums[place].add(reading, own.supervised_tokens)
                if reading.scores:
                    unread.append(_Scores(rows, reading.scores))
            while len(unread) > BEHIND * len(parts):
                found |= unread.popleft().read()
        reporter.advance("eval", step + 1)
    reporter.finish("eval")
    for scores in unread:
        found |= scores.read()
    totals = ranks.all_reduce(torch.cat([each.numbers() for each in sums])).view(-1, 3).tolist()
    every = in_order(found, ranks) if want_scores else []
    measured, first = [], 0
    for part, (loss, weight, supervised) in zip(parts, totals, strict=True):
        measured.append(Measured(loss / weight, weight, int(supervised), every[first : first + len(part.examples)]))
        first += len(part.examples)
    return measured


class _Sums:
    """The sums of loss, weight and supervised tokens on this rank."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.weight: Tensor | float = 0.0
        self.supervised = 0

    def add(self, reading: Reading, supervised: int) -> None:
        self.loss += reading.loss
        self.weight = self.weight + (reading.weight.double() if isinstance(reading.weight, Tensor) else reading.weight)
        self.supervised += supervised

    def numbers(self) -> Tensor:
        return together([self.loss, self.weight, self.supervised], self.loss.device)


class _Scores:
    """The scores of the rows of a batch, of any shapes, during their copy to the host."""

    def __init__(self, rows: tuple[int, ...], scores: list[Tensor]) -> None:
        self.rows, self.shapes = rows, [each.shape for each in scores]
        self._flat = AsyncHostCopy(torch.cat([each.flatten() for each in scores]))

    def read(self) -> dict[int, Tensor]:
        """Return the scores by row, each copied out of the common buffer."""
        parts = self._flat.tensor().split([shape.numel() for shape in self.shapes])
        return {row: part.view(shape).clone() for row, part, shape in zip(self.rows, parts, self.shapes, strict=True)}


def in_order(found: dict[int, T], ranks: Ranks) -> list[T]:
    """Return the values that all ranks ``found``, sorted by row (on rank 0; an empty list elsewhere)."""
    if ranks.world_size > 1:
        parts: list[Any] = [None] * ranks.world_size
        dist.gather_object(found, parts if ranks.is_main else None, dst=0)
        if not ranks.is_main:
            return []
        found = {row: scores for part in parts for row, scores in part.items()}
    return [found[row] for row in sorted(found)]
