"""Readouts: how a batch's loss and scores come out of the backbone. One file is one readout; pure torch.

A readout never sees a model, only ``run(batch, positions)``: what the backbone puts out (logits of a language model,
the last hidden states of a body) at these of all flattened positions, each given once, ``[len(positions), width]``;
None: at all of them. A run may also offer ``cross_entropy(batch, positions, targets)``, their fp32 sum for a language
model, which it computes without holding logits.
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
    """What a readout says about a batch.

    ``loss``: sum over what is predicted, fp32 scalar; ``weight``: what its sum over all batches of a step is divided
    by; ``scores``: one fp32 tensor a row of the batch, if asked for.
    """

    loss: Tensor
    weight: Tensor | float
    scores: list[Tensor] | None = None


class Readout(nn.Module):
    """Base of all readouts; its parameters, if it has any, are trained beside the prompt."""

    def token_ids(self) -> list[int]:
        """Tokens of the vocabulary whose scores it reads by their ids; of a label that is a token, the rows say so."""
        return []

    def rates(self, input_size: float) -> Mapping[str, float]:
        """Parameter name -> factor of the learning rate (missing: 1) that makes it independent of widths and sizes.

        ``input_size``: root mean square of the hidden states that a trained head reads.
        """
        return {}

    def read(self, run: Run, batch: Batch, scores: bool) -> Reading:
        """Run the batch, which has at least one row, once."""
        raise NotImplementedError

    def forward(self, run: Run, batch: Batch, scores: bool = False) -> Reading:
        """Loss, weight and, with ``scores``, the scores of each row. A filler runs too, and counts nothing."""
        return self.read(run, batch, scores) if batch.rows else Reading(self.idle(run, batch), 0.0, [])

    def idle(self, run: Run, batch: Batch) -> Tensor:
        """The loss of a filler, 0 with a gradient of 0. It takes the way of other batches through the backbone: sharded
        ranks have to gather weights for the same modules in the same order, in the backward pass too."""
        output = run(batch, torch.zeros(1, dtype=torch.long))
        return output[:, :0].float().sum()
