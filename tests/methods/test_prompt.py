"""Compare the initial rows of method prompt, on real (tiny) backbones, with the backbone's own embedding layer."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import BOS, VOCAB, tiny_config, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import T5EncoderModel

from ptd.backbone import conditioning
from ptd.backbone.conditioning import AT_ONCE, FREQUENT, TextConditioner
from ptd.config import parse_method
from ptd.methods import TaskFacts, method
from ptd.methods.soft_prompts import EMBEDDINGS
from ptd.types import BackboneShape, DataReport, Examples, SoftLayout, UserError

P = 6
BACKBONES = {
    name: partial(tiny_model, name)
    for name in ("llama", "gpt2", "gemma3_text", "bert", "modernbert", "distilbert", "t5", "bart", "mbart")
}
BACKBONES["t5-encoder"] = lambda: T5EncoderModel(tiny_config("t5"))
SCALED = {"gemma3_text", "mbart"}


@cache
def backbone(name):
    return BACKBONES[name]().eval()


def bare(model, vocab_size=VOCAB):
    """Return the part of an attachment that the conditioner needs to read embeddings."""
    return SimpleNamespace(model=model, shape=BackboneShape("any", 32, vocab_size, 64, ()), bare=nullcontext)


def embedded(model, ids):
    with torch.no_grad():
        return model.get_input_embeddings()(torch.tensor(ids))


def bytes_of(text):
    return tiny_tokenizer()(text)["input_ids"]


def build(model, seed=0, tokenizer=True, labels=(), tokens=P, **settings):
    config = parse_method({"name": "prompt", "num_virtual_tokens": tokens, **settings})
    width = model.get_input_embeddings().embedding_dim
    shape = BackboneShape("any", 32, VOCAB, 64, (), width)
    conditioner = TextConditioner(bare(model), tiny_tokenizer() if tokenizer else None, seed=seed)
    facts = TaskFacts("classification", labels, trained_head=True)
    return method("prompt").build(config, shape, conditioner, facts, seed=seed)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_text_starts_as_the_backbone_embeds_it(name):
    model = backbone(name)
    encoder = build(model, init="text", init_text="Review")
    want = embedded(model, bytes_of("Review"))
    assert torch.equal(encoder().detach(), want)
    if name in SCALED:  # otherwise the test would not notice an unscaled table
        table = model.get_input_embeddings().weight[torch.tensor(bytes_of("Review"))]
        assert not torch.allclose(want, table, rtol=0.1)
    assert not model.get_input_embeddings()._forward_hooks


def test_a_text_is_cut_or_repeated_to_length():
    model = backbone("llama")
    assert torch.equal(build(model, init="text", init_text="abcdefgh")(), embedded(model, bytes_of("abcdef")))
    assert torch.equal(build(model, init="text", init_text="abcd")(), embedded(model, bytes_of("abcdab")))


def test_a_prompt_may_be_longer_than_the_context():
    model, tokens = tiny_model("bert", max_position_embeddings=8), 2 * AT_ONCE + 3
    encoder = build(model, init="text", init_text="abc", tokens=tokens)
    assert tokens > model.config.max_position_embeddings
    assert torch.equal(encoder(), embedded(model, (bytes_of("abc") * tokens)[:tokens]))


def test_the_text_may_come_from_a_file_and_holds_no_special_tokens(tmp_path):
    (tmp_path / "text").write_text("abcdef", encoding="utf-8")
    model = backbone("llama")
    assert torch.equal(
        build(model, init="text", init_text_file=str(tmp_path / "text"))(), embedded(model, bytes_of("abcdef"))
    )
    with_bos = tiny_tokenizer()
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    assert with_bos("a")["input_ids"] == [BOS, *bytes_of("a")]
    assert TextConditioner(bare(model), with_bos).token_ids("a") == bytes_of("a")


def test_random_is_normal_and_of_the_size_of_embeddings():
    model = backbone("gemma3_text")
    rows = build(model, tokenizer=False, init="random", tokens=400)()
    size = embedded(model, list(range(VOCAB))).square().mean().sqrt()
    assert abs(rows.mean()) < 0.02 * size
    assert abs(rows.std() / size - 1) < 0.1


def test_rows_are_the_tokens_of_training_rows_in_a_drawn_order():
    model = backbone("llama")
    texts = [[10, 11, 12], [20, 21], [30, -1, 31]]  # the virtual token among them is not text
    offsets = np.cumsum([0, *map(len, texts)])
    tokens = np.concatenate(texts).astype(np.int32)
    rows = Examples(tokens, tokens, offsets, DataReport(3, 8, 8))
    config = parse_method({"name": "prompt", "num_virtual_tokens": 7})
    starts = set()
    for seed in range(20):
        conditioner = TextConditioner(bare(model), None, rows, seed)
        shape = BackboneShape("any", 32, VOCAB, 64, (), 32)
        flat = method("prompt").build(config, shape, conditioner, seed=seed)().detach()
        table = embedded(model, list(range(VOCAB)))
        starts.add(tuple(int((table == row).all(1).nonzero()) for row in flat)[::-1])
    pieces = {12: [12, 11, 10], 21: [21, 20], 31: [31, 30]}  # read from the end, where rows are whole
    for start in starts:
        left = list(start)
        seen = []
        while left:
            piece = pieces[left[0]]
            assert left[: len(piece)] == piece
            seen.append(left[0])
            left = left[len(piece) :]
        assert sorted(seen) == [12, 21, 31]  # no row occurs twice before every row has occurred once
    assert len(starts) > 3


def test_rows_are_drawn_from_a_sample_if_there_are_many(monkeypatch):
    monkeypatch.setattr(conditioning, "DRAWN", 4)
    offsets = np.arange(31)
    tokens = np.arange(30, dtype=np.int32)
    conditioner = TextConditioner(
        bare(backbone("llama")), None, Examples(tokens, tokens, offsets, DataReport(30, 30, 30))
    )
    first, second = conditioner.rows(4)[0], conditioner.rows(4)[0]
    assert len({*first}) == len({*second}) == 4
    assert {*first} != {*second}  # the next sample is another one


def test_the_size_of_embeddings_is_measured_as_the_layer_puts_them_out():
    encoder = build(backbone("gemma3_text"), init="vocabulary", tokenizer=False)
    size = embedded(backbone("gemma3_text"), list(range(VOCAB))).square().mean().sqrt()
    assert torch.allclose(encoder.units.unit, EMBEDDINGS * size.expand(32), rtol=0.2)  # measured on a sample
    table = backbone("gemma3_text").get_input_embeddings().weight.square().mean().sqrt()
    assert size > 2 * table


def test_vocabulary_rows_are_different_tokens():
    model = backbone("gemma3_text")
    rows = build(model, tokenizer=False, init="vocabulary", tokens=VOCAB)().detach()
    table = embedded(model, list(range(VOCAB)))
    order = [int((table == row).all(1).nonzero()) for row in rows]
    assert sorted(order) == list(range(VOCAB))
    assert order != sorted(order)


def test_vocabulary_is_drawn_from_the_frequent_tokens():
    drawn = TextConditioner(bare(backbone("llama"), vocab_size=100_000), None).frequent(6000)
    assert sorted(drawn[:FREQUENT]) == list(range(FREQUENT))  # no id occurs twice before every id has occurred once
    assert max(drawn[FREQUENT:]) < FREQUENT


def test_labels_are_means_over_their_names_and_the_rest_is_vocabulary():
    model = backbone("llama")
    rows = build(model, init="labels", labels=("bad", "great"))().detach()
    for row, name in zip(rows, ("bad", "great"), strict=False):
        assert torch.allclose(row, embedded(model, bytes_of(name)).mean(0), atol=1e-7)
    table = embedded(model, list(range(VOCAB)))
    assert all((table == row).all(1).any() for row in rows[2:])
    assert rows[2:].unique(dim=0).shape[0] == P - 2
    only = build(model, init="labels", labels=("bad", "great"), tokens=2)().detach()
    assert torch.equal(only, rows[:2])


@pytest.mark.parametrize("init", ["rows", "random", "vocabulary", "labels"])
def test_a_seed_fixes_the_start(init):
    before = torch.get_rng_state()
    first, again, other = (build(backbone("t5"), seed, init=init, labels=("a", "b")) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first(), again())
    assert not torch.equal(first(), other())


def test_the_prompt_is_the_parameter_and_stands_in_front():
    encoder = build(backbone("llama"))
    assert encoder.layout == SoftLayout(32, in_front=True)
    assert encoder.network() is encoder.embedding
    assert encoder.embedding.requires_grad
    assert encoder.peft_type == "PROMPT_TUNING"
    encoder().sum().backward()
    assert torch.allclose(encoder.embedding.grad, encoder.units.unit.expand(P, 32))
    assert not encoder.rates()


def test_embeddings_are_fp32_whatever_the_backbone_is():
    model = tiny_model("llama").to(torch.bfloat16)
    rows = TextConditioner(bare(model), None).embeddings([5, 9])
    assert rows.dtype == torch.float32
    assert torch.equal(rows, embedded(model, [5, 9]).float())


def test_a_failing_forward_pass_leaves_no_hook():
    model = tiny_model("llama")
    with pytest.raises(IndexError):
        TextConditioner(bare(model), None).embeddings([VOCAB])
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "labels", "labels": ("a", "b"), "tokens": 1}, r"num_virtual_tokens=1 is fewer than .* 2 labels"),
        ({"init": "labels", "labels": ("a", "")}, r"the label '' has no tokens"),
        ({"init": "text", "init_text": ""}, r"method\.init_text: the text has no tokens"),
        ({"init": "text", "init_text": "a", "tokenizer": False}, "needs the backbone's tokenizer"),
        ({"init": "labels", "labels": ("a", "b"), "tokenizer": False}, "needs the backbone's tokenizer"),
        ({"init": "text", "init_text_file": "none.txt"}, r"method\.init_text_file: cannot read none\.txt"),
    ],
)
def test_a_start_that_is_not_there_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        build(backbone("llama"), **settings)


@pytest.mark.parametrize("init", ["random", "vocabulary"])
def test_the_width_is_that_of_the_input_embeddings(init):
    """OPT-350m projects narrow embeddings to its layers' size; the prompt is inserted before that projection."""
    model = tiny_model("opt", word_embed_proj_dim=16)
    assert build(model, init=init)().shape[1] == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": 0}, r"method\.num_virtual_tokens: got 0"),
        ({"init": "zero"}, r"method\.init: got 'zero'"),
        ({"init": "text"}, r"exactly one of method\.init_text and method\.init_text_file"),
        ({"init_text": "a"}, r"method\.init_text: is given, but method\.init is 'rows'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        parse_method({"name": "prompt", **settings})


def test_label_names_need_a_task_that_has_some():
    prompt = method("prompt")
    config = prompt.config(init="labels")
    prompt.check(config, TaskFacts("classification"))
    with pytest.raises(UserError, match=r"method\.init: labels needs label names, which task\.kind causal_lm"):
        prompt.check(config, TaskFacts("causal_lm"))
