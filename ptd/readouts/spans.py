"""Where an answer starts and where it ends, by a trained head on the last hidden states: extractive QA."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ptd.readouts import Reading, Readout, Run
from ptd.readouts.heads import Head
from ptd.readouts.tags import positions_by_row
from ptd.types import Batch

CANDIDATE, START, END = 0, 1, 2
"""Labels of the positions that an answer may start and end at; one that does both has ``START | END``."""


class Spans(Readout):
    """(CE of the start + CE of the end) / 2 a row, each over the row's candidates (BERT, Devlin et al. 2019, §4.2).

    Every row has exactly one start and one end among its candidates. Scores of a row: logits ``[candidates, 2]``.
    """

    def __init__(self, hidden_size: int, hidden_sizes: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.head = Head(hidden_size, 2, hidden_sizes)

    def read(self, run: Run, batch: Batch, scores: bool) -> Reading:
        positions, counts = positions_by_row(batch)
        logits = self.head(run(batch, positions))
        counts = counts.to(logits.device)
        flags = batch.labels.flatten()[positions].to(logits.device, non_blocking=True)
        is_target = torch.stack([flags & START, flags & END], dim=1) != 0
        log_probs = log_softmax(_by_row(logits, counts), dim=1)
        # Both flags occur once a row, so what is gathered is one start and one end of every row.
        loss = -log_probs[_by_row(is_target, counts, fill=False)].sum() / 2
        rows = list(logits.split(counts.tolist())) if scores else None
        return Reading(loss, float(len(batch.rows)), rows)


def _by_row(values: Tensor, counts: Tensor, fill: float | bool = float("-inf")) -> Tensor:
    """``[K, 2]``, row after row -> ``[rows, longest, 2]``, filled up with ``fill``."""
    column = torch.arange(int(counts.max()), device=values.device)
    inside = column < counts[:, None]
    padded = values.new_full((*inside.shape, values.shape[1]), fill)
    padded[inside] = values
    return padded
