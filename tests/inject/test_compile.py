"""Compiled layers: the same numbers, no new graph for a new length, and refusals that say what to do."""

from __future__ import annotations

import shutil

import pytest
import torch
from families import VOCAB, tiny_model
from torch._dynamo.utils import counters

from ptd.inject import Attachment, compile_layers
from ptd.methods.prefix import PrefixEncoder
from ptd.types import UserError

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def packed(first, lengths):
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    longest = max(lengths)
    return {
        "input_ids": torch.arange(sum(lengths))[None] % (VOCAB - 5) + 5,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None] + first,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,
    }


def run(model, attachment, lengths):
    torch.manual_seed(0)
    encoder = PrefixEncoder(attachment.shape.layers, 3)
    attachment.set(encoder.state(encoder()))
    attachment.keep(torch.arange(sum(lengths) // 2))
    logits = model(**packed(attachment.first_position, lengths)).logits
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), encoder.embedding.grad


@needs_compiler
def test_packs_of_other_lengths_run_the_same_graphs():
    plain, model = (tiny_model("llama").requires_grad_(False) for _ in range(2))
    attachments = [Attachment(plain), Attachment(model)]
    names = list(model.state_dict())
    compile_layers(model)
    assert list(model.state_dict()) == names
    graphs = []
    for lengths in ([9, 4], [7, 12, 5], [20], [6, 6, 6, 6]):
        want, got = run(plain, attachments[0], lengths), run(model, attachments[1], lengths)
        graphs.append(counters["stats"]["unique_graphs"])
        for one, other in zip(got, want, strict=True):
            assert (one - other).norm() < 1e-5 * other.norm()
    assert graphs[0] > 0
    assert graphs[1:] == [graphs[1]] * 3


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()
    model = tiny_model("llama")
    Attachment(model)
    with pytest.raises(UserError, match=r"backbone\.compile: torch\.compile found no C\+\+ compiler"):
        compile_layers(model)


def test_quantised_weights_are_refused():
    model = tiny_model("llama")
    model.is_quantized = True
    with pytest.raises(UserError, match=r"backbone\.compile: only whole, unquantised weights"):
        compile_layers(model)
