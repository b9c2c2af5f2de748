"""Modules after the last attention run only at the positions that are read; outputs and gradients stay the same."""

from __future__ import annotations

import pytest
import torch
from families import ENCODER_DECODERS, ENCODERS, FAMILIES, VOCAB, tiny_model
from torch import nn

from ptd.backbone.load import checkpoint_layers
from ptd.inject import Attachment, PassOutput
from ptd.inject.last_layer import ModuleProbe
from ptd.types import PrefixKV, SoftTokens

P, CLOSE = 3, 1e-6
EVERY = (*FAMILIES, *ENCODERS, *ENCODER_DECODERS)
draw = torch.Generator().manual_seed(4)
IDS = torch.randint(5, VOCAB, (2, 11), generator=draw)
MASK = torch.ones_like(IDS)
MASK[1, 8:] = 0
PACKED = {
    "input_ids": IDS[MASK.bool()][None],
    "cu_seq_lens_q": torch.tensor([0, 11, 19], dtype=torch.int32),
    "cu_seq_lens_k": torch.tensor([0, 11, 19], dtype=torch.int32),
    "max_length_q": 11,
    "max_length_k": 11,
}
READ = torch.tensor([4, 5, 9, 13, 17])  # in a padded batch the last three are the second row's


def inputs(attachment, family, packed):
    if packed:
        positions = torch.cat([torch.arange(11), torch.arange(8)])[None] + attachment.first_position
        return {**PACKED, "position_ids": positions}
    given = {"input_ids": IDS, "attention_mask": MASK}
    return given | ({"decoder_input_ids": IDS} if family in ENCODER_DECODERS else {})


def prompt(attachment, kind):
    torch.manual_seed(5)
    if kind == "front":
        return SoftTokens(torch.randn(P, attachment.shape.input_size, requires_grad=True), in_front=True)
    layers = attachment.shape.layers
    keys = tuple(torch.randn(P, layer.kv_heads, layer.key_dim, requires_grad=True) for layer in layers)
    return PrefixKV(keys, tuple(torch.randn(P, x.kv_heads, x.value_dim, requires_grad=True) for x in layers))


def run(family, *, cut, kind="prefix", packed=False, checkpointing=False):
    """Return the logits at `READ`, the prompt's gradients, and the number of rows that each module of the tail got."""
    model = tiny_model(family).requires_grad_(False)
    if checkpointing:
        checkpoint_layers(model)
    attachment = Attachment(model)
    if packed and not attachment.packable:
        pytest.skip("runs padded")
    tail, rows = attachment.stacks[-1].tail, []
    if not cut:
        tail.begin = lambda tokens, kept: None
    for module in tail.modules:
        module.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[:-1].numel()))
    state = prompt(attachment, kind)
    attachment.set(state)
    caching = {} if family in ENCODERS else {"use_cache": False}  # recomputed layers would add to a cache
    with attachment.only(PassOutput(READ)):
        logits = model(**inputs(attachment, family, packed), **caching).logits[0]
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), [tensor.grad for tensor in state.tensors()], rows


def assert_same(got, want):
    for one, other in zip([got[0], *got[1]], [want[0], *want[1]], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).norm() <= CLOSE * other.norm()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["prefix", "front"])
@pytest.mark.parametrize("family", EVERY)
def test_logits_and_gradients_are_those_of_the_full_pass(family, kind, packed):
    cut = run(family, cut=True, kind=kind, packed=packed)
    assert_same(cut, run(family, cut=False, kind=kind, packed=packed))
    assert cut[2]
    assert set(cut[2]) == {len(READ)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_checkpointed_layers_are_recomputed_with_the_same_rows(family):
    cut = run(family, cut=True, checkpointing=True)
    assert_same(cut, run(family, cut=False))
    assert set(cut[2]) == {len(READ)}
    assert len(cut[2]) > len(run(family, cut=True)[2]), "as far as backward needs it"


@pytest.mark.parametrize("family", [name for name in EVERY if name != "mixtral"])
def test_the_last_layer_s_mlp_and_output_projection_are_cut(family):
    tail = Attachment(tiny_model(family)).stacks[-1].tail.modules
    products = [part for module in tail for part in module.modules() if getattr(part, "weight", None) is not None]
    numbers = sum(part.weight.numel() for part in products if part.weight.ndim == 2)
    assert numbers >= 32 * 32 + 2 * 32 * 48


def test_experts_are_left_alone():
    model = tiny_model("mixtral")
    assert Attachment(model).stacks[-1].tail.modules == [model.model.layers[-1].self_attn.o_proj]


def test_all_positions_and_all_hidden_states_are_whole():
    model = tiny_model("llama")
    attachment = Attachment(model)
    rows = []
    model.model.layers[-1].mlp.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[1]))
    with torch.no_grad():
        model(IDS)
        with attachment.only(PassOutput(torch.arange(22))):
            model(IDS)  # all positions are read
        with attachment.only(PassOutput(READ)):
            states = model(IDS, output_hidden_states=True).hidden_states
        want = model(IDS, output_hidden_states=True).hidden_states
    assert rows == [11] * 4
    assert all(torch.equal(one, other) for one, other in zip(states[:-1], want[:-1], strict=True))


class Capped(nn.Module):
    """Computes logits as gemma2 does, from the head's output, to which no reference is left by then."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 8)

    def forward(self, hidden):
        logits = self.head(hidden)
        logits = logits / 0.5
        return {"logits": torch.tanh(logits)}


def test_logits_in_the_memory_of_the_heads_output_are_not_taken_for_it():
    model = Capped().requires_grad_(False)
    for _ in range(100):
        with ModuleProbe(model) as watch:
            output = model(torch.randn(1, 2, 4))
        assert watch.head_of(output, set()) is None
