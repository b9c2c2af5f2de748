"""Compute loss and metrics on held-out rows over all ranks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ptd.async_copy import AsyncHostCopy, together
from ptd.data import Batches
from ptd.distributed.ranks import Ranks
from ptd.engine.setup import Prepared, check_context
from ptd.readouts import Reading, Readout, Run
from ptd.tasks import Task
from ptd.types import Batch, Examples, Reporter

T = TypeVar("T")
BEHIND = 4
"""The host reads the scores of a batch from a GPU this many batches after it queued the batch, so that the GPU always
has work; until then the scores are in pinned memory."""
Reads = Callable[[Run, Batch, bool], Reading]
"""A readout, or a function that wraps a readout."""


@dataclass(frozen=True)
class HeldOut:
    """Rows to evaluate on: ``examples`` are tokenised on every rank, ``rows`` are the raw rows on rank 0 only."""

    task: Task
    examples: Examples
    rows: Any
    batch_size: int
    packing: bool
    pad_token_id: int | None

    def batches(self, prepared: Prepared, ranks: Ranks) -> Batches:
        """Return batches of all rows, each row once, distributed over the ranks; padded batches in order of length.

        Raises `UserError` if a row is longer than the context of the backbone.
        """
        sides = [side for side in (self.examples, self.examples.source) if side is not None]
        longest = max(int((side.offsets[1:] - side.offsets[:-1]).max()) for side in sides)
        check_context(prepared.shape.context, prepared.attachment.extra_positions, longest)
        return Batches(
            self.examples,
            rank=ranks.rank,
            world_size=ranks.world_size,
            per_device_batch_size=self.batch_size,
            packing=self.packing and prepared.attachment.packable,
            shuffle=False,
            pad_token_id=self.pad_token_id or 0,
        )


def evaluate_held_out(
    held_out: HeldOut, prepared: Prepared, readout: Readout, ranks: Ranks, reporter: Reporter
) -> dict[str, Any]:
    """Return the mean loss over all predictions, and the metrics of the task or, for text, the perplexity.

    Every rank calls this together and gets the same result.
    """
    task = held_out.task
    loss, supervised, scores = _pass(held_out, prepared, readout, ranks, reporter, want_scores=not task.generates)
    if task.generates:
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "supervised_tokens": supervised}
    labelling = task
    rows = held_out.rows
    metrics = ranks.on_main(lambda: labelling.metrics(labelling.answers(scores, held_out.examples, rows), rows))
    return {"loss": loss, **metrics, "rows": held_out.examples.report.rows}


def mean_loss(
    held_out: HeldOut, prepared: Prepared, readout: Reads, ranks: Ranks, reporter: Reporter
) -> tuple[float, int]:
    """Return the mean loss over all predictions and the number of supervised tokens, the same on all ranks."""
    return _pass(held_out, prepared, readout, ranks, reporter, want_scores=False)[:2]


def scores_of(
    held_out: HeldOut, prepared: Prepared, readout: Readout, ranks: Ranks, reporter: Reporter
) -> list[Tensor]:
    """Return the readout's scores of every row, in the order of the rows (on rank 0; an empty list elsewhere)."""
    return _pass(held_out, prepared, readout, ranks, reporter, want_scores=True)[2]


@torch.no_grad()
def _pass(
    held_out: HeldOut, prepared: Prepared, readout: Reads, ranks: Ranks, reporter: Reporter, *, want_scores: bool
) -> tuple[float, int, list[Tensor]]:
    batches = held_out.batches(prepared, ranks)
    loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
    weight: Tensor | float = 0.0
    supervised = 0
    found: dict[int, Tensor] = {}
    unread: deque[_Scores] = deque()
    steps = batches.steps_in_epoch(0)
    reporter.start("eval", steps)
    for step in range(steps):
        for batch in batches.step(step):
            reading = readout(prepared.run, batch, want_scores)
            loss += reading.loss
            weight = weight + (reading.weight.double() if isinstance(reading.weight, Tensor) else reading.weight)
            supervised += batch.supervised_tokens
            if reading.scores:
                unread.append(_Scores(batch.rows, reading.scores))
            if len(unread) > BEHIND:
                found |= unread.popleft().read()
        reporter.advance("eval", step + 1)
    reporter.finish("eval")
    for scores in unread:
        found |= scores.read()
    mean, everything = _over_all(loss, weight, supervised, ranks)
    return mean, everything, in_order(found, ranks) if want_scores else []


def _over_all(loss: Tensor, weight: Tensor | float, supervised: int, ranks: Ranks) -> tuple[float, int]:
    """Return the mean loss and the number of supervised tokens over all ranks."""
    own = together([loss, weight, supervised], loss.device)
    total, divisor, everything = ranks.all_reduce(own).tolist()
    return total / divisor, int(everything)


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
