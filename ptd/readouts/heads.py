"""Trained heads: their network, and the classification of whole sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from ptd.async_copy import to_device
from ptd.readouts import Ask, Reading, Readout
from ptd.types import Batch, matrix_rates

Pooling = Literal["cls", "last", "mean"]
ROWS = 1024
"""Number of data rows whose features a trained head is assumed to distinguish, for its learning rate. With this number
the best rate of a head, measured on two backbones, is that of a prompt (benchmarks/README.md)."""


class Head(nn.Module):
    """Linear layers with tanh between them: ``hidden_size -> *hidden_sizes -> outputs``. No hidden sizes: one layer.

    The last layer starts at zero, so all outputs start equal, whatever the size of the hidden states.

    ``forward``: ``[..., hidden_size]`` of any dtype -> fp32 ``[..., outputs]``; the parameters are fp32 whatever the
    backbone's dtype.
    """

    def __init__(self, hidden_size: int, outputs: int, hidden_sizes: Sequence[int] = ()) -> None:
        super().__init__()
        widths = [hidden_size, *hidden_sizes, outputs]
        layers = [nn.Linear(before, behind, dtype=torch.float32) for before, behind in pairwise(widths)]
        modules: list[nn.Module] = [layers[0]]
        for layer in layers[1:]:
            modules += [nn.Tanh(), layer]
        self.layers = nn.Sequential(*modules)
        for parameter in layers[-1].parameters():
            nn.init.zeros_(parameter)

    def rates(self, input_size: float) -> dict[str, float]:
        """Return learning-rate factors by parameter name: `matrix_rates`, for inputs of this root mean square."""
        rates = matrix_rates(self, ROWS)
        return {name: rate / input_size if name == "layers.0.weight" else rate for name, rate in rates.items()}

    def forward(self, hidden: Tensor) -> Tensor:
        scores: Tensor = self.layers(hidden.float())
        return scores


class HeadReadout(Readout):
    """A readout with a trained `Head`, its attribute ``head``."""

    head: Head

    def rates(self, input_size: float) -> Mapping[str, float]:
        return {f"head.{name}": rate for name, rate in self.head.rates(input_size).items()}


class PooledClassifier(HeadReadout):
    """A head on one vector per sequence: its first position (``cls``), its ``last`` position or the ``mean`` of all.

    A row's label is stored at the first position of each of its sequences. Several sequences per row form an ensemble,
    see `classify`. ``class_weights``: weight of each label in the loss, fp32 ``[labels]``; None: 1.
    """

    def __init__(self, head: Head, pooling: Pooling, class_weights: Tensor | None = None) -> None:
        super().__init__()
        self.head, self.pooling = head, pooling
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)

    def asks(self, batch: Batch) -> Ask:
        if self.pooling != "mean":
            return Ask(batch.starts + (batch.lengths - 1 if self.pooling == "last" else 0))
        lengths = batch.lengths
        begins = torch.repeat_interleave(batch.starts - (lengths.cumsum(0) - lengths), lengths)
        return Ask(begins + torch.arange(len(begins), device=lengths.device))

    def read(self, output: Tensor, batch: Batch, scores: bool) -> Reading:
        targets = batch.labels.flatten()[batch.starts].view(-1, batch.group)[:, 0]
        logits = self.head(self.pool(output.float(), batch.lengths))
        return classify(logits.view(len(targets), batch.group, -1), targets, self.class_weights, scores)

    def pool(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Return one vector per sequence, ``[sequences, hidden]``, from the hidden states that were asked for."""
        if self.pooling != "mean":
            return hidden
        sequence = torch.repeat_interleave(lengths)
        sums = hidden.new_zeros(len(lengths), hidden.shape[1]).index_add(0, to_device(sequence, hidden.device), hidden)
        return sums / to_device(lengths, hidden.device)[:, None]


def classify(logits: Tensor, targets: Tensor, class_weights: Tensor | None, scores: bool) -> Reading:
    """Return loss and scores of rows that were read ``P`` times each: logits fp32 ``[R, P, labels]``, targets ``[R]``.

    With the probabilities p_i = softmax(logits_i) of reading i and the weight w of the row's label y, the loss of a row
    is w · mean_i −log p_i(y) and its weight is w; its scores are log mean_i p_i, ``[labels]``.
    """
    targets = to_device(targets, logits.device)
    log_p = log_softmax(logits, dim=-1)
    losses = -log_p.gather(2, targets[:, None, None].expand(-1, log_p.shape[1], 1)).mean(dim=(1, 2))
    weights = torch.ones_like(losses) if class_weights is None else class_weights[targets]
    mean = torch.logsumexp(log_p.detach(), dim=1) - math.log(log_p.shape[1])
    return Reading((weights * losses).sum(), weights.sum(), list(mean) if scores else None)
