"""Test p_tuning: PEFT's network module for module, its place in the sequence, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from families import DrawnConditioner
from peft import PromptEncoder as PeftPromptEncoder
from peft import PromptEncoderConfig

from ptd.config import parse_method
from ptd.methods import TaskFacts, method
from ptd.methods.p_tuning import FEATURES, HIDDEN_STATE, PTuningEncoder
from ptd.methods.soft_prompts import EMBEDDINGS, embeddings_of_rows
from ptd.types import BackboneShape, LayerShape, SoftLayout, UserError

HIDDEN, P = 12, 5
SHAPE = BackboneShape("any", HIDDEN, 50, 64, (LayerShape(2, 4, 4),))
NETWORKS = {
    "lstm": {"encoder_reparameterization_type": "lstm", "encoder_hidden_size": 7, "encoder_num_layers": 3},
    "mlp": {"encoder_reparameterization_type": "mlp", "encoder_hidden_size": 7},
}


def build(seed=0, marks=P, **settings):
    config = parse_method({"name": "p_tuning", **settings})
    facts = TaskFacts("classification", virtual_tokens=marks)
    return method("p_tuning").build(config, SHAPE, DrawnConditioner(SHAPE), facts, seed=seed)


@pytest.mark.parametrize("network", NETWORKS)
def test_equal_weights_give_pefts_embeddings_and_gradients(network):
    ours = build(init="random", **NETWORKS[network])
    settings = {**NETWORKS[network], "encoder_reparameterization_type": network.upper()}
    theirs = PeftPromptEncoder(
        PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=P,
            token_dim=HIDDEN,
            num_transformer_submodules=1,
            inference_mode=False,
            **settings,
        )
    )
    names = {name: name.removesuffix(".weight") if name == "embedding.weight" else name for name in theirs.state_dict()}
    weights = {names[name]: weight for name, weight in theirs.state_dict().items()}
    assert ours.load_state_dict(weights, strict=False).missing_keys == ["units.origin", "units.unit"]
    got, want = ours.network(), theirs(torch.arange(P)[None])[0]
    assert torch.allclose(got, want, atol=1e-6)
    assert got.std() > 0.01
    for output in (got, want):
        output.square().sum().backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert torch.allclose(gradients[names[name]].grad, parameter.grad, atol=1e-5)
        assert parameter.grad.any()


def test_marks_and_front():
    at_marks, also_given, in_front = build(), build(num_virtual_tokens=P), build(marks=0, num_virtual_tokens=3)
    assert at_marks.layout == also_given.layout == SoftLayout(HIDDEN, in_front=False)
    assert in_front.layout == SoftLayout(HIDDEN, in_front=True)
    assert [len(encoder()) for encoder in (at_marks, also_given, in_front)] == [P, P, 3]
    assert not at_marks.state(at_marks()).in_front
    assert at_marks.peft_type == in_front.peft_type == "P_TUNING"


@pytest.mark.parametrize("network", NETWORKS)
def test_it_starts_at_the_rows_embeddings_and_moves_in_their_units(network):
    encoder = build(**NETWORKS[network])
    rows = embeddings_of_rows(P, DrawnConditioner(SHAPE))
    assert torch.equal(encoder(), rows[:P])
    assert torch.allclose(encoder.units.unit, EMBEDDINGS * rows.square().mean().sqrt().expand(HIDDEN))
    encoder().sum().backward()
    moved = {
        name for name, parameter in encoder.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert any(name.startswith("mlp_head") for name in moved)


def test_weight_matrices_have_a_rate_that_falls_with_their_inputs():
    encoder = build(encoder_reparameterization_type="lstm", encoder_hidden_size=7)
    rates = encoder.rates()
    assert rates["lstm_head.weight_ih_l0"] == 1 / HIDDEN
    assert rates["lstm_head.weight_hh_l0"] == 1 / 7 / HIDDEN_STATE
    assert rates["lstm_head.weight_ih_l1"] == rates["mlp_head.0.weight"] == 1 / 14 / HIDDEN_STATE
    assert all(weight.ndim == 1 or name in rates for name, weight in encoder.named_parameters() if name != "embedding")
    encoder.units = None
    assert not encoder.rates()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("width", [64, 256])
def test_features_have_the_sizes_that_the_rates_assume(network, width):
    torch.manual_seed(0)
    encoder = PTuningEncoder(16, width, width, lstm_layers=0 if network == "mlp" else 2)
    inputs = {}
    for name, layer in encoder.mlp_head.named_children():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0]}))
    encoder.network()
    measured = [float(given.detach().square().mean().sqrt()) for given in inputs.values()]
    assert measured == pytest.approx(FEATURES[network], rel=1.0)
    assert all(found > size / 2 for found, size in zip(measured, FEATURES[network], strict=True))


def test_sizes_default_to_the_backbones_and_two_layers():
    encoder = build()
    assert (encoder.lstm_head.hidden_size, encoder.lstm_head.num_layers) == (HIDDEN, 2)
    assert encoder().shape == (P, HIDDEN)
    assert encoder().dtype == torch.float32


@pytest.mark.parametrize("network", NETWORKS)
def test_a_seed_fixes_the_encoder(network):
    first, again, other = (build(seed=seed, init="random", **NETWORKS[network]) for seed in (7, 7, 8))
    assert torch.equal(first(), again())
    assert not torch.equal(first(), other())


@pytest.mark.parametrize(
    ("kind", "example"),
    [
        ("causal_lm", r'data\.prompt_template: "\{v:10\}\{prompt\}"'),
        ("seq2seq_lm", r'data\.prompt_template: "\{v:10\}\{prompt\}"'),
        ("classification", r'task\.patterns: \["\{v:3\} \{text\} \{v:3\} \{mask\}"\]'),
        ("token_classification", r"has none; set method\.num_virtual_tokens"),
    ],
)
def test_a_template_without_virtual_tokens_is_refused(kind, example):
    for act in (method("p_tuning").check, lambda config, facts: build(marks=0)):
        with pytest.raises(UserError, match=r"method\.name: p_tuning trains the virtual tokens of a template"):
            act(parse_method({"name": "p_tuning"}), TaskFacts(kind))
    with pytest.raises(UserError, match=example):
        method("p_tuning").check(parse_method({"name": "p_tuning"}), TaskFacts(kind))


def test_two_different_numbers_are_refused():
    with pytest.raises(UserError, match=r"method\.num_virtual_tokens: got 3, but the \{v:n\} .* are 5 virtual tokens"):
        build(num_virtual_tokens=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": 0}, r"method\.num_virtual_tokens: got 0"),
        ({"encoder_hidden_size": 0}, r"method\.encoder_hidden_size: got 0"),
        ({"encoder_num_layers": 0}, r"method\.encoder_num_layers: got 0"),
        ({"encoder_reparameterization_type": "gru"}, r"method\.encoder_reparameterization_type: got 'gru'"),
        ({"encoder_reparameterization_type": "mlp", "encoder_num_layers": 3}, "has no effect with .*mlp"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        parse_method({"name": "p_tuning", **settings})
