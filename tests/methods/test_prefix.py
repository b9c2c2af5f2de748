"""Test the prefix method without a backbone: layout, views, seeds, initial values, refusals."""

from __future__ import annotations

import pytest
import torch
from families import DrawnConditioner, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PrefixTuningConfig, get_peft_model

from ptd.config import parse_method
from ptd.methods import method
from ptd.methods.deep_prompts import INSIDE, KEYS, VALUES, PrefixEncoder, SeparatePrefixEncoder
from ptd.methods.settings import initial_text
from ptd.types import BackboneShape, LayerShape, PrefixLayout, UserError

MIXED = (LayerShape(2, 8, 8), LayerShape(1, 4, 6), LayerShape(3, 2, 5))
SHAPE = BackboneShape("any", 16, 100, 64, MIXED)
WIDTH = sum(layer.numel for layer in MIXED)
P = 4

# In the order of a forward pass: the encoder's layers, then self- and cross-attention of each decoder layer.
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


class Text(DrawnConditioner):
    """A conditioner in which every text has the keys and values ``flat``."""

    def __init__(self, shape=SHAPE):
        super().__init__(shape)
        self.flat = torch.randn(P, sum(layer.numel for layer in shape.layers))

    def token_ids(self, text, *, special=False):
        assert special
        return [7] * P

    def keys_and_values(self, sides):
        assert list(sides[0][:P]) == [7] * P
        return torch.cat([self.flat, super().keys_and_values(sides)[P:]])


def build(conditioner=None, seed=0, shape=SHAPE, **config):
    parsed = parse_method({"name": "prefix", "num_virtual_tokens": P, **config})
    return method("prefix").build(parsed, shape, conditioner or DrawnConditioner(shape), seed=seed)


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
    first, again, other = (
        build(seed=seed, shape=shape, prefix_projection=projection, init="random") for seed in (7, 7, 8)
    )
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


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("init", ["rows", "chunks", "text"])
@pytest.mark.parametrize("shape", [SHAPE, SEQ2SEQ], ids=["decoder", "encoder-decoder"])
def test_it_starts_at_the_keys_and_values_of_text(shape, init, projection):
    text = {"init_text": "x"} if init == "text" else {}
    conditioner = Text(shape) if init == "text" else DrawnConditioner(shape)
    encoder = build(conditioner, shape=shape, init=init, prefix_projection=projection, **text)
    same = DrawnConditioner(shape)
    read = same.rows(P)[0] + same.rows(64 - P)[0]  # as much as fits in the context
    want = conditioner.flat if init == "text" else same.keys_and_values([read])[:P]
    assert torch.equal(encoder(), want)
    encoder().sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())


@pytest.mark.parametrize("shape", [SHAPE, SEQ2SEQ], ids=["decoder", "encoder-decoder"])
def test_units_are_the_sizes_of_each_layers_keys_and_of_its_values(shape):
    encoder = build(shape=shape)
    same = DrawnConditioner(shape)
    read = same.rows(P)[0] + same.rows(64 - P)[0]  # as much as fits in the context
    measured = encoder.layout.state(same.keys_and_values([read]))
    units = encoder.layout.state(encoder.units.unit[None])
    for got, want in zip(units.keys, measured.keys, strict=True):
        assert torch.allclose(got, KEYS * want.square().mean().sqrt().expand_as(got))
    for got, want in zip(units.values, measured.values, strict=True):
        assert torch.allclose(got, VALUES * want.square().mean().sqrt().expand_as(got))
    random = build(shape=shape, init="random", num_virtual_tokens=60)
    assert not random.units.origin.any()
    drawn = encoder.layout.state(random().detach() / random.units.unit)
    assert all(abs(KEYS * key.std() - 1) < 0.2 for key in drawn.keys)
    assert all(abs(VALUES * value.std() - 1) < 0.2 for value in drawn.values)


