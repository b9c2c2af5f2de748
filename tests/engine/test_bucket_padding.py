"""Packed batches are padded to a few recurring sizes, and the padding changes no result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB, tiny_model

from ptd.data.batches import packed_batch
from ptd.engine.bucket_padding import pad_to_bucket, rounded
from ptd.engine.forward import Forward
from ptd.inject import Attachment
from ptd.methods.prefix import PrefixEncoder
from ptd.readouts import Ask
from ptd.types import IGNORE_INDEX, DataReport, Examples, SoftTokens

CPU, P = torch.device("cpu"), 3
LENGTHS = (9, 14, 3, 21, 12, 8)


def examples():
    draw = np.random.default_rng(0)
    offsets = np.concatenate(([0], np.cumsum(LENGTHS)))
    tokens = draw.integers(5, VOCAB, offsets[-1]).astype(np.int32)
    labels = np.where(draw.random(offsets[-1]) < 0.6, tokens, IGNORE_INDEX).astype(np.int32)
    return Examples(tokens, labels, offsets, DataReport(len(LENGTHS), int(offsets[-1]), 0))


def test_few_sizes_close_to_the_counts():
    sizes = [rounded(count) for count in range(1, 5000)]
    assert sizes[:32] == list(range(1, 33))
    assert all(count <= size <= count * 17 / 16 for count, size in enumerate(sizes, 1))
    assert all(rounded(size) == size for size in sizes)
    assert len({size for size in sizes if 1024 < size <= 2048}) == 16


def test_a_filled_batch_says_what_runs():
    batch = packed_batch(examples(), np.arange(len(LENGTHS)))
    read = batch.supervised_tokens
    filled, also = pad_to_bucket(batch, read)
    tokens, total = sum(LENGTHS), filled.input_ids.shape[1]
    assert len(also) > 0
    assert rounded(total) == total
    assert rounded(read) == read + len(also) == filled.supervised_tokens
    assert filled.cu_seqlens.tolist() == [*batch.cu_seqlens.tolist(), total]
    assert filled.lengths.sum() == total
    assert also.tolist() == list(range(tokens, tokens + len(also)))
    assert (filled.labels[0, tokens:] == IGNORE_INDEX).all()
    assert filled.max_seqlen == max(batch.max_seqlen, total - tokens)


@pytest.mark.parametrize("soft", [False, True], ids=["prefix", "soft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_filling_changes_nothing(family, soft):
    model = tiny_model(family)
    attachment = Attachment(model)
    if not attachment.packable:
        pytest.skip("runs padded batches")
    batch = packed_batch(examples(), np.arange(len(LENGTHS)))
    torch.manual_seed(0)
    if soft:
        flat = torch.randn(P, attachment.shape.hidden_size).requires_grad_()
        attachment.set(SoftTokens(flat, in_front=True))
    else:
        encoder = PrefixEncoder(attachment.shape.layers, P)
        flat = encoder().detach().clone().requires_grad_()
        attachment.set(encoder.state(flat))
    labels = batch.labels.flatten()
    positions = (labels != IGNORE_INDEX).nonzero().flatten()
    found = []
    for rounds in (False, True):
        run = Forward(attachment, CPU, rounds=rounds)
        flat.grad = None
        loss = run(batch, Ask(positions, labels[positions].long())).sum()
        loss.backward()
        with torch.no_grad():
            found.append((loss.detach(), flat.grad, run(batch, Ask(positions)), run(batch)))
    for plain, filled in zip(*found, strict=True):
        assert plain.shape == filled.shape
        assert (plain - filled).abs().max() <= 2e-5 * plain.abs().max()
