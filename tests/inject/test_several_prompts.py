"""Several prompts in one batch: every row computes what it computes alone with its own prompt, and none leaks.

Prompts differ in their number of virtual tokens, and one row reads none. A poisoned prompt consists of NaN: attention
sums 0 × NaN = NaN, so a row that touches it in any way shows it. tests/ptd_kernels/test_prefix_attention.py does the
same to attention alone, with all backends.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from families import ENCODER_DECODERS, ENCODERS, FAMILIES, VOCAB, tiny_model
from transformers import GenerationConfig

from ptd.backbone.load import checkpoint_layers
from ptd.data.batches import packed_batch, padded_batch
from ptd.engine.bucket_padding import pad_to_bucket
from ptd.engine.forward import Forward
from ptd.inject import Attachment
from ptd.types import DataReport, Examples, NoPrompt, PrefixKV, Prompts, SoftTokens, UserError, virtual_id

SIZES = (3, 7, 3)
LENGTHS = (12, 5, 9, 7, 1, 6)
READS = (1, 0, -1, 2, 0, 1)
CLOSE = 2e-5
KINDS = ("prefix", "front", "marks")
SEED = torch.Generator().manual_seed(3)
ROWS = [torch.randint(5, VOCAB, (length,), generator=SEED).tolist() for length in LENGTHS]
CHANGES = {family: {"sliding_window": 8} for family in ("mistral", "gemma2", "gemma3_text")}
NEW = 5


def attached(family="llama", backend="auto"):
    model = tiny_model(family, **CHANGES.get(family, {})).requires_grad_(False)
    if model.can_generate():
        model.generation_config.eos_token_id = None
    return model, Attachment(model, backend=backend)


def prompts_for(attachment, kind, requires_grad=False):
    torch.manual_seed(5)
    options = {"requires_grad": requires_grad}
    if kind != "prefix":
        width = attachment.shape.input_size
        return [SoftTokens(torch.randn(size, width, **options), in_front=kind == "front") for size in SIZES]
    shapes = [(layer.kv_heads, dim) for layer in attachment.shape.layers for dim in (layer.key_dim, layer.value_dim)]
    made = [[torch.randn(size, *shape, **options) for shape in shapes] for size in SIZES]
    return [PrefixKV(tuple(tensors[0::2]), tuple(tensors[1::2])) for tensors in made]


def poisoned(prompts, number):
    """Return the prompts with NaN in place of one of them."""

    def nan(tensor):
        return torch.full_like(tensor, torch.nan, requires_grad=tensor.requires_grad)

    one = prompts[number]
    if isinstance(one, SoftTokens):
        bad = SoftTokens(nan(one.embeddings), one.in_front)
    else:
        bad = PrefixKV(tuple(map(nan, one.keys)), tuple(map(nan, one.values)))
    return [bad if place == number else prompt for place, prompt in enumerate(prompts)]


def rows_for(kind):
    """Return the rows; with ``marks``, each contains the virtual tokens of its own prompt."""
    if kind != "marks":
        return ROWS
    marks = [[virtual_id(number) for number in range(SIZES[read] if read >= 0 else 0)] for read in READS]
    return [[*row[:1], *found, *row[1:]] for row, found in zip(ROWS, marks, strict=True)]


def examples_of(rows):
    """Return the rows as a language model's examples, with every token supervised."""
    tokens = np.concatenate([np.array(row, dtype=np.int32) for row in rows])
    return Examples.of_text(tokens, tokens >= 0, np.cumsum([0, *map(len, rows)]), DataReport(len(rows), len(tokens), 0))


def batch_of(attachment, kind, numbers=None, reads=None, *, packed=False):
    """Return these rows (None: all) as a batch; in an encoder-decoder, a row's first tokens are also its target."""
    numbers = range(len(ROWS)) if numbers is None else numbers
    examples = examples_of([rows_for(kind)[number] for number in numbers])
    if len(attachment.stacks) == 2:
        examples = replace(examples_of([[7, *ROWS[number][:3]] for number in numbers]), source=examples)
    if reads is not None:
        examples = replace(examples, members=np.array(reads))
    return (packed_batch if packed else padded_batch)(examples, np.arange(len(examples)))


def outputs(attachment, batch):
    """Return the output of each row, ``[length, width]``."""
    flat = Forward(attachment, torch.device("cpu"))(batch)
    return [flat[a : a + n] for a, n in zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)]


def outputs_alone(attachment, prompts, kind):
    """Return the output of each row, alone, with its own prompt as the only one."""
    found = []
    for number, read in enumerate(READS):
        attachment.set(prompts[read] if read >= 0 else None)
        found += outputs(attachment, batch_of(attachment, kind, [number]))
    return found


def layouts(attachment):
    """Yield each kind of prompt with each layout of a batch: whether it is packed."""
    yield from product(KINDS, (False, True) if attachment.packable else (False,))


