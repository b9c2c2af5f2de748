"""Attention shares of a prompt equal the probabilities that transformers' eager attention materialises."""

from __future__ import annotations

import importlib

import pytest
import torch
from families import ENCODER_DECODERS, VOCAB, attend_by, tiny_model
from peft import PrefixTuningConfig, get_peft_model
from torch.nn.functional import cross_entropy, pad
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from ptd.engine.bucket_padding import pad_to_bucket
from ptd.engine.forward import Forward
from ptd.inject import Attachment, SharesOfPrompt, attending_only_to
from ptd.types import IGNORE_INDEX, Batch, NoPrompt, PrefixKV, PrefixLayout, SoftTokens, virtual_id

P, CLOSE = 3, 1e-5
CPU = torch.device("cpu")
LENGTHS, LONG = (12, 7), (41, 37)
rng = torch.Generator().manual_seed(4)


def draw(*shape):
    return torch.randint(5, VOCAB, shape, generator=rng)


def batch_of(lengths, *, rows=(0, 1)):
    """Return a batch padded on the right and supervised from the fourth token on."""
    width = max(lengths)
    ids, labels = draw(len(lengths), width), draw(len(lengths), width)
    for row, length in enumerate(lengths):
        ids[row, length:], labels[row, length:] = 0, IGNORE_INDEX
    labels[:, :3] = IGNORE_INDEX
    positions = torch.arange(width).repeat(len(lengths), 1)
    return Batch(ids, labels, positions, None, width, sum(lengths), 1, torch.tensor(lengths), rows=rows)


def with_source(lengths):
    target = batch_of((6, 5))
    return Batch(**{**vars(target), "source": batch_of(lengths)})


def packed(batch):
    mask, lengths = batch.attention_mask, batch.lengths.tolist()
    bounds = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    ids, labels, positions = (x[mask][None] for x in (batch.input_ids, batch.labels, batch.position_ids))
    return Batch(ids, labels, positions, bounds, max(lengths), sum(lengths), 1, batch.lengths, rows=batch.rows)


def batch_for(family, lengths=LENGTHS):
    return with_source(lengths) if family in ENCODER_DECODERS else batch_of(lengths)


def random_prefix(shape, count=P):
    generator = torch.Generator().manual_seed(5)
    layout = PrefixLayout(shape.layers)
    return layout.state(torch.randn(count, layout.width, generator=generator))


def recorded(model, batch, state, *, rounds=False):
    """Return the shares ``[2, Hq, P]`` and the kind of each layer; assert that `SharesOfPrompt` changes no output."""
    attachment = Attachment(model)
    attachment.set(state(attachment) if callable(state) else state)
    run, recorder = Forward(attachment, CPU, rounds=rounds), SharesOfPrompt(attachment)
    with torch.no_grad():
        with recorder.within(batch):
            watched = run(batch)
        assert torch.equal(watched, run(batch))
    kinds = [layer.kind for layer in attachment.shape.layers]
    attachment.remove()
    return [recorder.layers[index] for index in range(len(kinds))], kinds


def reduced(probabilities, batch, kind):
    """Sum ``[B, Hq, S, P]`` over each of both sets of queries; return the sums ``[2, Hq, P]`` and the sets' sizes."""
    side = batch.source if kind == "encoder" and batch.source is not None else batch
    own = side.attention_mask & (side.input_ids >= 0)
    chosen = own & (side.labels != IGNORE_INDEX) if side is batch else torch.zeros_like(own)
    sets = torch.stack([own, chosen]).double()
    return torch.einsum("bhsp,nbs->nhp", probabilities.double(), sets), sets.sum((1, 2))


