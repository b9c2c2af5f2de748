"""Attach, set and remove a prefix; check positions, masks, caches and decoding with a prefix, and what is refused."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, VOCAB, WINDOW, WINDOWED, tiny_config, tiny_model
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ptd.inject import Attachment, check_supported
from ptd.inject.attention import IMPLEMENTATION
from ptd.methods.prefix import PrefixEncoder
from ptd.types import LayerShape, PrefixKV, UserError

P = 4
CLOSE = 2e-5  # fp32 logits of size ~1, computed in another order, differ by about 3e-6 at worst
rng = torch.Generator().manual_seed(3)
IDS = torch.randint(3, VOCAB, (2, 9), generator=rng)
LEFT = torch.ones_like(IDS)
LEFT[0, :4] = 0  # the first row has 5 tokens and is padded on the left


def prefixed(family, seed=0, backend="auto", **changes):
    model = tiny_model(family, **changes).requires_grad_(False)
    attachment = Attachment(model, backend=backend)
    torch.manual_seed(seed)
    encoder = PrefixEncoder(attachment.shape.layers, P)
    attachment.set(encoder.state(encoder().detach()))
    return model, attachment


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def greedy(model, ids=IDS, mask=LEFT, **options):
    with torch.no_grad():
        return model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, **{"do_sample": False, **options}
        )


def assert_close(got, want):
    assert (got - want).abs().max() < CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_remove_restores_the_model_bit_for_bit(family):
    model = tiny_model(family)
    before, keys = logits(model), list(model.state_dict())
    implementation, buffers = model.config._attn_implementation, dict(model.named_buffers())
    attachment = Attachment(model)
    encoder = PrefixEncoder(attachment.shape.layers, P)
    attachment.set(encoder.state(encoder()))
    assert list(model.state_dict()) == keys
    assert not torch.equal(logits(model), before)
    attachment.remove()
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == keys
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert model.config._attn_implementation == implementation
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert not any("ptd" in name for name in vars(module))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_prompt_the_attached_model_is_the_plain_one(family):
    model, attachment = prefixed(family)
    attachment.set(None)
    visible = LEFT.bool()
    assert_close(logits(model), logits(tiny_model(family)))
    plain = logits(tiny_model(family), attention_mask=LEFT)
    assert_close(logits(model, attention_mask=LEFT)[visible], plain[visible])


@pytest.mark.parametrize("family", [*FAMILIES, "biogpt"])
def test_default_positions_are_those_the_family_chooses(family):
    """Without position_ids, left padding changes nothing, and a cached second call continues where the first ended."""
    model, _ = prefixed(family)
    counted_from_mask = family in ("opt", "biogpt")
    positions = (LEFT.cumsum(1) - 1).clamp(min=0) if counted_from_mask else torch.arange(9).repeat(2, 1)
    visible = LEFT.bool()
    default = logits(model, attention_mask=LEFT)
    assert_close(default[visible], logits(model, attention_mask=LEFT, position_ids=positions)[visible])
    if counted_from_mask:
        assert_close(default[0, 4:], logits(model, IDS[:1, 4:])[0])
    with torch.no_grad():
        first = model(input_ids=IDS[:, :6], attention_mask=LEFT[:, :6], use_cache=True)
        second = model(input_ids=IDS[:, 6:], attention_mask=LEFT, past_key_values=first.past_key_values)
    assert first.past_key_values.get_seq_length() == 9  # own tokens only: the prefix is never in the cache
    assert_close(second.logits, default[:, 6:])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_embeddings_instead_of_tokens(family):
    model, _ = prefixed(family)
    assert_close(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits, logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_change_what_is_generated(family):
    model, _ = prefixed(family)
    together = greedy(model)
    assert together[1:, 9:].tolist() == greedy(model, IDS[1:], None)[:, 9:].tolist()
    assert together[:1, 9:].tolist() == greedy(model, IDS[:1, 4:], None)[:, 5:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_static_cache_generates_what_the_dynamic_one_does(family):
    model, _ = prefixed(family)
    assert greedy(model, cache_implementation="static").tolist() == greedy(model).tolist()
    unpadded = {"ids": IDS, "mask": torch.ones_like(IDS)}
    assert greedy(model, **unpadded, cache_implementation="static").tolist() == greedy(model, **unpadded).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_and_beam_search(family):
    model, attachment = prefixed(family)
    torch.manual_seed(0)
    sampled = greedy(model, do_sample=True, top_k=20)
    torch.manual_seed(0)
    assert torch.equal(sampled, greedy(model, do_sample=True, top_k=20))
    beams = greedy(model, num_beams=3)
    assert beams.shape == sampled.shape == (2, 15)
    assert torch.equal(beams, greedy(model, num_beams=3, use_cache=False))
    attachment.set(None)
    assert not torch.equal(beams, greedy(model, num_beams=3))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["merge", "reference"])
def test_packed_equals_separate_also_beyond_the_window(family, backend):
    model, _ = prefixed(family, backend=backend)
    lengths = (WINDOW + 11, 1, 7)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(3, VOCAB, (1, sum(lengths)), generator=torch.Generator().manual_seed(4))
    packing = {"cu_seq_lens_q": bounds.int(), "cu_seq_lens_k": bounds.int(), "max_length_q": max(lengths)}
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = logits(model, ids, position_ids=positions, use_cache=False, **packing)
    separate = torch.cat([logits(model, part) for part in ids.split(lengths, dim=1)], dim=1)
    assert_close(packed, separate)


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_never_hides_the_prefix(family):
    """The last query sees the prefix: the model has one layer, so no other token can pass the prefix on to it."""
    changes = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    changes = changes if family != "mistral" else {"num_hidden_layers": 1}
    ids = torch.randint(3, VOCAB, (1, 3 * WINDOW), generator=torch.Generator().manual_seed(5))
    model, _ = prefixed(family, **changes)
    other, _ = prefixed(family, seed=1, **changes)
    last = logits(model, ids)[:, -1]
    assert (last - logits(other, ids)[:, -1]).abs().max() > 1000 * CLOSE
    changed = torch.cat([ids[:, :-WINDOW] + 1, ids[:, -WINDOW:]], dim=1).clamp(max=VOCAB - 1)
    assert_close(logits(model, changed)[:, -1], last)  # but the window does hide the tokens before it
    padded = torch.nn.functional.pad(ids, (5, 0))
    positions = torch.nn.functional.pad(torch.arange(3 * WINDOW)[None], (5, 0))
    mask = (torch.arange(padded.shape[1]) >= 5).long()[None]
    assert_close(logits(model, padded, attention_mask=mask, position_ids=positions)[:, -1], last)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_gets_no_gradient(family):
    model, attachment = prefixed(family)
    encoder = PrefixEncoder(attachment.shape.layers, P)
    attachment.set(encoder.state(encoder()))
    model(input_ids=IDS).logits.square().mean().backward()
    assert encoder.embedding.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_of_different_size():
    sizes = {
        "head_dim": 16,
        "global_head_dim": 32,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
    }
    model, attachment = prefixed("gemma4_text", num_key_value_heads=2, **sizes)
    assert attachment.shape.layers == (LayerShape(2, 16, 16), LayerShape(2, 32, 32))
    visible = LEFT.bool()
    positions = (LEFT.cumsum(1) - 1).clamp(min=0)
    padded = logits(model, attention_mask=LEFT, position_ids=positions)
    assert_close(padded[0][visible[0]], logits(model, IDS[:1, 4:])[0])


def test_a_model_takes_one_prompt_at_a_time():
    model, _ = prefixed("llama")
    with pytest.raises(UserError, match="already has a prompt"):
        Attachment(model)


def test_an_unknown_kind_of_prompt_is_a_programming_error():
    _, attachment = prefixed("llama")
    with pytest.raises(TypeError, match="dict"):
        attachment.set({})


def test_a_prompt_for_another_number_of_layers_is_refused():
    _, attachment = prefixed("llama")
    kv = torch.zeros(P, 2, 8)
    with pytest.raises(ValueError, match="a model with 2"):
        attachment.set(PrefixKV((kv,), (kv,)))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("moshi", "generates other tokens with a cache"),
        ("distilbert", "no model of type"),
        ("t5", "no model of type"),
    ],
)
def test_families_that_are_refused_are_named(family, reason):
    config = tiny_config(family)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    with pytest.raises(UserError, match=f"{family}.*{reason}|{reason}.*{family}"):
        check_supported(model_class, config)


def test_attention_sinks_are_left_to_the_model():
    model = tiny_model("gpt_oss", num_key_value_heads=2, head_dim=16, num_local_experts=4, rope_parameters=None)
    implementation = model.config._attn_implementation
    with pytest.raises(UserError, match="GptOssAttention has attention sinks"):
        Attachment(model, backend="merge")
    assert model.config._attn_implementation == implementation
    assert "GptOssAttention has attention sinks" in Attachment(model).notice
    assert model.config._attn_implementation == implementation


def test_attention_dropout_is_refused_in_training():
    model, _ = prefixed("llama", attention_dropout=0.1)
    logits(model)  # eval mode drops nothing
    model.train()
    with pytest.raises(UserError, match=r"attention dropout is 0\.1"):
        logits(model)


def test_the_implementation_without_an_attachment_is_explained():
    model = tiny_model("llama")
    model.set_attn_implementation(IMPLEMENTATION)
    with pytest.raises(UserError, match="not attached"):
        logits(model)


def test_an_unknown_attention_backend_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"no backend 'flesh'; available: auto, .*merge"):
        Attachment(tiny_model(), backend="flesh")


def test_heads_too_large_for_the_kernels_are_left_to_the_model() -> None:
    with pytest.raises(UserError, match="heads of size 320"):
        Attachment(tiny_model(head_dim=320), backend="merge")
    attachment = Attachment(tiny_model(head_dim=320))
    assert "heads of size 320" in attachment.notice
    assert attachment.verdict.prefix is None
