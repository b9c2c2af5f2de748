"""A row's answer depends neither on the other rows of its batch, nor on their padding, nor on how keys are cached.

The right answer is the argmax for the row alone, token by token, without a cache and without padding. Windows are
shorter than the prompts, so that a token at a wrong position changes the answer.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from families import ENCODER_DECODERS, FAMILIES, VOCAB, tiny_model
from transformers import GenerationConfig

from ptd.inject import Attachment
from ptd.types import PrefixKV, SoftTokens, UserError, virtual_id

P, NEW, WINDOW = 3, 6, 8
rng = torch.Generator().manual_seed(11)
ROWS = [torch.randint(5, VOCAB, (length,), generator=rng).tolist() for length in (20, 5, 12)]
DECODERS = (*FAMILIES, "biogpt", "stablelm")
CHANGES = {
    **{family: {"sliding_window": WINDOW} for family in ("mistral", "gemma2", "gemma3_text")},
    "stablelm": {"num_key_value_heads": 2},
    "biogpt": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "activation_dropout": 0.0},
}
KINDS = ("none", "prefix", "front", "marks")
CACHES = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 4},
}
REFUSED = {"static": "a cache that grows", "chunked": "contains only padding"}
"""Error messages of these caches with virtual tokens before the sequences."""


def attached(family, kind):
    model = tiny_model(family, **CHANGES.get(family, {}))
    model.generation_config.eos_token_id = None  # no row ends early, and none is kept from ending
    attachment = Attachment(model)
    torch.manual_seed(7)
    if kind == "prefix":
        sizes = [(layer.kv_heads, dim) for layer in attachment.shape.layers for dim in (layer.key_dim, layer.value_dim)]
        tensors = [torch.randn(P, *size) for size in sizes]
        attachment.set(PrefixKV(tuple(tensors[0::2]), tuple(tensors[1::2])))
    elif kind != "none":
        attachment.set(SoftTokens(torch.randn(P, attachment.shape.input_size), in_front=kind == "front"))
    return model, attachment


def rows_for(kind):
    """Return the rows; with ``marks``, the virtual tokens are in the middle of each row."""
    if kind != "marks":
        return ROWS
    return [[*row[:2], *(virtual_id(index) for index in range(P)), *row[2:]] for row in ROWS]


@torch.no_grad()
def argmax_alone(model, row, new=NEW):
    row, written = list(row), []
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    for _ in range(new):
        written.append(int(model(input_ids=torch.tensor([row]), **options).logits[0, -1].argmax()))
        row.append(written[-1])
    return written


def generated(model, attachment, rows, **options):
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    given = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)
    out = model.generate(**attachment.generation_inputs(ids, mask), generation_config=given)
    return [row[longest:].tolist() for row in out]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", DECODERS)
def test_a_batch_padded_on_the_left_continues_each_row_as_it_does_alone(family, kind, cache):
    model, attachment = attached(family, kind)
    rows = rows_for(kind)
    if kind == "front" and cache in REFUSED:
        with pytest.raises(UserError, match=REFUSED[cache]):
            generated(model, attachment, rows, **CACHES[cache])
        if cache == "static":
            return
        rows = [row[:5] for row in rows]  # of equal length
    want = [argmax_alone(model, row) for row in rows]
    assert generated(model, attachment, rows, **CACHES[cache]) == want
    assert len({tuple(each) for each in want}) > 1  # the rows have different answers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", DECODERS)
def test_beams_of_a_row_are_those_it_has_alone(family, kind):
    model, attachment = attached(family, kind)
    rows = rows_for(kind)
    alone = [generated(model, attachment, [row], num_beams=3)[0] for row in rows]
    uncached = [generated(model, attachment, [row], num_beams=3, use_cache=False)[0] for row in rows]
    assert generated(model, attachment, rows, num_beams=3) == alone == uncached


@pytest.mark.parametrize("kind", ["none", "prefix", "marks"])
@pytest.mark.parametrize("family", DECODERS)
def test_an_earlier_generation_is_continued(family, kind):
    """A later call continues an earlier one; soft tokens before the sequence prevent that (see test_self_check.py)."""
    model, attachment = attached(family, kind)
    row = rows_for(kind)[2]
    options = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    inputs = attachment.generation_inputs(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long))
    first = model.generate(**inputs, max_new_tokens=2, **options)
    longer = torch.cat([first.sequences, torch.tensor([ROWS[1]])], dim=1)
    mask = torch.ones_like(longer)
    inputs = attachment.generation_inputs(longer, mask)
    second = model.generate(**inputs, max_new_tokens=NEW, past_key_values=first.past_key_values, **options)
    assert second.sequences[0, longer.shape[1] :].tolist() == argmax_alone(model, longer[0].tolist())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_reads_each_row_as_it_does_alone(family, kind):
    model, _ = attached(family, kind)
    rows = rows_for(kind)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    options = {"max_new_tokens": NEW, "do_sample": False}
    together = model.generate(input_ids=ids, attention_mask=mask, **options).tolist()
    for row, got in zip(rows, together, strict=True):
        written = [model.config.decoder_start_token_id]
        for _ in range(NEW):
            with torch.no_grad():
                logits = model(
                    input_ids=torch.tensor([row]), decoder_input_ids=torch.tensor([written]), use_cache=False
                ).logits
            written.append(int(logits[0, -1].argmax()))
        assert got == written