@given(factors=st.lists(st.floats(0.01, 100), min_size=len(MIXED) * 2, max_size=len(MIXED) * 2), mlp=st.booleans())
@settings(deadline=None, max_examples=20)
def test_a_backbone_with_other_sizes_is_trained_alike(factors, mlp):
    """If keys and values grow ``c``-fold and the loss divides them by ``c``, the run is the same times ``c``."""

    class Scaled(DrawnConditioner):
        def keys_and_values(self, sides):
            return super().keys_and_values(sides) * scale

    shape = SHAPE
    sizes = [layer.kv_heads * dim for layer in MIXED for dim in (layer.key_dim, layer.value_dim)]
    scale = torch.cat([torch.full((size,), factor) for size, factor in zip(sizes, factors, strict=True)])
    runs = []
    for conditioner, read in ((DrawnConditioner(shape), torch.ones(WIDTH)), (Scaled(shape), scale)):
        encoder = build(conditioner, prefix_projection=mlp)
        groups = [
            {"params": [p], "lr": 0.05 * encoder.rates().get(name, 1.0)} for name, p in encoder.named_parameters()
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        for _ in range(5):
            optimizer.zero_grad()
            (encoder() / read - 1).square().sum().backward()
            optimizer.step()
        runs.append(encoder().detach() / read)
    assert torch.allclose(*runs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tokens", [4, 32, 128])
def test_an_mlps_output_moves_alike_at_every_width_and_length(tokens):
    """AdamW's first steps move each number against its gradient, in its unit, by a similar amount at every size."""
    signs = torch.where(torch.rand(tokens, WIDTH, generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0)
    moved = {}
    for embedding, hidden in ((64, 8), (64, 64), (64, 1024), (8, 64), (1024, 64)):
        sizes = {"embedding_size": embedding, "encoder_hidden_size": hidden}
        encoder = build(prefix_projection=True, num_virtual_tokens=tokens, **sizes)
        rates = encoder.rates()
        groups = [{"params": [p], "lr": 0.01 * rates.get(name, 1.0)} for name, p in encoder.named_parameters()]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            (encoder.network() * signs).sum().backward()
            optimizer.step()
        moved[embedding, hidden] = -float((encoder.network().detach() * signs).mean()) / 0.03
    assert max(moved.values()) < 2.2 * min(moved.values()), moved
    assert all(0.3 < each < 1.5 for each in moved.values()), moved


def test_the_inside_of_an_mlp_has_a_lower_rate_than_its_output():
    encoder = build(prefix_projection=True, num_virtual_tokens=4, embedding_size=8, encoder_hidden_size=16)
    assert encoder.rates() == {
        "embedding": INSIDE,
        "transform.0.weight": INSIDE * 2 / 8,
        "transform.0.bias": INSIDE,
        "transform.2.weight": 2 / 16,
    }
    assert dict(build(num_virtual_tokens=4).rates()) == {}
    separate = build(shape=SEQ2SEQ, prefix_projection=True, encoder_hidden_size=5, embedding_size=3)
    assert {rate for name, rate in separate.rates().items() if name.endswith("embedding")} == {INSIDE}


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("case", ["random", "text", "encoder-decoder"])
def test_the_first_token_can_be_frozen(case, projection):
    shape = SEQ2SEQ if case == "encoder-decoder" else SHAPE
    text = {"init": "text", "init_text": "x"} if case == "text" else {}
    encoder = build(
        Text(shape) if text else None, shape=shape, prefix_projection=projection, freeze_first_token=True, **text
    )
    before = encoder().detach().clone()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1, weight_decay=0.1)
    encoder().square().sum().backward()
    optimizer.step()
    assert torch.equal(encoder()[0], before[0])
    assert (encoder()[1:] != before[1:]).all()
    twin = build(shape=shape, prefix_projection=projection, freeze_first_token=True)
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
    with torch.no_grad():
        part.transform[-1].bias.normal_()
    state, want = encoder.state(encoder()), part.state(part())
    units = encoder.layout.state(encoder.units.unit[None])
    for index in range(len(TWO_SIDED)):
        if index in own:
            assert torch.allclose(state.keys[index], want.keys[own.index(index)] * units.keys[index])
            assert torch.allclose(state.values[index], want.values[own.index(index)] * units.values[index])
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


def test_a_text_too_short_is_refused():
    with pytest.raises(UserError, match=r"the text has 2 tokens, fewer than method\.num_virtual_tokens=4.*at most 2"):
        build(init="text", init_text="xy")


def test_text_may_come_from_a_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("grüße", encoding="utf-8")
    assert initial_text(parse_method({"name": "prefix", "init": "text", "init_text_file": str(path)})) == "grüße"
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
        ({"init_text": "a"}, r"method\.init_text: is given, but method\.init is 'rows'"),
        ({"encoder_hidden_size": 8}, r"no effect without method\.prefix_projection"),
        ({"embedding_size": 8}, r"no effect without method\.prefix_projection"),
        ({"prefix_projection": True, "embedding_size": -1}, r"method\.embedding_size: got -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(section, message):
    named = section if "name" in section or not section else {"name": "prefix", **section}
    with pytest.raises(UserError, match=message):
        parse_method(named)
