"""The language model's own loss: cross-entropy of the supervised tokens."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from ptd.async_copy import to_device
from ptd.readouts import Reading, Readout, Run
from ptd.types import IGNORE_INDEX, Batch


class LanguageModel(Readout):
    """Sum of the cross-entropies at the labelled positions; only these positions are projected to the vocabulary."""

    def read(self, run: Run, batch: Batch, scores: bool) -> Reading:
        labels = batch.labels.flatten()
        positions = (labels != IGNORE_INDEX).nonzero().flatten()
        fused = getattr(run, "cross_entropy", None)
        if fused is not None:
            return Reading(fused(batch, positions, labels[positions]), float(batch.supervised_tokens))
        logits = run(batch, positions)
        targets = to_device(labels[positions], logits.device)
        return Reading(cross_entropy(logits.float(), targets, reduction="sum"), float(batch.supervised_tokens))

    def idle(self, run: Run, batch: Batch) -> Tensor:
        return self.read(run, batch, scores=False).loss  # the batch has no labels
