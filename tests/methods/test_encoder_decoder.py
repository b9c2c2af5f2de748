"""Prefixes on real (tiny) encoder-decoders: each attention layer has its own keys and values, all of them trained."""

from __future__ import annotations

import pytest
import torch
from families import ENCODER_DECODERS, VOCAB, tiny_model

import ptd
from ptd.types import PrefixKV

P = 3
FORMS = {"direct": {}, "mlp": {"prefix_projection": True}}


def tokens(rows, length):
    return torch.randint(5, VOCAB, (rows, length), generator=torch.Generator().manual_seed(length))


def loss(model):
    return model(input_ids=tokens(2, 7), labels=tokens(2, 5)).loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_gradients_reach_every_virtual_token_of_every_layer(family, form):
    model = tiny_model(family)
    tuned = ptd.attach(model, "prefix", num_virtual_tokens=P, init="random", **FORMS[form])
    layers = tuned.attachment.shape.layers
    assert [layer.kind for layer in layers] == ["encoder"] * 2 + ["decoder", "cross"] * 2
    outputs = []
    tuned.encoder.register_forward_hook(lambda module, args, output: outputs.append(output) or output.retain_grad())
    loss(model).backward()
    for gradient in tuned.encoder.state(outputs[0].grad).tensors():
        assert (gradient.flatten(1).abs().amax(1) > 0).all()
    assert all(parameter.grad.any() for parameter in tuned.encoder.parameters())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "prompt_encoder" not in name)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_every_layer_reads_its_own_keys_and_values(family):
    model = tiny_model(family)
    tuned = ptd.attach(model, "prefix", num_virtual_tokens=P)
    state = tuned.encoder.state(tuned.encoder().detach())
    tuned.attachment.encoder = None

    def loss_with(keys, values):
        tuned.attachment.set(PrefixKV(tuple(keys), tuple(values)))
        with torch.no_grad():
            return loss(model).item()

    seen = [loss_with(state.keys, state.values)]
    for index in range(len(state.keys)):
        for part in ("keys", "values"):
            changed = {"keys": list(state.keys), "values": list(state.values)}
            changed[part][index] = -changed[part][index]
            seen.append(loss_with(**changed))
    assert len(set(seen)) == 1 + 2 * len(state.keys)
