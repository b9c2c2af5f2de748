"""Every kind of prompt, on every architecture, gives the same values as plain transformers.

The references run the model without ptd: prefixes use an attention function of this file that concatenates them with
the keys and values, virtual tokens use ``inputs_embeds``.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from families import ENCODER_DECODERS, ENCODERS, FAMILIES, VOCAB, attend_by, tiny_model
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ptd.backbone.load import checkpoint_layers
from ptd.inject import Attachment, PassOutput
from ptd.types import NoPrompt, PrefixKV, SoftTokens, UserError, virtual_id

P, CLOSE = 3, 2e-5
LENGTHS = (12, 7)
rng = torch.Generator().manual_seed(3)
IDS = torch.randint(5, VOCAB, (2, max(LENGTHS)), generator=rng)
MASK = torch.tensor([[1] * length + [0] * (max(LENGTHS) - length) for length in LENGTHS])
TARGET = torch.randint(5, VOCAB, (2, 6), generator=rng)
EVERY = (*FAMILIES, *ENCODERS, *ENCODER_DECODERS)
SINGLE = (*FAMILIES, *ENCODERS)


def inputs_for(family, **more):
    inputs = {"attention_mask": MASK, **more}
    if "inputs_embeds" not in more:
        inputs["input_ids"] = IDS
    if family in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = TARGET
    return inputs


def seen(family):
    """Return which output positions are tokens."""
    return torch.ones_like(TARGET).bool() if family in ENCODER_DECODERS else MASK.bool()


def random_prefix(attachment, requires_grad=False):
    torch.manual_seed(5)
    keys, values = [], []
    for layer in attachment.shape.layers:
        keys.append(torch.randn(P, layer.kv_heads, layer.key_dim, requires_grad=requires_grad))
        values.append(torch.randn(P, layer.kv_heads, layer.value_dim, requires_grad=requires_grad))
    return PrefixKV(tuple(keys), tuple(values))


def positions_for(model, first, shift, ids=IDS):
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": torch.arange(ids.shape[1]).expand_as(ids) + first + shift}


# ---- prefixes, against concatenation


def concatenating(module, query, key, value, attention_mask, scaling=None, softcap=None, position_bias=None, **_):
    """Compute plain attention over [prefix, own keys]; a prefix has no bias and is never masked."""
    prefix_k, prefix_v = module._test_prefix
    groups = query.shape[1] // key.shape[1]

    def whole(prefix, own):
        own = torch.cat([prefix.transpose(0, 1).expand(len(own), -1, -1, -1), own], dim=2)
        return own.repeat_interleave(groups, dim=1)

    key, value = whole(prefix_k, key), whole(prefix_v, value)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + pad(position_bias, (P, 0))
    scores = scores.masked_fill(~pad(attention_mask, (P, 0), value=True), -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def always_a_mask(*args, **kwargs):
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register("concatenating", concatenating)
AttentionMaskInterface.register("concatenating", always_a_mask)


@pytest.mark.parametrize("family", EVERY)
def test_prefix_in_every_attention_layer(family):
    model = tiny_model(family)
    attachment = Attachment(model)
    prefix, first = random_prefix(attachment), attachment.first_position
    modules = [module for module in model.modules() if "_ptd_slot" in vars(module)]
    by_slot = {id(slot): index for index, slot in enumerate(attachment.slots)}
    attachment.set(prefix)
    with torch.no_grad():
        got = model(**inputs_for(family, **positions_for(model, first, 0))).logits
        order = {module: by_slot[id(vars(module)["_ptd_slot"])] for module in modules}
        attachment.remove()
        plain = model(**inputs_for(family)).logits
        attend_by(model, "concatenating")
        for module, index in order.items():
            object.__setattr__(module, "_test_prefix", (prefix.keys[index], prefix.values[index]))
        want = model(**inputs_for(family, **positions_for(model, first, P))).logits
    assert (got - want)[seen(family)].abs().max() < CLOSE
    assert (got - plain)[seen(family)].abs().max() > 1000 * CLOSE  # the prefix matters


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_every_layer_of_an_encoder_decoder_has_a_prefix_of_its_own(family):
    """Encoder self-, decoder self- and cross-attention get separate gradients (PEFT shares halves)."""
    model = tiny_model(family).requires_grad_(False)
    attachment = Attachment(model)
    assert [layer.kind for layer in attachment.shape.layers] == ["encoder"] * 2 + ["decoder", "cross"] * 2
    prefix = random_prefix(attachment, requires_grad=True)
    attachment.set(prefix)
    model(**inputs_for(family)).logits.square().sum().backward()
    gradients = [torch.cat([key.grad, value.grad], -1) for key, value in zip(prefix.keys, prefix.values, strict=True)]
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)
    for index, gradient in enumerate(gradients):
        for other in gradients[:index]:
            assert (gradient - other).norm() > 0.1 * other.norm()


# ---- virtual tokens, against inputs_embeds


def embedding_of(model, family):
    return (model.get_encoder() if family in ENCODER_DECODERS else model).get_input_embeddings()


def soft_tokens(model, family, requires_grad=False):
    torch.manual_seed(6)
    width = embedding_of(model, family).weight.shape[1]
    return torch.randn(P, width, requires_grad=requires_grad)


@pytest.mark.parametrize("family", EVERY)
def test_virtual_tokens_in_front(family):
    model = tiny_model(family).requires_grad_(False)
    soft = soft_tokens(model, family, requires_grad=True)
    embeds = embedding_of(model, family)(IDS)
    attachment = Attachment(model)
    first = attachment.first_position
    attachment.remove()

    longer = torch.cat([soft.expand(2, -1, -1), embeds], dim=1)
    inputs = inputs_for(family, inputs_embeds=longer) | {"attention_mask": pad(MASK, (P, 0), value=1)}
    want = model(**inputs, **positions_for(model, first, 0, pad(IDS, (P, 0)))).logits
    if family in SINGLE:
        want = want[:, P:]
    want[seen(family)].square().mean().backward()
    wanted_gradient, soft.grad = soft.grad, None

    attachment = Attachment(model)
    attachment.set(SoftTokens(soft, in_front=True))
    got = model(**inputs_for(family)).logits
    got[seen(family)].square().mean().backward()
    assert got.shape == want.shape
    assert (got - want)[seen(family)].abs().max() < CLOSE
    assert (soft.grad - wanted_gradient).norm() < 1e-5 * wanted_gradient.norm()


@pytest.mark.parametrize("family", EVERY)
def test_virtual_tokens_at_marks(family):
    model = tiny_model(family)
    soft, ids, embeds = soft_tokens(model, family), IDS.clone(), embedding_of(model, family)(IDS).detach().clone()
    for row, column, number in ((0, 0, 0), (0, 5, 2), (0, 6, 1), (1, 3, 1)):
        ids[row, column] = virtual_id(number)
        embeds[row, column] = soft[number]
    with torch.no_grad():
        attachment = Attachment(model)
        positions = positions_for(model, attachment.first_position, 0)
        want = model(**inputs_for(family, inputs_embeds=embeds, **positions)).logits
        attachment.set(SoftTokens(soft, in_front=False))
        assert attachment.extra_positions == 0
        got = model(**inputs_for(family, **positions) | {"input_ids": ids}).logits
    assert (got - want)[seen(family)].abs().max() < CLOSE


@pytest.mark.parametrize("kind", ["prefix", "front", "marks"])
@pytest.mark.parametrize("family", SINGLE)
def test_packed_sequences_see_what_padded_ones_see(family, kind):
    model = tiny_model(family)
    attachment = Attachment(model)
    if not attachment.packable:
        assert family == "modernbert"  # its window extends in both directions, which only a mask can express
        return
    ids = IDS.clone()
    if kind == "prefix":
        attachment.set(random_prefix(attachment))
    else:
        attachment.set(SoftTokens(soft_tokens(model, family), in_front=kind == "front"))
    if kind == "marks":
        ids[:, 2] = virtual_id(1)
    bounds = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32)
    longest = max(LENGTHS)
    packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None] + attachment.first_position
    with torch.no_grad():
        want = model(**inputs_for(family, **positions_for(model, attachment.first_position, 0)) | {"input_ids": ids})
        got = model(input_ids=ids[MASK.bool()][None], position_ids=positions, **packing).logits
    assert (got[0] - want.logits[MASK.bool()]).abs().max() < CLOSE


@pytest.mark.parametrize("kind", ["none", "prefix", "front"])
@pytest.mark.parametrize("family", EVERY)
def test_only_the_positions_asked_for_are_put_out(family, kind):
    model = tiny_model(family)
    attachment = Attachment(model)
    prompts = {
        "none": lambda: NoPrompt(),
        "prefix": lambda: random_prefix(attachment),
        "front": lambda: SoftTokens(soft_tokens(model, family), in_front=True),
    }
    attachment.set(prompts[kind]())
    positions = torch.tensor([0, 3, 9])
    with torch.no_grad():
        whole = model(**inputs_for(family)).logits
        with attachment.only(PassOutput(positions)):
            chosen = model(**inputs_for(family)).logits
        again = model(**inputs_for(family)).logits
    assert chosen.shape == (1, 3, whole.shape[2])
    assert (chosen[0] - whole.flatten(0, 1)[positions]).abs().max() < CLOSE
    assert torch.equal(again, whole)


# ---- generation


@pytest.mark.parametrize("family", [*FAMILIES, *ENCODER_DECODERS])
def test_greedy_text_with_virtual_tokens_in_front(family):
    model = tiny_model(family)
    side = MASK if family in ENCODER_DECODERS else MASK.flip(1)
    ids = IDS * side
    embeds = embedding_of(model, family)(ids).detach()
    soft = soft_tokens(model, family)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        # Padding may separate virtual tokens and text: attention has no inherent order, and the mask gives positions.
        longer = torch.cat([soft.expand(2, -1, -1), embeds], dim=1)
        mask = pad(side, (P, 0), value=1)
        want = model.generate(inputs_embeds=longer, attention_mask=mask, **options)
        attachment = Attachment(model)
        attachment.set(SoftTokens(soft, in_front=True))
        got = model.generate(input_ids=ids, attention_mask=side, **options)
        uncached = model.generate(input_ids=ids, attention_mask=side, use_cache=False, **options)
        beams = model.generate(input_ids=ids, attention_mask=side, num_beams=3, **options)
    new = got if family in ENCODER_DECODERS else got[:, ids.shape[1] :]
    assert new.tolist() == want.tolist()
    assert uncached.tolist() == got.tolist()
    assert beams.shape == got.shape


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_greedy_text_of_an_encoder_decoder_with_a_prefix(family):
    model = tiny_model(family)
    attachment = Attachment(model)
    attachment.set(random_prefix(attachment))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        cached = model.generate(input_ids=IDS, attention_mask=MASK, **options)
        plain = model.generate(input_ids=IDS, attention_mask=MASK, use_cache=False, **options)
        start = cached[:, :1]
        for _ in range(8):
            scores = model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=start).logits[:, -1]
            scores[:, model.generation_config.eos_token_id] = -math.inf
            start = torch.cat([start, scores.argmax(-1)[:, None]], dim=1)
    assert cached.tolist() == plain.tolist() == start.tolist()


def test_a_static_cache_is_refused_with_virtual_tokens_in_front():
    model = tiny_model("llama")
    attachment = Attachment(model)
    attachment.set(SoftTokens(soft_tokens(model, "llama"), in_front=True))
    with pytest.raises(UserError, match="a cache that grows"):
        model.generate(input_ids=IDS, max_new_tokens=2, cache_implementation="static")


def test_hidden_states_have_no_virtual_tokens_either():
    model = tiny_model("bert")
    attachment = Attachment(model)
    attachment.set(SoftTokens(soft_tokens(model, "bert"), in_front=True))
    states = model(**inputs_for("bert"), output_hidden_states=True).hidden_states
    assert {state.shape[1] for state in states} == {IDS.shape[1]}


@pytest.mark.parametrize("family", [*SINGLE, *ENCODER_DECODERS])
def test_the_longest_sequence_that_is_allowed_runs(family):
    """The context is the backbone's positions, minus one for RoBERTa's padding and P for a prefix; a full one runs."""
    model = tiny_model(family, max_position_embeddings=40)
    attachment = Attachment(model)
    for prompt in (random_prefix(attachment), SoftTokens(soft_tokens(model, family), in_front=True)):
        attachment.set(prompt)
        context = attachment.shape.context
        longest = 60 if context is None else context - attachment.extra_positions
        assert family == "t5" or 36 <= longest <= 40
        inputs = {"input_ids": torch.randint(5, VOCAB, (1, longest))}
        if family in ENCODER_DECODERS:
            inputs["decoder_input_ids"] = TARGET[:1]
        with torch.no_grad():
            assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize("kind", ["prefix", "front"])
@pytest.mark.parametrize("family", ["llama", *ENCODERS, *ENCODER_DECODERS])
def test_recomputed_layers_give_the_same_gradients(family, kind):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(family).requires_grad_(False)
        if checkpointing:
            checkpoint_layers(model)
        attachment = Attachment(model)
        if kind == "prefix":
            state = random_prefix(attachment, requires_grad=True)
        else:
            state = SoftTokens(soft_tokens(model, family, requires_grad=True), in_front=True)
        attachment.set(state)
        model(**inputs_for(family)).logits[seen(family)].square().mean().backward()
        gradients.append(torch.cat([tensor.grad.flatten() for tensor in state.tensors()]))
    assert gradients[0].norm() > 0
    assert (gradients[1] - gradients[0]).norm() < 1e-6 * gradients[0].norm()
