"""Readouts compute a batch's loss and scores from the output of the backbone. One file per readout; pure torch.

A readout never sees a model. It `asks` for the output at some positions of a batch, and `read` turns this output into a
`Reading`. Between the two, one forward pass computes the output, which may serve several readouts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptd.types import Batch


@dataclass(frozen=True)
class Ask:
    """What a readout needs from the forward pass of a batch.

    ``positions``: int64 ``[n]``, flattened positions, each given once. ``targets``: int64 ``[n]``, the tokens whose
    cross-entropies are needed; None: the backbone's own output is needed.
    """

    positions: Tensor
    targets: Tensor | None = None


Run = Callable[[Batch, Ask], Tensor]
"""A forward pass. Without targets it returns the output of the backbone (the logits of a language model, the last
hidden states of a body), ``[n, width]``; with targets the language model's cross-entropies, fp32 ``[n]``."""


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

    def asks(self, batch: Batch) -> Ask:
        """Return what `read` needs from the forward pass of a batch with at least one row."""
        raise NotImplementedError

    def read(self, output: Tensor, batch: Batch, scores: bool) -> Reading:
        """Return the `Reading` of a batch with at least one row. ``output`` is what was asked for."""
        raise NotImplementedError

    def ask(self, batch: Batch) -> Ask:
        """Return what is needed from the forward pass of any batch.

        A batch without rows takes the same path through the backbone as other batches, because sharded ranks have to
        gather the weights of the same modules in the same order, in the backward pass too.
        """
        return self.asks(batch) if batch.rows else self.idle()

    def idle(self) -> Ask:
        """Return what a batch without rows asks for, in place of `asks`."""
        return Ask(torch.zeros(1, dtype=torch.long))

    def reading(self, output: Tensor, batch: Batch, scores: bool = False) -> Reading:
        """Return loss, weight and, with ``scores``, the scores of each row, from the ``output`` that was asked for.

        The loss of a batch without rows is 0 with a gradient of 0, and its weight is 0.
        """
        return self.read(output, batch, scores) if batch.rows else Reading(output[..., :0].float().sum(), 0.0, [])

    def forward(self, run: Run, batch: Batch, scores: bool = False) -> Reading:
        """Run the batch and return its `reading`."""
        return self.reading(run(batch, self.ask(batch)), batch, scores)