@pytest.mark.parametrize("family", [*FAMILIES, *ENCODERS, *ENCODER_DECODERS])
@torch.no_grad()
def test_each_row_is_as_it_is_alone_with_its_own_prompt(family):
    _, attachment = attached(family)
    for kind, packed in layouts(attachment):
        prompts = prompts_for(attachment, kind)
        want = outputs_alone(attachment, prompts, kind)
        attachment.set(Prompts(tuple(prompts)))
        got = outputs(attachment, batch_of(attachment, kind, reads=READS, packed=packed))
        for one, other in zip(got, want, strict=True):
            assert (one - other).abs().max() < CLOSE, (kind, packed)
        if kind != "marks":
            plain = outputs(attachment, batch_of(attachment, kind, reads=[-1] * len(READS), packed=packed))
            changed = [bool((one - other).abs().max() > CLOSE) for one, other in zip(got, plain, strict=True)]
            assert changed == [read >= 0 for read in READS]


def losses_of(attachment, batch):
    """Return a loss for each row that depends on all of its outputs."""
    return [row.float().square().mean() for row in outputs(attachment, batch)]


def gradients_of(attachment, prompts, batch):
    leaves = [tensor for prompt in prompts for tensor in prompt.tensors()]
    attachment.set(Prompts(tuple(prompts)))
    return torch.autograd.grad(sum(losses_of(attachment, batch)), leaves)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert", "t5"])
def test_gradients_arrive_at_each_prompt_as_from_its_own_rows(family):
    _, attachment = attached(family)
    for kind, packed in layouts(attachment):
        prompts = prompts_for(attachment, kind, requires_grad=True)
        want = []
        for number, prompt in enumerate(prompts):
            attachment.set(prompt)
            own = [row for row, read in enumerate(READS) if read == number]
            losses = losses_of(attachment, batch_of(attachment, kind, own, packed=packed))
            want += torch.autograd.grad(sum(losses), list(prompt.tensors()))
        batch = batch_of(attachment, kind, reads=READS, packed=packed)
        got, again = gradients_of(attachment, prompts, batch), gradients_of(attachment, prompts, batch)
        for one, other, repeated in zip(got, want, again, strict=True):
            assert other.norm() > 0
            assert (one - other).norm() < 1e-5 * other.norm() + 1e-7, (kind, packed)
            assert torch.equal(one, repeated)


@pytest.mark.parametrize("kind", ["prefix", "front"])
def test_layers_that_are_computed_again_read_the_same_prompts(kind):
    """With gradient checkpointing, layers run again in the backward pass, after the batch's own pass has ended."""
    gradients = []
    for checkpointing in (False, True):
        model, attachment = attached()
        if checkpointing:
            checkpoint_layers(model)
        batch = batch_of(attachment, kind, reads=READS, packed=True)
        gradients.append(gradients_of(attachment, prompts_for(attachment, kind, requires_grad=True), batch))
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() < 1e-6 * one.norm()


# ---- no leak


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        *product(["llama", "gemma2"], ["auto", "merge", "joined", "reference"]),
        *product(["gpt2", "bert", "t5"], ["auto"]),
    ],
)
def test_a_poisoned_neighbour_changes_no_bit_of_another_row(family, backend):
    _, attachment = attached(family, backend)
    for kind, packed in layouts(attachment):
        if backend == "joined" and not (kind == "prefix" and packed and family == "llama"):
            continue  # it computes nothing else, for one prompt either
        batch = batch_of(attachment, kind, reads=READS, packed=packed)
        clean = prompts_for(attachment, kind, requires_grad=True)
        for bad in range(len(SIZES)):
            found = []
            for prompts in (clean, poisoned(clean, bad)):
                attachment.set(Prompts(tuple(prompts)))
                losses = losses_of(attachment, batch)
                good = [loss for loss, read in zip(losses, READS, strict=True) if read != bad]
                leaves = [x for number, prompt in enumerate(prompts) if number != bad for x in prompt.tensors()]
                found.append([*good, *torch.autograd.grad(sum(losses), leaves)])
                assert torch.isnan(losses[READS.index(bad)]) == (prompts is not clean)
            for one, other in zip(*found, strict=True):
                assert torch.isfinite(one).all(), (kind, packed)
                assert torch.equal(one, other), (kind, packed)


# ---- generation

CACHES = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "beams without a cache": {"num_beams": 2, "use_cache": False},
    "two of three beams": {"num_beams": 3, "num_return_sequences": 2},
}


def generated(model, attachment, rows, reads=None, **options):
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    given = GenerationConfig(max_new_tokens=NEW, pad_token_id=0, **{"do_sample": False, **options})
    inputs = attachment.generation_inputs(ids, mask)
    if model.config.is_encoder_decoder:
        inputs = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}
    with attachment.reading(reads):
        out = model.generate(**inputs, generation_config=given)
    return out[:, 1 if model.config.is_encoder_decoder else longest :].tolist()


