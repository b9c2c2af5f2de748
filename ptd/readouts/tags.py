"""Token classification: a trained head on the last hidden states predicts a label at each labelled position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, nll_loss

from ptd.async_copy import to_device
from ptd.readouts import Ask, Reading
from ptd.readouts.heads import Head, HeadReadout
from ptd.types import IGNORE_INDEX, Batch


def positions_by_row(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the labelled positions (int64 ``[K]``, ascending) and their number per row (int64 ``[rows]``).

    Every row of the batch has to be one sequence.
    """
    assert batch.group == 1
    positions = (batch.labels.flatten() != IGNORE_INDEX).nonzero().flatten()
    owner = torch.searchsorted(batch.starts, positions, right=True) - 1
    return positions, torch.bincount(owner, minlength=len(batch.rows))


class Tags(HeadReadout):
    """Cross-entropy of ``labels`` classes at the labelled positions; the backbone returns no other positions.

    ``class_weights`` (one per label) weight both the sum of the losses and its divisor, as in torch's
    ``CrossEntropyLoss(weight=…)``. Scores of a row: log-probabilities ``[its labelled positions, labels]``.
    """

    def __init__(
        self,
        hidden_size: int,
        labels: int,
        hidden_sizes: tuple[int, ...] = (),
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.head = Head(hidden_size, labels, hidden_sizes)
        weights = torch.ones(labels) if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        assert len(weights) == labels
        self.class_weights: Tensor
        self.register_buffer("class_weights", weights, persistent=False)  # the adapter stores them by label name

    def asks(self, batch: Batch) -> Ask:
        return Ask(positions_by_row(batch)[0])

    def read(self, output: Tensor, batch: Batch, scores: bool) -> Reading:
        positions, counts = positions_by_row(batch)
        log_probs = log_softmax(self.head(output), dim=-1)
        targets = to_device(batch.labels.flatten()[positions], log_probs.device)
        loss = nll_loss(log_probs, targets, weight=self.class_weights, reduction="sum")
        rows = list(log_probs.split(counts.tolist())) if scores else None
        return Reading(loss, self.class_weights[targets].sum(), rows)
