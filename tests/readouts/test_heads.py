"""Test the trained head's network, pooling in both layouts, and the loss of rows that are read several times."""

from __future__ import annotations

import math

import pytest
import torch

from ptd.readouts import Ask
from ptd.readouts.heads import Head, PooledClassifier, classify
from ptd.types import Batch

LENGTHS = [3, 1, 4]


def batch(packed: bool, labels: list[int]) -> Batch:
    """Return sequences of `LENGTHS` whose tokens are numbered consecutively from 1."""
    pieces = torch.arange(1, sum(LENGTHS) + 1).split(LENGTHS)
    marks = [torch.tensor([label, *[-100] * (n - 1)]) for label, n in zip(labels, LENGTHS, strict=True)]
    if packed:
        ids, targets = torch.cat(pieces)[None], torch.cat(marks)[None]
    else:
        ids = torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)
        targets = torch.nn.utils.rnn.pad_sequence(marks, batch_first=True, padding_value=-100)
    return Batch(
        input_ids=ids,
        labels=targets,
        position_ids=torch.zeros_like(ids),
        cu_seqlens=torch.tensor([0, 3, 4, 8], dtype=torch.int32) if packed else None,
        max_seqlen=4,
        tokens=8,
        supervised_tokens=3,
        lengths=torch.tensor(LENGTHS),
        rows=(5, 6, 7),
    )


def run(given: Batch, ask: Ask) -> torch.Tensor:
    """Return hidden states that identify their token."""
    token = given.input_ids.flatten()[ask.positions].to(torch.bfloat16)
    return torch.stack([token, -token], dim=1)


def test_a_head_is_linear_or_has_tanh_layers():
    hidden = torch.randn(5, 4)
    linear = Head(4, 3)
    (layer,) = linear.layers
    assert not linear(hidden).any()  # all outputs start at zero
    torch.nn.init.normal_(layer.weight)
    torch.testing.assert_close(linear(hidden), hidden @ layer.weight.T + layer.bias)
    deep = Head(4, 3, (6, 2))
    first, _, second, _, last = deep.layers
    assert not deep(hidden).any()
    torch.nn.init.normal_(last.weight)
    torch.testing.assert_close(deep(hidden), last(second(first(hidden).tanh()).tanh()))
    assert [tuple(layer.weight.shape) for layer in (first, second, last)] == [(6, 4), (2, 6), (3, 2)]
    assert deep(hidden.bfloat16()).dtype == torch.float32
    assert {parameter.dtype for parameter in deep.parameters()} == {torch.float32}


@pytest.mark.parametrize("factor", [0.1, 1.0, 10.0])
def test_a_head_learns_alike_whatever_the_size_of_what_it_reads(factor):
    """Hidden states ``factor`` times as large have the same loss after the same AdamW steps."""
    hidden = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * factor
    targets = (hidden[:, 0] > 0).long()
    torch.manual_seed(0)
    head = Head(48, 2)
    rates = head.rates(float(hidden.square().mean().sqrt()))
    assert rates.keys() == {"layers.0.weight"}
    groups = [{"params": [p], "lr": 0.05 * rates.get(name, 1.0)} for name, p in head.named_parameters()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(hidden), targets).backward()
        optimizer.step()
    loss = float(torch.nn.functional.cross_entropy(head(hidden), targets).detach())
    assert loss == pytest.approx(0.07489, abs=1e-4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("pooling", "expected"), [("cls", [1.0, 4.0, 5.0]), ("last", [3.0, 4.0, 8.0]), ("mean", [2.0, 4.0, 6.5])]
)
def test_pooling_stays_within_the_sequence(packed, pooling, expected):
    readout = PooledClassifier(Head(2, 2), pooling)
    rows = batch(packed, [0, 1, 1])
    pooled = readout.pool(run(rows, readout.asks(rows)).float(), rows.lengths)
    assert pooled.dtype == torch.float32
    assert pooled.tolist() == [[value, -value] for value in expected]


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_is_that_of_the_row_s_own_label(packed):
    readout = PooledClassifier(Head(2, 3), "last", torch.tensor([1.0, 2.0, 5.0]))
    reading = readout(run, batch(packed, [2, 0, 1]), True)
    log_p = readout.head(torch.tensor([[3.0, -3.0], [4.0, -4.0], [8.0, -8.0]])).log_softmax(dim=1)
    torch.testing.assert_close(reading.loss, -(5 * log_p[0, 2] + log_p[1, 0] + 2 * log_p[2, 1]))
    assert float(reading.weight) == 8.0
    torch.testing.assert_close(torch.stack(reading.scores), log_p)
    assert list(readout.state_dict()) == ["head.layers.0.weight", "head.layers.0.bias"]


def test_an_ensemble_averages_losses_and_probabilities():
    probabilities = torch.tensor([[[0.5, 0.5], [0.9, 0.1]], [[0.2, 0.8], [0.4, 0.6]]])
    # The softmax removes any constant that is added to a reading's logits.
    logits = probabilities.log() + torch.tensor([0.0, 3.0])[None, :, None]
    reading = classify(logits, torch.tensor([0, 1]), None, True)
    loss = -(math.log(0.5) + math.log(0.9)) / 2 - (math.log(0.8) + math.log(0.6)) / 2
    torch.testing.assert_close(reading.loss, torch.tensor(loss))
    torch.testing.assert_close(torch.stack(reading.scores).exp(), torch.tensor([[0.7, 0.3], [0.3, 0.7]]))
    assert classify(logits, torch.tensor([0, 1]), None, False).scores is None