def check(layers, kinds, probabilities, batch):
    assert len(layers) == len(probabilities)
    for layer, kind, wanted in zip(layers, kinds, probabilities, strict=True):
        mass, counts = reduced(wanted, batch, kind)
        assert torch.equal(layer.queries, counts)
        scale = counts.clamp_min(1)[:, None, None]
        assert (layer.mass / scale - mass / scale).abs().max() < CLOSE
        assert 1e-3 < (mass / scale)[0].sum(-1).max() < 1 - 1e-6, "neither nothing nor everything"


# ---- prefixes


def eager_with_prefix(module, query, key, value, attention_mask, **options):
    """Run the family's own eager attention over the concatenated keys; store the probabilities of the prefix."""
    prefix_k, prefix_v = (x.transpose(0, 1).expand(len(key), -1, -1, -1) for x in module._test_prefix)
    if options.get("position_bias") is not None:
        options["position_bias"] = pad(options["position_bias"], (P, 0))
    eager = importlib.import_module(type(module).__module__).eager_attention_forward
    mask = None if attention_mask is None else pad(attention_mask, (P, 0))
    out, weights = eager(module, query, torch.cat([prefix_k, key], 2), torch.cat([prefix_v, value], 2), mask, **options)
    module._test_seen.append(weights[..., :P])
    return out, weights


AttentionInterface.register("eager_with_prefix", eager_with_prefix)
AttentionMaskInterface.register(
    "eager_with_prefix",
    lambda *args, **kwargs: eager_mask(
        *args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    ),
)

CASES = [("llama", LENGTHS), ("gpt2", LENGTHS), ("gemma2", LONG), ("mistral", LONG), ("bert", LENGTHS), ("t5", LENGTHS)]
CASES += [("bart", LENGTHS), ("modernbert", LONG)]


@pytest.mark.parametrize(("family", "lengths"), CASES, ids=[family for family, _ in CASES])
def test_shares_of_a_prefix(family, lengths):
    """Shares of a prefix equal the eager probabilities.

    The cases cover grouped heads, softcaps, windows shorter than the text, encoders, self- and cross-attention, and
    position biases.
    """
    model, batch = tiny_model(family), batch_for(family, lengths)
    attachment = Attachment(model)
    prefix, first = random_prefix(attachment.shape), attachment.first_position
    modules = [module for module in model.modules() if "_ptd_slot" in vars(module)]
    number = {id(slot): index for index, slot in enumerate(attachment.slots)}
    order = {number[id(vars(module)["_ptd_slot"])]: module for module in modules}
    inputs = attachment.inputs.of(batch, first)
    attachment.remove()
    layers, kinds = recorded(model, batch, prefix)

    attend_by(model, "eager_with_prefix")
    seen = {index: [] for index in order}
    for index, module in order.items():
        object.__setattr__(module, "_test_prefix", (prefix.keys[index], prefix.values[index]))
        object.__setattr__(module, "_test_seen", seen[index])
    if "position_ids" in inputs:
        inputs["position_ids"] = batch.position_ids + first + P
    with torch.no_grad():
        model(**inputs)
    assert all(len(calls) == 1 for calls in seen.values())
    check(layers, kinds, [seen[index][0] for index in sorted(seen)], batch)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by PEFT
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_shares_agree_with_peft(family):
    batch = batch_of(LENGTHS)
    torch.manual_seed(2)
    base = tiny_model(family, attn_implementation="eager")
    theirs = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    with torch.no_grad():
        output = theirs(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), output_attentions=True
        )  # transformers' own probabilities, with the prefix as past_key_values
        flat = theirs.prompt_encoder["default"].embedding.weight
    layers, kinds = recorded(
        tiny_model(family), batch, lambda attachment: PrefixLayout(attachment.shape.layers).state(flat)
    )
    check(layers, kinds, [weights[..., :P] for weights in output.attentions], batch)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("kind", ["prefix", "front", "marks"])
