"""Readouts compute a batch's loss and scores from the output of the backbone. One file per readout; pure torch.

A readout never sees a model, only ``run(batch, positions)``. It returns the output of the backbone (the logits of a
language model, the last hidden states of a body) at the given flattened positions, ``[len(positions), width]``. Each
position is given once; None: all positions. A run may also offer ``cross_entropy(batch, positions, targets)``: the fp32
sum of a language model's cross-entropies, computed without holding logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptd.types import Batch

Run = Callable[[Batch, Tensor | None], Tensor]


@dataclass(frozen=True)
class Reading:
    """Result of a readout for one batch.

    ``loss``: fp32 scalar, the sum over all predictions. ``weight``: the batch's part of the divisor; the loss of a step
    is the sum of ``loss`` over its batches, divided by the sum of ``weight``. ``scores``: one fp32 tensor per row of
    the batch, if requested.
    """

    loss: Tensor
    weight: Tensor | float
    scores: list[Tensor] | None = None


class Readout(nn.Module):
    """Base class of all readouts; the parameters of a readout, if it has any, are trained together with the prompt."""

    def token_ids(self) -> list[int]:
        """Return the ids of the vocabulary tokens whose scores the readout reads, except labels in the rows."""
        return []

    def rates(self, input_size: float) -> Mapping[str, float]:
        """Return parameter name -> factor (missing: 1) that makes the learning rate independent of widths and sizes.

        ``input_size``: root mean square of the hidden states that a trained head reads.
        """
        return {}

    def read(self, run: Run, batch: Batch, scores: bool) -> Reading:
        """Run a batch with at least one row, once, and return its `Reading`."""
        raise NotImplementedError

    def forward(self, run: Run, batch: Batch, scores: bool = False) -> Reading:
        """Return loss, weight and, with ``scores``, the scores of each row. A batch without rows runs with weight 0."""
        return self.read(run, batch, scores) if batch.rows else Reading(self.idle(run, batch), 0.0, [])

    def idle(self, run: Run, batch: Batch) -> Tensor:
        """Return the loss of a batch without rows: 0, with a gradient of 0.

        The batch takes the same path through the backbone as other batches, because sharded ranks have to gather the
        weights of the same modules in the same order, in the backward pass too.
        """
        output = run(batch, torch.zeros(1, dtype=torch.long))
        return output[:, :0].float().sum()
