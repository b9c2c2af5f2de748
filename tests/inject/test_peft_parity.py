"""The same prefix gives the same numbers as in PEFT: logits, loss, gradients and greedy generation, in every family.

This holds while prefix and sequence together fit in a sliding window: PEFT's window clips the prefix, ptd's never does.
Families whose attention ptd cannot replace get the prefix through their own cache, as in PEFT.
"""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from families import EOS, FAMILIES, OWN_ATTENTION, VOCAB, tiny_model
from peft import PrefixTuningConfig, get_peft_model
from torch.nn.functional import cross_entropy, pad

from ptd.backbone.load import checkpoint_layers
from ptd.engine.forward import Forward
from ptd.inject import Attachment
from ptd.methods.prefix import PrefixEncoder
from ptd.readouts.language_model import LanguageModel
from ptd.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by PEFT

P, LENGTHS = 5, (9, 6)
# The task sets these bounds. fp32 rounding in two orders of summation leaves errors of about 5e-6 (absolute) and 2e-6
# (relative to the norm).
LOGITS, RELATIVE = 1e-4, 1e-5
CASES = [
    *((family, backend) for family in FAMILIES for backend in ("merge", "reference")),
    *((family, "auto") for family in OWN_ATTENTION),
    *((family, "cache") for family in ("llama", "gpt2", "opt")),
]
ROWS_OF_CASES = [
    (*case, make)
    for case in CASES
    for make in ("padded", "packed")
    if make == "padded" or case[1] not in ("auto", "cache")
]

CPU = torch.device("cpu")
rng = torch.Generator().manual_seed(1)
SEQUENCES = [torch.randint(3, VOCAB, (length,), generator=rng) for length in LENGTHS]
LABELS = [pad(ids[1:], (0, 1), value=-100) for ids in SEQUENCES]
for labels in LABELS:
    labels[:3] = -100  # the prompt


def stacked(rows, value, side="right"):
    width = max(map(len, rows))
    return torch.stack(
        [pad(row, (0, width - len(row)) if side == "right" else (width - len(row), 0), value=value) for row in rows]
    )


def masks(side):
    return stacked([torch.ones_like(ids) for ids in SEQUENCES], 0, side)


def padded():
    positions = torch.arange(max(LENGTHS)).repeat(2, 1)
    ids, labels = stacked(SEQUENCES, 0), stacked(LABELS, -100)
    return Batch(ids, labels, positions, None, max(LENGTHS), sum(LENGTHS), 1, torch.tensor(LENGTHS), rows=(0, 1))


def packed():
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    bounds = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32)
    ids, labels = torch.cat(SEQUENCES)[None], torch.cat(LABELS)[None]
    return Batch(ids, labels, positions, bounds, max(LENGTHS), sum(LENGTHS), 1, torch.tensor(LENGTHS), rows=(0, 1))


@cache
def peft_model(family, projection=False):
    torch.manual_seed(2)
    extra = {"prefix_projection": True, "encoder_hidden_size": 7} if projection else {}
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **extra)
    return get_peft_model(tiny_model(family), config).eval()


@cache
def peft_loss(family, projection):
    """Return PEFT's summed loss and the gradients of the encoder's parameters, under ptd's names."""
    model = peft_model(family, projection)
    encoder = model.prompt_encoder["default"]
    logits = model(input_ids=stacked(SEQUENCES, 0), attention_mask=masks("right")).logits
    loss = cross_entropy(logits.flatten(0, 1), stacked(LABELS, -100).flatten(), reduction="sum")
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return loss.detach(), {
        name.removesuffix("embedding.weight") or "embedding": g for name, g in zip(names, gradients, strict=True)
    }


def ours(family, backend, projection=False, checkpointing=False):
    """Return ptd's forward pass on the same backbone, and its encoder with the same parameters."""
    model = tiny_model(family).requires_grad_(False)
    attachment = Attachment(model, backend=backend)
    theirs = peft_model(family, projection).prompt_encoder["default"]
    sizes = {"embedding_size": theirs.embedding.weight.shape[1], "encoder_hidden_size": 7} if projection else {}
    encoder = PrefixEncoder(attachment.shape.layers, P, **sizes)
    state = copy.deepcopy(theirs.state_dict())
    encoder.load_state_dict({"embedding": state.pop("embedding.weight"), **state})
    if checkpointing:
        checkpoint_layers(model)
    attachment.set(encoder.state(encoder()))
    return Forward(attachment, CPU), encoder


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_logits(family, backend):
    model = ours(family, backend)[0].attachment.model
    theirs = peft_model(family)
    for side in ("right", "left"):
        ids, mask = stacked(SEQUENCES, 0, side), masks(side)
        with torch.no_grad():
            difference = (
                model(input_ids=ids, attention_mask=mask).logits - theirs(input_ids=ids, attention_mask=mask).logits
            )
        assert difference[mask.bool()].abs().max() < LOGITS, side
    ids = SEQUENCES[0][None]
    with torch.no_grad():
        assert (model(input_ids=ids).logits - theirs(input_ids=ids).logits).abs().max() < LOGITS


@pytest.mark.parametrize("projection", [False, True], ids=["direct", "mlp"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize(("family", "backend", "make"), ROWS_OF_CASES)
def test_loss_and_encoder_gradients(family, backend, make, checkpointing, projection):
    run, encoder = ours(family, backend, projection, checkpointing)
    loss = LanguageModel()(run, {"padded": padded, "packed": packed}[make]()).loss
    loss.backward()
    want, gradients = peft_loss(family, projection)
    assert abs(loss - want) / want < RELATIVE
    got = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    assert got.keys() == gradients.keys()
    worst = {name: relative(got[name], gradients[name]) for name in got}
    assert max(worst.values()) < RELATIVE, worst


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_greedy_generation_with_left_padding(family, backend):
    model = ours(family, backend)[0].attachment.model
    inputs = {"input_ids": stacked(SEQUENCES, 0, "left"), "attention_mask": masks("left")}
    options = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        assert model.generate(**inputs, **options).tolist() == peft_model(family).generate(**inputs, **options).tolist()


def test_the_tests_can_fail():
    """The prefix changes the logits by far more than the tolerance."""
    run, encoder = ours("llama", "merge")
    model = run.attachment.model
    plain = tiny_model("llama")
    ids = SEQUENCES[0][None]
    with torch.no_grad():
        assert (model(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max() > 1000 * LOGITS
    assert EOS not in ids
    assert encoder().abs().max() > 1
