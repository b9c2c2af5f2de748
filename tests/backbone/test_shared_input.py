"""Linear layers that share their input compute what each computes alone, and so does the gradient of the input."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from torch import nn

from ptd.backbone.shared_input import SharedInput, share_inputs

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2")


def layers(count=3, bias=True):
    torch.manual_seed(0)
    return [nn.Linear(6, 4 + index, bias).double().requires_grad_(False) for index in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_the_same(family):
    plain, own = (tiny_model(family).double().requires_grad_(False) for _ in range(2))
    assert share_inputs(own) == 2 * own.config.num_hidden_layers
    found = []
    for model in (plain, own):
        x = torch.randn(2, 5, own.config.hidden_size, generator=torch.Generator().manual_seed(1)).double()
        logits = model(inputs_embeds=x.requires_grad_(), use_cache=False).logits
        logits.square().sum().backward()
        found.append((logits.detach(), x.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("used", [(0, 1, 2), (2,), (0, 2)])
def test_only_the_outputs_that_are_used_have_a_gradient(used):
    group, x = layers(), torch.randn(2, 3, 6).double().requires_grad_()
    shared = SharedInput(group)
    outputs = [shared(index, x) for index in range(3)]
    sum((index + 1) * outputs[index].sin().sum() for index in used).backward()
    got, x.grad = x.grad, None
    sum((index + 1) * group[index](x).sin().sum() for index in used).backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-12, atol=1e-12)


def test_another_input_has_its_own_output():
    group, x, other = layers(), torch.randn(3, 6).double(), torch.randn(3, 6).double()
    shared = SharedInput(group)
    for index, given in ((0, x), (1, other), (2, x), (0, x), (0, other), (1, other), (2, other), (1, x)):
        torch.testing.assert_close(shared(index, given), group[index](given), rtol=0, atol=0)


def test_nothing_is_kept_after_the_last_layer():
    shared, x = SharedInput(layers()), torch.randn(3, 6).double()
    for index in range(3):
        shared(index, x)
    assert (shared._input, shared._outputs) == (None, {})


def test_layers_that_are_not_plain_and_frozen_stay_alone():
    class Packed(nn.Linear):
        pass

    def model(kind=nn.Linear, trained=False):
        parts = {name: kind(4, 4).requires_grad_(trained) for name in ("q_proj", "k_proj", "v_proj")}
        return nn.ModuleDict(parts)

    sharded = model()
    sharded["k_proj"].weight.ds_id = 0
    assert share_inputs(model()) == 1
    assert [share_inputs(each) for each in (model(Packed), model(trained=True), sharded)] == [0, 0, 0]