@pytest.mark.parametrize(
    ("family", "cache"),
    [*product([*FAMILIES, "bart"], ["dynamic"]), *product(["llama", "mistral", "t5"], [*CACHES])][1:],
)
def test_each_row_is_continued_as_alone_with_its_own_prompt(family, cache):
    model, attachment = attached(family)
    for kind in KINDS:
        if cache == "static" and (kind == "front" or model.config.is_encoder_decoder):
            continue  # refused for one prompt too
        prompts, rows, options = prompts_for(attachment, kind), rows_for(kind), CACHES[cache]
        attachment.set(Prompts(tuple(prompts)))
        got = generated(model, attachment, rows, READS, **options)
        want = []
        for row, read in zip(rows, READS, strict=True):
            attachment.set(prompts[read] if read >= 0 else None)
            want += generated(model, attachment, [row], **options)
        assert got == want, kind
        assert len({tuple(each) for each in got}) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_poisoned_neighbour_changes_no_token(kind):
    model, attachment = attached()
    prompts, rows = prompts_for(attachment, kind), rows_for(kind)
    attachment.set(Prompts(tuple(prompts)))
    want = generated(model, attachment, rows, READS)
    for bad in range(len(SIZES)):
        attachment.set(Prompts(tuple(poisoned(prompts, bad))))
        got = generated(model, attachment, rows, READS)
        assert [row for row, read in zip(got, READS, strict=True) if read != bad] == [
            row for row, read in zip(want, READS, strict=True) if read != bad
        ]


def test_sampling_is_reproducible_and_each_answer_reads_its_rows_prompt():
    model, attachment = attached()
    prompts = prompts_for(attachment, "prefix")
    attachment.set(Prompts(tuple(prompts)))
    options = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}  # the likeliest token only
    got = generated(model, attachment, ROWS, READS, **options)
    assert got[0::2] == got[1::2] == generated(model, attachment, ROWS, READS)


# ---- how prompts are assigned


def test_a_batch_with_one_prompt_runs_as_with_a_single_prompt():
    _, attachment = attached()
    prompts = prompts_for(attachment, "prefix")
    attachment.set(prompts[1])
    with torch.no_grad():
        want = outputs(attachment, batch_of(attachment, "prefix", packed=True))
        attachment.set(Prompts(tuple(prompts)))
        got = outputs(attachment, batch_of(attachment, "prefix", reads=[1] * len(ROWS), packed=True))
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert all(slot.index is None for slot in attachment.slots)


def test_heads_without_prompts_are_members_too():
    _, attachment = attached()
    prefix = prompts_for(attachment, "prefix")[0]
    attachment.set(None)
    with torch.no_grad():
        plain = outputs(attachment, batch_of(attachment, "prefix"))
        attachment.set(Prompts((NoPrompt(), prefix)))
        got = outputs(attachment, batch_of(attachment, "prefix", reads=[0, 1, 0, 1, -1, 1]))
    near = [bool((one - other).abs().max() < CLOSE) for one, other in zip(got, plain, strict=True)]
    assert near == [True, False, True, False, True, False]


def test_padding_to_a_round_size_adds_a_sequence_with_a_prompt_that_is_read_already():
    _, attachment = attached()
    prompts = prompts_for(attachment, "front")
    batch = batch_of(attachment, "front", reads=READS, packed=True)
    longer, _ = pad_to_bucket(batch, 33)
    assert longer.members == (*READS, READS[-1])
    attachment.set(Prompts(tuple(prompts)))
    with torch.no_grad():
        want, got = outputs(attachment, batch), outputs(attachment, longer)
    assert len(got) == len(want) + 1
    assert all((one - other).abs().max() < CLOSE for one, other in zip(got, want, strict=False))


def test_several_prompts_need_an_assignment_that_fits():
    model, attachment = attached()
    prompts = prompts_for(attachment, "prefix")
    ids = torch.tensor([row[:5] for row in (ROWS[0], ROWS[1], ROWS[2], ROWS[5])])
    attachment.set(Prompts(tuple(prompts)))
    with pytest.raises(UserError, match="3 prompts, and nothing says which"):
        model(ids)
    with pytest.raises(UserError, match="there is no prompt 3"), attachment.reading([0, 3]):
        pass
    with pytest.raises(UserError, match="4 sequences, but prompts are assigned to 3"), attachment.reading([0, 1, 2]):
        model(ids)
    with pytest.raises(UserError, match="4 sequences, but prompts are assigned to 2"), attachment.reading([0, 1]):
        model(ids)
    with attachment.reading([0, 1, 2, -1]):
        assert torch.isfinite(model(ids).logits).all()
    with pytest.raises(UserError, match="of two kinds"):
        Prompts((prompts[0], *prompts_for(attachment, "front")))


def test_a_mark_of_another_prompt_is_refused():
    _, attachment = attached()
    attachment.set(Prompts(tuple(prompts_for(attachment, "marks"))))
    batch = batch_of(attachment, "marks", reads=(0, *READS[1:]))  # the first row has 7 marks, and prompt 0 has 3
    with pytest.raises(UserError, match="does not have"):
        Forward(attachment, torch.device("cpu"))(batch)


def test_a_backend_without_an_index_is_replaced_with_a_note(backend_for_one):
    assert "backend auto" in attached(backend=backend_for_one)[1].note_on_several
    for backend in ("auto", "merge", "joined", "reference"):
        assert attached(backend=backend)[1].note_on_several is None
