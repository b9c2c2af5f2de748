"""The prefix method by itself: layout, views, seeds, initial values, refusals. No backbone."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PrefixTuningConfig, get_peft_model

from ptd.config import parse_method
from ptd.methods import method
from ptd.methods.deep_prompts import PrefixEncoder, SeparatePrefixEncoder, prefix_encoder
from ptd.methods.settings import read_text
from ptd.types import BackboneShape, LayerShape, PrefixLayout, UserError

MIXED = (LayerShape(2, 8, 8), LayerShape(1, 4, 6), LayerShape(3, 2, 5))
SHAPE = BackboneShape("any", 16, 100, 64, MIXED)
WIDTH = sum(layer.numel for layer in MIXED)
P = 4

# In the order of a forward pass: the encoder's layers, then self- and cross-attention of each of the decoder's.
TWO_SIDED = (
    LayerShape(2, 4, 4, "encoder"),
    LayerShape(1, 3, 5, "encoder"),
    LayerShape(2, 2, 3, "decoder"),
    LayerShape(2, 4, 4, "cross"),
    LayerShape(2, 6, 1, "decoder"),
    LayerShape(1, 2, 2, "cross"),
)
KINDS = ("encoder", "decoder", "cross")
SEQ2SEQ = BackboneShape("any", 16, 100, 64, TWO_SIDED)


class NoText:
    def text_kv(self, text, num_virtual_tokens):
        raise AssertionError("only init: text asks for it")


class Text:
    def __init__(self, width=WIDTH):
        self.flat = torch.randn(P, width, generator=torch.Generator().manual_seed(0))

    def text_kv(self, text, num_virtual_tokens):
        return self.flat


def build(conditioner=None, seed=0, shape=SHAPE, **config):
    parsed = parse_method({"name": "prefix", "num_virtual_tokens": P, **config})
    return method("prefix").build(parsed, shape, conditioner or NoText(), seed=seed)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by PEFT
def test_the_flat_layout_is_pefts():
    tuned = get_peft_model(tiny_model("qwen3"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    layout = PrefixLayout((LayerShape(2, 16, 16),) * 2)
    state = layout.state(tuned.get_prompt_embedding_to_save("default"))
    cache = tuned.get_prompt(batch_size=1)
    for layer in range(2):
        assert torch.equal(state.keys[layer].transpose(0, 1), cache.layers[layer].keys[0])
        assert torch.equal(state.values[layer].transpose(0, 1), cache.layers[layer].values[0])


def test_state_is_views_of_the_flat_prompt_in_order():
    encoder = PrefixEncoder(MIXED, P)
    flat = encoder()
    state = encoder.state(flat)
    assert flat is encoder.embedding
    assert {tensor.untyped_storage().data_ptr() for tensor in state.tensors()} == {flat.untyped_storage().data_ptr()}
    assert [tuple(key.shape) for key in state.keys] == [(P, 2, 8), (P, 1, 4), (P, 3, 2)]
    assert [tuple(value.shape) for value in state.values] == [(P, 2, 8), (P, 1, 6), (P, 3, 5)]
    parts = [part.flatten(1) for pair in zip(state.keys, state.values, strict=True) for part in pair]
    assert torch.equal(torch.cat(parts, dim=1), flat)
    assert state.num_virtual_tokens == P


@pytest.mark.parametrize("layers", [MIXED, TWO_SIDED], ids=["decoder", "encoder-decoder"])
def test_views_of_a_gradient_are_the_gradients_of_the_views(layers):
    encoder = PrefixEncoder(layers, P)
    weights = encoder.state(torch.randn(P, encoder.layout.width))
    state = encoder.state(encoder())
    sum((a * b).sum() for a, b in zip(state.tensors(), weights.tensors(), strict=True)).backward()
    got = encoder.state(encoder.embedding.grad)
    assert all(torch.equal(a, b) for a, b in zip(got.tensors(), weights.tensors(), strict=True))


@pytest.mark.parametrize("shape", [SHAPE, SEQ2SEQ], ids=["decoder", "encoder-decoder"])
@pytest.mark.parametrize("projection", [False, True])
def test_a_seed_fixes_the_encoder_and_spares_the_global_generator(projection, shape):
    before = torch.get_rng_state()
    first, again, other = (build(seed=seed, shape=shape, prefix_projection=projection) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first(), other())


def test_sizes_default_to_the_backbones():
    encoder = build(prefix_projection=True)
    assert {name: tuple(p.shape) for name, p in encoder.named_parameters()} == {
        "embedding": (P, 16),
        "transform.0.weight": (16, 16),
        "transform.0.bias": (16,),
        "transform.2.weight": (WIDTH, 16),
        "transform.2.bias": (WIDTH,),
    }
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert encoder.tensor_parallel_plan().keys() == {"transform.0", "transform.2"}
    assert not build().tensor_parallel_plan()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("shape", [SHAPE, SEQ2SEQ], ids=["decoder", "encoder-decoder"])
def test_zero_starts_at_zero(projection, frozen, shape):
    encoder = build(shape=shape, init="zero", prefix_projection=projection, freeze_first_token=frozen)
    assert encoder().shape == (P, encoder.layout.width)
    assert not encoder().any()


@given(tokens=st.integers(1, 8), spare=st.integers(-1, 5), seed=st.integers(0, 99), two_sided=st.booleans())
@settings(deadline=None, max_examples=40)
def test_the_mlp_reproduces_any_target_once_it_is_wide_enough(tokens, spare, seed, two_sided):
    torch.manual_seed(seed)
    layers, hidden = TWO_SIDED if two_sided else MIXED, max(1, tokens + spare)
    encoder = prefix_encoder(layers, tokens, embedding_size=16, encoder_hidden_size=hidden)
    target = torch.randn(tokens, encoder.layout.width)
    left = encoder.fit(target)
    assert left < 1e-4  # fp32 storage of a solution whose conditioning depends on E
    assert torch.allclose(encoder(), target, atol=1e-3)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("case", ["random", "text", "encoder-decoder"])
def test_the_first_token_can_be_frozen(case, projection):
    shape = SEQ2SEQ if case == "encoder-decoder" else SHAPE
    text = {"init": "text", "init_text": "x"} if case == "text" else {}
    encoder = build(Text(), shape=shape, prefix_projection=projection, freeze_first_token=True, **text)
    before = encoder().detach().clone()
    if case == "text":
        assert torch.allclose(before, Text().flat, atol=1e-5)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1, weight_decay=0.1)
    encoder().square().sum().backward()
    optimizer.step()
    assert torch.equal(encoder()[0], before[0])
    assert (encoder()[1:] != before[1:]).all()
    twin = prefix_encoder(shape.layers, P, *((16, 16) if projection else (None, None)), freeze_first_token=True)
    twin.load_state_dict(encoder.state_dict())
    assert torch.equal(twin(), encoder())


def test_each_kind_of_layer_has_an_mlp_of_its_own():
    encoder = build(shape=SEQ2SEQ, prefix_projection=True, encoder_hidden_size=5, embedding_size=3)
    assert isinstance(encoder, SeparatePrefixEncoder)
    widths = {kind: sum(layer.numel for layer in TWO_SIDED if layer.kind == kind) for kind in KINDS}
    assert {name: tuple(p.shape) for name, p in encoder.named_parameters()} == {
        f"parts.{kind}.{name}": shape
        for kind, width in widths.items()
        for name, shape in {
            "embedding": (P, 3),
            "transform.0.weight": (5, 3),
            "transform.0.bias": (5,),
            "transform.2.weight": (width, 5),
            "transform.2.bias": (width,),
        }.items()
    }
    assert encoder.tensor_parallel_plan().keys() == {
        f"parts.{kind}.transform.{index}" for kind in KINDS for index in (0, 2)
    }
    assert set(encoder.tensor_parallel_plan()) <= dict(encoder.named_modules()).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_of_a_kinds_mlp_lands_in_its_layers_and_its_gradient_comes_from_there(kind):
    encoder = build(shape=SEQ2SEQ, init="zero", prefix_projection=True)
    part = encoder.parts[kind]
    own = [index for index, layer in enumerate(TWO_SIDED) if layer.kind == kind]
    target = torch.randn(P, part.layout.width)
    part.fit(target)
    state, want = encoder.state(encoder()), part.state(target)
    for index in range(len(TWO_SIDED)):
        if index in own:
            assert torch.allclose(state.keys[index], want.keys[own.index(index)], atol=1e-4)
            assert torch.allclose(state.values[index], want.values[own.index(index)], atol=1e-4)
        else:
            assert not state.keys[index].any()
            assert not state.values[index].any()
    for index in own:
        encoder.zero_grad()
        state = encoder.state(encoder())
        (state.keys[index].sum() + state.values[index].square().sum()).backward()
        reached = {name.split(".")[1] for name, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == {kind}


def test_only_an_mlp_is_worth_separating():
    assert isinstance(build(shape=SEQ2SEQ), PrefixEncoder)
    assert isinstance(build(prefix_projection=True), PrefixEncoder)


def test_peft_has_a_prefix_for_a_single_stack_only():
    encoder_only = BackboneShape("any", 16, 100, 64, tuple(layer for layer in TWO_SIDED if layer.kind == "encoder"))
    assert build().peft_type == build(shape=encoder_only).peft_type == "PREFIX_TUNING"
    assert build(shape=SEQ2SEQ).peft_type is build(shape=SEQ2SEQ, prefix_projection=True).peft_type is None


def test_too_small_an_mlp_says_what_is_lost_and_what_helps():
    with pytest.warns(UserWarning, match=r"encoder_hidden_size=1 .*% relative error is left; use at least 4"):
        build(Text(), init="text", init_text="x", prefix_projection=True, encoder_hidden_size=1)


def test_a_cache_of_another_kind_is_refused():
    with pytest.raises(UserError, match=r"method\.init: text is not possible with this backbone"):
        build(Text(WIDTH - 1), init="text", init_text="x")


@pytest.mark.parametrize("layers", [TWO_SIDED, TWO_SIDED[:2]], ids=["encoder-decoder", "encoder"])
def test_an_encoder_caches_no_text(layers):
    with pytest.raises(UserError, match=r"method\.init: text .* has an encoder.*use random or zero, or .*prompt"):
        build(shape=BackboneShape("any", 16, 100, 64, layers), init="text", init_text="x")


def test_text_may_come_from_a_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("grüße", encoding="utf-8")
    assert read_text(parse_method({"name": "prefix", "init": "text", "init_text_file": str(path)})) == "grüße"
    path.write_bytes(b"\xff\xfe\xff")
    for broken in (path, tmp_path / "none.txt"):
        with pytest.raises(UserError, match=r"method\.init_text_file: cannot read"):
            build(Text(), init="text", init_text_file=str(broken))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "lora"}, r"method\.name: there is no method 'lora'; available: .*prefix"),
        ({}, r"method\.name: is missing"),
        ({"num_virtual_tokens": 0}, r"method\.num_virtual_tokens: got 0"),
        ({"num_virtual_tokens": True}, r"method\.num_virtual_tokens: got True"),
        ({"num_virtual_token": 3}, r"did you mean method\.num_virtual_tokens\?"),
        ({"init": "texts"}, r"method\.init: got 'texts'"),
        ({"init": "text"}, r"exactly one of method\.init_text and method\.init_text_file"),
        ({"init": "text", "init_text": "a", "init_text_file": "b"}, "exactly one of"),
        ({"init_text": "a"}, r"method\.init_text: is given, but method\.init is 'random'"),
        ({"encoder_hidden_size": 8}, r"no effect without method\.prefix_projection"),
        ({"embedding_size": 8}, r"no effect without method\.prefix_projection"),
        ({"prefix_projection": True, "embedding_size": -1}, r"method\.embedding_size: got -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(section, message):
    named = section if "name" in section or not section else {"name": "prefix", **section}
    with pytest.raises(UserError, match=message):
        parse_method(named)