def test_packed_batches_have_the_shares_of_padded_ones(family, kind):
    batch, model = batch_of(LENGTHS), tiny_model(family)
    soft = torch.randn(P, 32, generator=torch.Generator().manual_seed(6))
    state = (
        (lambda attachment: random_prefix(attachment.shape)) if kind == "prefix" else SoftTokens(soft, kind == "front")
    )
    if kind == "marks":
        batch.input_ids[:, 2], batch.input_ids[0, 5] = virtual_id(1), virtual_id(2)
    padded_layers, _ = recorded(model, batch, state)
    for one, other in zip(padded_layers, recorded(model, packed(batch), state)[0], strict=True):
        for a, b in zip(one.tensors(), other.tensors(), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_many_virtual_tokens_and_other_precisions():
    """Shares are right for more tokens than a head is wide, and for bfloat16 queries and keys (computed in fp32)."""
    batch, model = batch_of(LENGTHS), tiny_model("llama")
    layers, _ = recorded(model, batch, lambda attachment: random_prefix(attachment.shape, 21))
    assert layers[0].mass.shape == (2, 4, 21)
    low, _ = recorded(model.to(torch.bfloat16), batch, lambda attachment: random_prefix(attachment.shape, 21))
    for one, other in zip(layers, low, strict=True):
        assert other.mass.dtype == torch.float64
        assert ((one.mass - other.mass)[0] / one.queries[0]).abs().max() < 0.05
    assert all(layer.mass[0].sum(-1).max() <= layer.queries[0] for layer in low)


def test_a_filler_counts_nothing():
    batch = batch_of(LENGTHS, rows=())
    layers, _ = recorded(tiny_model("llama"), batch, lambda attachment: random_prefix(attachment.shape))
    assert all(not tensor.any() for layer in layers for tensor in layer.tensors())


# ---- virtual tokens


def eager_attentions(output, kinds):
    """Return the attention probabilities in the order in which the layers run."""
    if kinds == ["encoder"] * 2 + ["decoder", "cross"] * 2:
        decoder = [x for pair in zip(output.decoder_attentions, output.cross_attentions, strict=True) for x in pair]
        return [*output.encoder_attentions, *decoder]
    return list(output.attentions)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert", "t5", "bart"])
def test_shares_of_virtual_tokens_in_front(family):
    batch, model = batch_for(family), tiny_model(family)
    soft = torch.randn(P, 32, generator=torch.Generator().manual_seed(6))
    layers, kinds = recorded(model, batch, SoftTokens(soft, in_front=True))
    read = batch.source or batch
    embeddings = (model.get_encoder() if batch.source else model).get_input_embeddings()
    attend_by(model, "eager")
    inputs = {
        "inputs_embeds": torch.cat([soft.expand(2, -1, -1), embeddings(read.input_ids)], dim=1),
        "attention_mask": pad(read.attention_mask.long(), (P, 0), value=1),
    }
    if batch.source is not None:
        inputs["decoder_input_ids"] = batch.input_ids
    with torch.no_grad():
        weights = eager_attentions(model(**inputs, output_attentions=True), kinds)
    for layer, kind, found in zip(layers, kinds, weights, strict=True):
        queries = found if kind in ("cross", "decoder") and batch.source is not None else found[:, :, P:]
        if kind == "decoder" and batch.source is not None:
            assert not layer.mass.any(), "the decoder's own keys hold no virtual token"
            continue
        check([layer], [kind], [queries[..., :P]], batch)


# ---- without some tokens


def loss(model, state, batch, kept=None, shift=None):
    attachment = Attachment(model)
    attachment.set(state(attachment) if callable(state) else state)
    if shift is not None:
        attachment.shift(shift)
    run = Forward(attachment, CPU)
    with torch.no_grad():
        if kept is None:
            logits = run(batch)
        else:
            with attending_only_to(attachment, kept):
                logits = run(batch)
    attachment.remove()
    return cross_entropy(logits, batch.labels.flatten()).item()


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert", "t5"])
def test_hiding_tokens_of_a_prefix_is_a_prefix_without_them(family):
    """The loss equals that of a prefix without the hidden tokens, if the own tokens keep their positions."""
    model, batch = tiny_model(family), batch_for(family)

    def whole(attachment):
        return random_prefix(attachment.shape)

    def smaller(attachment):
        prefix = whole(attachment)
        return PrefixKV(*(tuple(x[[0, 2]] for x in part) for part in (prefix.keys, prefix.values)))

    everything = loss(model, whole, batch)
    assert loss(model, whole, batch, range(P)) == pytest.approx(everything, abs=1e-6)
    got = loss(model, whole, batch, [2, 0])
    assert got == pytest.approx(loss(model, smaller, batch, shift=P), rel=1e-6)
    assert abs(got - everything) > 1e-4
    assert loss(model, whole, batch, []) == pytest.approx(loss(model, NoPrompt(), batch, shift=P), rel=1e-6)


@pytest.mark.parametrize("make", [lambda batch: batch, packed], ids=["padded", "packed"])
def test_hidden_virtual_tokens_are_as_if_masked(make):
    """The loss equals that of plain transformers with a 0 in the attention mask at the hidden tokens."""
    model, batch = tiny_model("llama"), batch_of(LENGTHS)
    soft = torch.randn(P, 32, generator=torch.Generator().manual_seed(6))
    for kept in ([0, 1, 2], [0, 2], [1], []):
        mask = pad(batch.attention_mask.long(), (P, 0), value=0)
        mask[:, kept] = 1
        embeds = torch.cat([soft.expand(2, -1, -1), model.get_input_embeddings()(batch.input_ids)], dim=1)
        positions = torch.arange(embeds.shape[1]).expand(2, -1)
        with torch.no_grad():
            logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits[:, P:]
        want = cross_entropy(logits[batch.attention_mask], batch.labels[batch.attention_mask]).item()
        assert loss(model, SoftTokens(soft, True), make(batch), kept) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_hidden_virtual_token_does_nothing(family):
    """The embedding of a hidden token, before the sequence or at a mark, has no effect; that of a visible token has."""
    model, batch = tiny_model(family), batch_for(family)
    soft = torch.randn(P, 32, generator=torch.Generator().manual_seed(6))
    other = soft.clone()
    other[1] = torch.randn(32, generator=torch.Generator().manual_seed(7))
    for in_front in (True, False):
        if not in_front:
            read = batch.source or batch
            for place in range(P):
                read.input_ids[:, 2 * place + 1] = virtual_id(place)
            read.labels[:, 3] = IGNORE_INDEX  # the hidden token's own position reads its embedding
        both = [loss(model, SoftTokens(x, in_front), batch, [0, 2]) for x in (soft, other)]
        seen = [loss(model, SoftTokens(x, in_front), batch, [0, 1]) for x in (soft, other)]
        assert both[0] == pytest.approx(both[1], abs=1e-6)
        assert abs(seen[0] - seen[1]) > 1e-4


@pytest.mark.parametrize("soft", [False, True], ids=["prefix", "soft"])
def test_tokens_that_fill_a_batch_up_do_not_count(soft):
    model, batch = tiny_model("llama"), packed(batch_of((45, 28)))

    def state(attachment):
        torch.manual_seed(0)
        hidden = model.config.hidden_size
        return SoftTokens(torch.randn(P, hidden), in_front=True) if soft else random_prefix(attachment.shape)

    (plain, _), (filled, _) = (recorded(model, batch, state, rounds=rounds) for rounds in (False, True))
    assert pad_to_bucket(batch, 0)[0].input_ids.shape[1] > sum(batch.lengths)
    for one, other in zip(plain, filled, strict=True):
        assert torch.equal(one.queries, other.queries)
        for name in ("mass", "norms", "keys"):
            wanted = getattr(one, name)
            assert (wanted - getattr(other, name)).abs().max() <= CLOSE * wanted.abs().max()
