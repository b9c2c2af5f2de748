"""A prefix in the model's own cache is what the model caches for a text; every layer reads it, or ptd refuses.

Parity with PEFT is in test_peft_parity.py, and every family in test_family_sheet.py.
"""

from __future__ import annotations

import pytest
import torch
from families import OWN_ATTENTION, VOCAB, tiny_model
from transformers import DynamicCache, StaticCache

from ptd.backbone import TextConditioner
from ptd.backbone.load import checkpoint_layers
from ptd.inject import Attachment
from ptd.inject.attention import packing_arguments
from ptd.types import PrefixKV, PrefixLayout, SoftTokens, UserError

CLOSE = 1e-4
rng = torch.Generator().manual_seed(5)
TEXT, ROW = (torch.randint(6, VOCAB, (count,), generator=rng) for count in (4, 7))
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def prefixed(family="bloom", backend="auto", **changes):
    model = tiny_model(family, **changes).requires_grad_(False)
    attachment = Attachment(model, backend=backend)
    shapes = attachment.shape.prefix_layers()
    keys = tuple(torch.randn(3, each.kv_heads, each.key_dim, generator=rng) for each in shapes)
    attachment.set(PrefixKV(keys, tuple(torch.randn_like(key) for key in keys)))
    return model, attachment


@pytest.mark.parametrize("family", [*OWN_ATTENTION, "llama"])
@torch.no_grad()
def test_the_states_of_a_text_as_a_prefix_are_that_text(family):
    model = tiny_model(family)
    want = model(input_ids=torch.cat([TEXT, ROW])[None]).logits[0, len(TEXT) :]
    attachment = Attachment(model, backend="cache")
    states = TextConditioner(attachment, None).keys_and_values([TEXT.tolist()])
    attachment.set(PrefixLayout(attachment.shape.layers).state(states))
    got = model(input_ids=ROW[None]).logits[0]
    assert (got - want).abs().max() < CLOSE * want.square().mean().sqrt()


def test_a_pass_that_records_gradients_returns_no_cache():
    model, _ = prefixed()
    assert model(input_ids=ROW[None]).past_key_values is None
    with torch.no_grad():
        assert model(input_ids=ROW[None]).past_key_values.get_seq_length() == 3 + len(ROW)
        assert model(input_ids=ROW[None], use_cache=False).past_key_values is None


def test_a_layer_that_does_not_read_the_prefix_is_noticed():
    """For example, transformers takes the cache away from a layer that it checkpoints, unless told not to."""
    model, attachment = prefixed("llama", "cache")

    def without_cache(module, args, given):
        return args, given | {"past_key_values": None, "attention_mask": None}

    model.model.layers[1].self_attn.register_forward_pre_hook(without_cache, with_kwargs=True)
    with pytest.raises(
        UserError, match=r"did not read the prefix from its cache in layers 1, .*gradient_checkpointing"
    ):
        model(input_ids=ROW[None])
    attachment.set(None)
    model(input_ids=ROW[None])


def test_a_cache_cannot_be_filled_while_layers_are_recomputed():
    model, _ = prefixed()
    checkpoint_layers(model)
    with pytest.raises(UserError, match="runs each layer twice"):
        model(input_ids=ROW[None], past_key_values=DynamicCache())


def test_caches_that_do_not_hold_the_prefix_are_refused():
    model, attachment = prefixed()
    attachment.set(None)
    with torch.no_grad():
        cache = model(input_ids=TEXT[None]).past_key_values
        kv = torch.zeros(3, 4, 8)
        attachment.set(PrefixKV((kv, kv), (kv, kv)))
        with pytest.raises(UserError, match="filled without this prompt, or by an earlier generate"):
            model(input_ids=ROW[None], attention_mask=torch.ones(1, 4 + len(ROW)), past_key_values=cache)
        with pytest.raises(UserError, match="needs a cache that grows"):
            model(input_ids=ROW[None], past_key_values=StaticCache(model.config, 32))


def test_packed_rows_are_refused():
    model, attachment = prefixed()
    assert not attachment.packable
    bounds = packing_arguments(torch.tensor([0, 3, 7], dtype=torch.int32), 4)
    for prompt in (True, False):
        if not prompt:
            attachment.set(None)
        with pytest.raises(UserError, match="pad the rows"):
            model(input_ids=ROW[None], **bounds)
    model, _ = prefixed("gptj")
    with pytest.raises(UserError, match="rows cannot be packed here"):
        model(input_ids=ROW[None], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))


def test_a_mask_into_which_the_prefix_cannot_be_put_is_refused():
    model, _ = prefixed()
    with pytest.raises(UserError, match="pass a 2-dimensional attention_mask"):
        model(input_ids=ROW[None], attention_mask=torch.ones(1, 1, 7, 7))


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_a_kernel_cannot_be_chosen_where_attention_cannot_be_replaced(family):
    with pytest.raises(UserError, match="backend 'merge' cannot replace its attention; set attention: auto or cache"):
        Attachment(tiny_model(family), backend="merge")


def test_what_is_slower_is_said():
    assert "slower" in Attachment(tiny_model("bloom")).notice
    assert "slower" in Attachment(tiny_model("llama"), backend="cache").notice
    assert Attachment(tiny_model("llama")).notice is None


def test_a_window_that_would_hide_the_prefix_is_said_and_rows_are_not_padded_on_the_left():
    attachment = Attachment(tiny_model("mistral", num_key_value_heads=2, sliding_window=9), backend="cache")
    assert "tokens further than its window of 9" in attachment.notice
    assert "window of 9 tokens counts padding" in attachment.verdict.left


def test_layers_without_keys_take_soft_prompts_and_refuse_a_prefix_before_it_is_built():
    model = tiny_model("qwen3_next", **HYBRID)
    attachment = Attachment(model)
    assert "linear_attention" in attachment.notice
    with pytest.raises(UserError, match=r"take no prefix, because its cache .*; use method prompt or method p_tuning"):
        attachment.shape.prefix_layers()
    with torch.no_grad():
        embedded = model.get_input_embeddings()(TEXT)
        want = model(input_ids=torch.cat([TEXT, ROW])[None]).logits[0, len(TEXT) :]
        attachment.set(SoftTokens(embedded, in_front=True))
        assert (model(input_ids=ROW[None], use_cache=False).logits[0] - want).abs().max() < CLOSE


def test_a_model_with_a_prompt_takes_no_second_one():
    model, attachment = prefixed()
    with pytest.raises(UserError, match="already has a prompt"):
        Attachment(model)
    attachment.remove()
    Attachment(model)
