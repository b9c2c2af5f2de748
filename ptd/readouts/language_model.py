"""The language model's own loss: cross-entropy of the supervised tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ptd.readouts import Ask, Reading, Readout
from ptd.types import IGNORE_INDEX, Batch


class LanguageModel(Readout):
    """Sum of the cross-entropies at the labelled positions; only these positions are projected to the vocabulary."""

    def asks(self, batch: Batch) -> Ask:
        labels = batch.labels.flatten()
        positions = (labels != IGNORE_INDEX).nonzero().flatten()
        return Ask(positions, labels[positions])

    def idle(self) -> Ask:
        nothing = torch.zeros(0, dtype=torch.long)
        return Ask(nothing, nothing)

    def read(self, output: Tensor, batch: Batch, scores: bool) -> Reading:
        return Reading(output.sum(), float(batch.supervised_tokens))
