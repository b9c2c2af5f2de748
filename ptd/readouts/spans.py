"""Extractive question answering: a trained head on the last hidden states predicts an answer's start and end."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ptd.async_copy import to_device
from ptd.readouts import Ask, Reading
from ptd.readouts.heads import Head, HeadReadout
from ptd.readouts.tags import positions_by_row
from ptd.types import Batch

CANDIDATE, START, END = 0, 1, 2
"""Labels of the positions at which an answer may start or end; a position that is both has ``START | END``."""


class Spans(HeadReadout):
    """(CE of the start + CE of the end) / 2 per row, each over the row's candidates (BERT, Devlin et al. 2019, §4.2).

    Every row has exactly one start and one end among its candidates. Scores of a row: logits ``[candidates, 2]``.
    """

    def __init__(self, hidden_size: int, hidden_sizes: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.head = Head(hidden_size, 2, hidden_sizes)

    def asks(self, batch: Batch) -> Ask:
        return Ask(positions_by_row(batch)[0])

    def read(self, output: Tensor, batch: Batch, scores: bool) -> Reading:
        positions, counts = positions_by_row(batch)
        logits = self.head(output)
        log_probs = log_softmax(_by_row(logits, counts), dim=1)
        flags = batch.labels.flatten()[positions]
        # Each flag occurs once per row, so this selects one start and one end of every row.
        candidate, end = (torch.stack([flags & START, flags & END], dim=1) != 0).nonzero().unbind(1)
        row, column = _places(counts)
        targets = to_device(torch.stack([row[candidate], column[candidate], end]), logits.device)
        loss = -log_probs[tuple(targets)].sum() / 2
        rows = list(logits.split(counts.tolist())) if scores else None
        return Reading(loss, float(len(batch.rows)), rows)


def _places(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return each candidate's row and its index in that row: int64 ``[K]`` each, on the host like ``counts``."""
    row = torch.repeat_interleave(counts)
    return row, torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]


def _by_row(values: Tensor, counts: Tensor) -> Tensor:
    """Pad ``[K, 2]``, row after row, with -inf to ``[rows, longest, 2]``. ``counts`` are on the host."""
    row, column = _places(counts)
    longest = int(counts.max())
    padded = values.new_full((len(counts) * longest, values.shape[1]), float("-inf"))
    padded = padded.index_copy(0, to_device(row * longest + column, values.device), values)
    return padded.view(len(counts), longest, -1)
