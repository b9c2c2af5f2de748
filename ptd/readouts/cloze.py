"""Classify by words of the language model: pattern and verbalizer (Schick & Schütze 2021, "PET")."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptd.readouts import Ask, Reading, Readout
from ptd.readouts.heads import classify
from ptd.types import IGNORE_INDEX, Batch


@dataclass(frozen=True)
class Word:
    """A word that stands for ``label`` in ``pattern``: token ``tokens[j]`` is read at position ``positions[j]``.

    A position is an index among the labelled positions of a row, counted over all its sequences in order.
    """

    pattern: int
    label: int
    positions: tuple[int, ...]
    tokens: tuple[int, ...]


class Cloze(Readout):
    """The language model's probabilities of the labels' words, normalised over the labels; no trained parameters.

    With the next-token or mask-filling distributions q at the positions of a word v = (t_1 … t_k),

        log p(v) = Σ_j log q_j(t_j)
        s(l) = mean of log p(v) over the words v of label l
        p(l) = softmax_l s(l)

    For a masked model q_j is read at the j-th of k masks, all k in one pass (Schick & Schütze 2021b, "It's Not Just
    Size That Matters", §3, the parallel form); for a causal model q_j is the exact next-token distribution after
    t_1 … t_{j-1}. For words of one token the normaliser of q cancels in p(l), which is then PET's softmax over the
    (averaged) logits of the words. Several patterns form an ensemble, see `classify`. Every row has the same number of
    labelled positions, and its label is stored at each of them; scores are log-probabilities, fp32 ``[labels]``.
    """

    def __init__(self, words: Sequence[Word], labels: int, class_weights: Tensor | None = None) -> None:
        super().__init__()
        self.patterns = 1 + max(word.pattern for word in words)
        cells = [word.pattern * labels + word.label for word in words]
        sharing = Counter(cells)
        assert len(sharing) == self.patterns * labels, "every label needs a word in every pattern"
        reads = [
            (position, token, cell)
            for word, cell in zip(words, cells, strict=True)
            for position, token in zip(word.positions, word.tokens, strict=True)
        ]
        mean = torch.zeros(len(reads), len(sharing))  # read -> its weight in the mean of a pattern and label
        for number, (_, _, cell) in enumerate(reads):
            mean[number, cell] = 1 / sharing[cell]
        self.positions: Tensor
        self.tokens: Tensor
        self.mean: Tensor
        self.class_weights: Tensor | None
        self.register_buffer("positions", torch.tensor([read[0] for read in reads]), persistent=False)
        self.register_buffer("tokens", torch.tensor([read[1] for read in reads]), persistent=False)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("class_weights", class_weights, persistent=False)

    def token_ids(self) -> list[int]:
        return sorted(set(self.tokens.tolist()))

    def asks(self, batch: Batch) -> Ask:
        return Ask((batch.labels.flatten() != IGNORE_INDEX).nonzero().flatten())

    def read(self, output: Tensor, batch: Batch, scores: bool) -> Reading:
        labels = batch.labels[batch.labels != IGNORE_INDEX]
        rows = len(batch.rows)
        targets = labels.view(rows, -1)[:, 0]
        logits = output.unflatten(0, (rows, -1))
        log_norm = logits.float().logsumexp(dim=-1)
        log_q = logits[:, self.positions, self.tokens].float() - log_norm[:, self.positions]
        return classify((log_q @ self.mean).unflatten(1, (self.patterns, -1)), targets, self.class_weights, scores)
