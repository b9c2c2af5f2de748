"""For families that declare something other than they do, ptd is right, runs padded, or refuses with the reason.

The right values are those of plain transformers, one row at a time.
"""

from __future__ import annotations

import pytest
import torch
from families import ENCODER_DECODERS, ENCODERS, FAMILIES, VOCAB, attend_by, tiny_config, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from ptd.inject import Attachment
from ptd.inject.attach import WRONG_UPSTREAM
from ptd.inject.attention import IMPLEMENTATION
from ptd.types import PrefixKV, SoftTokens, UserError

CLOSE = 1e-4
rng = torch.Generator().manual_seed(3)
ROWS = [torch.randint(6, VOCAB, (length,), generator=rng).tolist() for length in (9, 5, 12)]
P = 3
SHELL = {"vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}}


def redrawn(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.2 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model.eval()


def made(auto, family, **changes):
    return redrawn(auto.from_config(tiny_config(family, **changes), dtype=torch.float32))


def seq2seq(family, **changes):
    sizes = {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0,
        "attention_dropout": 0.0, "activation_dropout": 0.0, "decoder_start_token_id": 2,
    }  # fmt: skip
    return made(AutoModelForSeq2SeqLM, family, **sizes, **changes)


@torch.no_grad()
def alone(model, row, **inputs):
    out = model(input_ids=torch.tensor([row]), **inputs)
    return out.logits[0] if hasattr(out, "logits") else out.last_hidden_state[0]


def umt5():
    sizes = {"d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return made(AutoModelForSeq2SeqLM, "umt5", **sizes)


@pytest.mark.parametrize("make", [lambda: tiny_model("gemma2", attn_implementation=None), umt5], ids=["gemma2", "umt5"])
@torch.no_grad()
def test_what_a_family_writes_out_counts_and_not_what_sdpa_leaves_out_of_it(make):
    """ptd equals eager attention where, in some releases, SDPA omits a softcap or a mask-less decoder's causal rule."""
    model = make()
    inputs = {"input_ids": torch.tensor([ROWS[0]])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([ROWS[2]])
    attachment = Attachment(model)
    got = model(**inputs).logits
    attachment.remove()
    attend_by(model, "eager")
    assert (got - model(**inputs).logits).abs().max() < CLOSE


@torch.no_grad()
def behind(soft, model):
    """Return the logits of each row alone, after these embeddings."""
    embedding = model.get_input_embeddings()
    return [model(inputs_embeds=torch.cat([soft, embedding(torch.tensor(row))])[None]).logits[0, P:] for row in ROWS]


@torch.no_grad()
def in_a_batch(model, attachment, rows, soft=None):
    """Return the outputs of each row, laid out as ptd does: packed if allowed, otherwise padded on the right."""
    lengths = [len(row) for row in rows]
    if not attachment.packable:
        longest = max(lengths)
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[1] * length + [0] * (longest - length) for length in lengths])
        out = model(input_ids=ids, attention_mask=mask)
        out = out.logits if hasattr(out, "logits") else out.last_hidden_state
        return [out[row, :length] for row, length in enumerate(lengths)]
    positions = torch.cat([torch.arange(length) for length in lengths])[None] + attachment.first_position
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = {f"max_length_{side}": max(lengths) for side in "qk"}
    bounds = {f"cu_seq_lens_{side}": bounds for side in "qk"}
    out = model(
        input_ids=torch.tensor([[token for row in rows for token in row]]),
        position_ids=positions,
        use_cache=False,
        **bounds,
        **longest,
    )
    out = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return list(out[0].split(lengths))


def assert_right(model, rows=ROWS):
    want = [alone(model, row) for row in rows]
    attachment = Attachment(model)
    for got, right in zip(in_a_batch(model, attachment, rows), want, strict=True):
        assert (got - right).abs().max() < CLOSE * right.square().mean().sqrt()
    return attachment


@pytest.mark.parametrize(
    ("family", "reason"),
    [("stablelm", "does not pass cu_seq_lens_q on"), ("nemotron", "does not pass cu_seq_lens_q on")],
)
def test_rows_that_a_pack_would_mix_run_padded(family, reason):
    attachment = assert_right(tiny_model(family, num_key_value_heads=2))
    assert not attachment.packable
    assert reason in attachment.verdict.packed


def test_packed_rows_given_by_hand_to_such_a_family_are_refused():
    model = tiny_model("stablelm", num_key_value_heads=2)
    Attachment(model)
    bounds = torch.tensor([0, 2, 4], dtype=torch.int32)
    with pytest.raises(UserError, match="does not pass cu_seq_lens_q on"):
        model(input_ids=torch.tensor([[7, 8, 9, 10]]), cu_seq_lens_q=bounds, max_length_q=2)


def test_a_window_that_layers_do_not_hand_on_keeps_rows_padded():
    """Rows of qwen2_moe run padded: only its mask has the window, which rows shorter than the window would not show."""
    model = tiny_model(
        "qwen2_moe", num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=0,
        layer_types=["sliding_attention"] * 2, num_experts=4, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )  # fmt: skip
    attachment = assert_right(model)
    assert "neither causal nor a sliding window" in attachment.verdict.packed


def test_a_decoder_that_says_it_is_not_causal_is_still_causal():
    model = seq2seq("nllb-moe", num_experts=2, encoder_sparse_step=0, decoder_sparse_step=0)
    attachment = Attachment(model)
    assert [layer.kind for layer in attachment.shape.layers] == ["encoder"] * 2 + ["decoder", "cross"] * 2
    source, target = torch.tensor([ROWS[0]]), torch.tensor([ROWS[1]])
    changed = target.clone()
    changed[0, -1] += 1
    with torch.no_grad():
        one, other = (model(input_ids=source, decoder_input_ids=ids).logits for ids in (target, changed))
        attachment.remove()
        plain = model(input_ids=source, decoder_input_ids=target).logits
    assert torch.equal(one[:, :-1], other[:, :-1])
    assert (one - plain).abs().max() < CLOSE


def test_an_encoder_that_does_not_say_so_is_one():
    model = made(AutoModel, "splinter", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    attachment = assert_right(model)
    assert {layer.kind for layer in attachment.shape.layers} == {"encoder"}


def test_positions_that_start_elsewhere_are_found():
    """ESM's positions begin after the padding index, through a function that belongs to no class."""
    from transformers import AutoModelForMaskedLM

    model = made(
        AutoModelForMaskedLM, "esm", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=1,
        mask_token_id=3, position_embedding_type="absolute", token_dropout=False,
    )  # fmt: skip
    attachment = assert_right(model)
    assert attachment.first_position == 2


DOGE = {"num_key_value_heads": 2, "keep_window_size": 4}


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("doge", DOGE, "computes a mask from its hidden states"),
        ("diffllama", {}, "4 times per forward pass in 2 modules"),
    ],
)
def test_attention_that_cannot_be_replaced_is_left_to_the_model_with_the_reason(family, settings, reason):
    if family in WRONG_UPSTREAM:
        pytest.skip(WRONG_UPSTREAM[family])
    with pytest.raises(UserError, match=reason):
        Attachment(made(AutoModelForCausalLM, family, **settings), backend="merge")
    attachment = assert_right(made(AutoModelForCausalLM, family, **settings))
    assert reason in attachment.notice
    assert "a prefix goes through the model's own cache" in attachment.notice


def test_a_refused_model_is_left_as_it_came():
    model = made(AutoModelForCausalLM, "doge", **DOGE)
    before, layers = alone(model, ROWS[0]), len(model.model.layers)
    with pytest.raises(UserError):
        Attachment(model, backend="merge")
    assert len(model.model.layers) == layers
    assert model.config._attn_implementation != IMPLEMENTATION
    assert torch.equal(alone(model, ROWS[0]), before)


def test_padding_on_the_left_is_refused_where_positions_count_from_the_edge():
    model = made(AutoModelForCausalLM, "bart", **{**SIZES_OF_BART, "is_decoder": True})
    attachment = Attachment(model)
    assert "padded on the left" in attachment.verdict.left
    with pytest.raises(UserError, match="give each batch prompts of equal length"):
        model(input_ids=torch.tensor([[0, 7, 8]]), attention_mask=torch.tensor([[0, 1, 1]]))
    model(input_ids=torch.tensor([[6, 7, 8]]), attention_mask=torch.tensor([[1, 1, 1]]))


SIZES_OF_BART = {
    "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "dropout": 0.0,
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
}  # fmt: skip


def test_a_multimodal_shell_takes_soft_tokens_in_packed_rows():
    """Packed rows get soft tokens, although the shell passes embeddings, not tokens, to the transformer inside."""
    text = tiny_config("mistral", sliding_window=None, num_key_value_heads=2)
    config = type(tiny_config("mistral3", **SHELL))(text_config=text.to_dict(), **SHELL, image_token_index=5)
    model = redrawn(AutoModelForImageTextToText.from_config(config, dtype=torch.float32))
    soft = torch.randn(P, 32, generator=rng)
    want = behind(soft, model)
    attachment = Attachment(model)
    assert attachment.packable
    attachment.set(SoftTokens(soft, in_front=True))
    for got, right in zip(in_a_batch(model, attachment, ROWS), want, strict=True):
        assert (got - right).abs().max() < CLOSE * right.square().mean().sqrt()


def test_embeddings_that_are_looked_up_again_inside_refuse_soft_tokens_only():
    model = tiny_model(
        "gemma4_text", num_key_value_heads=2, head_dim=16, global_head_dim=16, vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
    )  # fmt: skip
    attachment = Attachment(model)
    with pytest.raises(UserError, match=r"method.name: .* does not support virtual tokens"):
        attachment.set(SoftTokens(torch.randn(P, 32), in_front=True))
    layers = attachment.shape.layers
    attachment.set(
        PrefixKV(
            tuple(torch.randn(P, layer.kv_heads, layer.key_dim) for layer in layers),
            tuple(torch.randn(P, layer.kv_heads, layer.value_dim) for layer in layers),
        )
    )


def test_an_additive_mask_of_the_callers_is_used():
    model, row = tiny_model("llama"), ROWS[0]
    S = len(row)
    visible = torch.ones(S, S).tril() > 0
    visible[:, 2] = False
    visible[2, 2] = True
    additive = torch.zeros(S, S).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
    want = alone(model, row, attention_mask=additive)
    assert (want - alone(model, row)).abs().max() > 100 * CLOSE
    Attachment(model)
    assert (alone(model, row, attention_mask=additive) - want).abs().max() < CLOSE
    assert (alone(model, row, attention_mask=visible[None, None]) - want).abs().max() < CLOSE


@pytest.mark.parametrize("family", [*FAMILIES, *ENCODERS, *ENCODER_DECODERS])
def test_nothing_is_held_against_the_families_that_are_known_to_work(family):
    verdict = Attachment(tiny_model(family)).verdict
    assert verdict.soft is None
    assert verdict.prefix is None
    assert verdict.left is None
    assert (verdict.packed is None) == (family not in (*ENCODER_DECODERS, "modernbert"))


def test_wrong_attention_is_found(monkeypatch):
    """The check can fail: it finds attention that ignores its scale, and attention that leaks between packed rows."""
    from ptd.inject import attention

    right = attention.prefix_attention
    monkeypatch.setattr(attention, "prefix_attention", lambda *args, **rule: right(*args, **rule | {"scale": 1.0}))
    with pytest.raises(UserError, match="hidden states of two short rows differ by"):
        Attachment(tiny_model("llama"), backend="merge")
    assert "hidden states of two short rows differ by" in Attachment(tiny_model("llama")).notice
    monkeypatch.setattr(
        attention, "prefix_attention", lambda *args, **rule: right(*args, **rule | {"cu_seqlens": None})
    )
    assert "in a packed batch" in Attachment(tiny_model("llama")).verdict.packed


def test_rows_packed_by_their_positions_alone_each_get_the_virtual_tokens():
    """Each row gets the tokens without explicit boundaries, as padding-free collators lay rows out for transformers."""
    model = tiny_model("llama")
    soft = torch.randn(P, 32, generator=rng)
    want = behind(soft, model)
    attachment = Attachment(model)
    attachment.set(SoftTokens(soft, in_front=True))
    ids = torch.tensor([[token for row in ROWS for token in row]])
    positions = torch.cat([torch.arange(len(row)) for row in ROWS])[None]
    with torch.no_grad():
        got = model(input_ids=ids, position_ids=positions).logits[0].split([len(row) for row in ROWS])
    for one, right in zip(got, want, strict=True):
        assert (one - right).abs().max() < CLOSE * right.square().mean().sqrt()


def test_a_cache_that_the_virtual_tokens_cannot_be_told_apart_in_is_refused():
    model = tiny_model("llama")
    ids = torch.tensor([ROWS[0]])
    before = model.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    attachment = Attachment(model)
    attachment.set(SoftTokens(torch.randn(P, 32, generator=rng), in_front=True))
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    longer = torch.cat([before.sequences, torch.tensor([[7, 8, 9, 10, 11]])], dim=1)
    with pytest.raises(UserError, match="filled without this prompt, or by an earlier generate"):
        model.generate(longer, past_key_values=before.past_key_values, **options)
    earlier = model.generate(ids, return_dict_in_generate=True, **options)
    longer = torch.cat([earlier.sequences, torch.tensor([[7, 8, 9, 10, 11]])], dim=1)
    with pytest.raises(UserError, match="filled without this prompt, or by an earlier generate"):
        model.generate(longer, past_key_values=earlier.past_key_values, **options)


def test_weights_that_are_not_there_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].to("meta")
    with pytest.raises(UserError, match="device meta"):
        Attachment(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_a_caller_who_wants_attention_both_ways_gets_it(family):
    model, row = tiny_model(family), ROWS[0]
    want = alone(model, row, is_causal=False)
    assert (want - alone(model, row)).abs().max() > 100 * CLOSE
    Attachment(model)
    assert (alone(model, row, is_causal=False) - want).abs().max() < CLOSE
