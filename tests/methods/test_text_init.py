"""With ``init: text``, the tuned model at step 0 equals the backbone with that text before the input."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, VOCAB, tiny_model, tiny_tokenizer

import ptd
from ptd.types import UserError

TEXT, P = "Classify the review:", 8
CLOSE = 1e-4
"""fp32 rounding leaves about 3e-6."""
PROMPT = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))  # P + 12 fit every window
FORMS = {"direct": {}, "mlp": {"prefix_projection": True, "encoder_hidden_size": P}}


def attach(model, **settings):
    chosen = {"init": "text", "init_text": TEXT, "num_virtual_tokens": P, **settings}
    return ptd.attach(model, "prefix", tokenizer=tiny_tokenizer(), **chosen)


def behind_the_text(model):
    text = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"][:P]).expand(len(PROMPT), -1)
    with torch.no_grad():
        return model(input_ids=torch.cat([text, PROMPT], dim=1)).logits[:, P:]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tuned_model_starts_as_the_backbone_behind_the_text(family, form):
    model = tiny_model(family)
    want = behind_the_text(model)
    attach(model, **FORMS[form])
    with torch.no_grad():
        assert (model(input_ids=PROMPT).logits - want).abs().max() < CLOSE


@pytest.mark.parametrize("form", FORMS)
def test_with_the_first_token_frozen_too(form):
    model = tiny_model("llama")
    want = behind_the_text(model)
    attach(model, freeze_first_token=True, **FORMS[form])
    with torch.no_grad():
        assert (model(input_ids=PROMPT).logits - want).abs().max() < CLOSE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": 50}, r"the text has 20 tokens, fewer than method\.num_virtual_tokens=50.*at most 20"),
        ({"init_text": ""}, "the text has 0 tokens"),
    ],
)
def test_a_text_too_short_is_refused_and_the_model_left_alone(settings, message):
    model = tiny_model("llama")
    with torch.no_grad():
        before = model(input_ids=PROMPT).logits
        with pytest.raises(UserError, match=message):
            attach(model, **settings)
        assert torch.equal(model(input_ids=PROMPT).logits, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_text_needs_the_tokenizer():
    with pytest.raises(UserError, match="tokenizer"):
        ptd.attach(tiny_model("llama"), "prefix", init="text", init_text=TEXT)


def test_latent_attention_starts_from_a_text_too():
    sizes = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    }
    model = tiny_model("deepseek_v3", num_key_value_heads=4, first_k_dense_replace=1, **sizes, **experts)
    want = behind_the_text(model)
    tuned = attach(model)
    assert [(layer.key_dim, layer.value_dim) for layer in tuned.attachment.shape.layers] == [(16, 12)] * 2
    with torch.no_grad():
        assert (model(input_ids=PROMPT).logits - want).abs().max() < CLOSE
