"""The language model's own loss: cross-entropy of the supervised tokens."""

from __future__ import annotations

from ptd.readouts import Reading, Readout, Run
from ptd.types import IGNORE_INDEX, Batch


class LanguageModel(Readout):
    """Sum of the cross-entropies at the labelled positions; only these are projected to the vocabulary."""

    def read(self, run: Run, batch: Batch, scores: bool) -> Reading:
        labels = batch.labels.flatten()
        positions = (labels != IGNORE_INDEX).nonzero().flatten()
        loss = run.cross_entropy(batch, positions, labels[positions])
        return Reading(loss, float(batch.supervised_tokens))
