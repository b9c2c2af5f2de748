"""Test what all methods have in common: the registry, their defaults, and the tasks that each method suits."""

from __future__ import annotations

import pytest
import torch
from families import DrawnConditioner

from ptd.config import parse_method
from ptd.methods import NoPromptEncoder, TaskFacts, method, methods
from ptd.methods.deep_prompts import PrefixEncoder, SeparatePrefixEncoder
from ptd.types import BackboneShape, HeadSettings, LayerShape, NoPrompt, UserError

TEXT = TaskFacts("causal_lm")
WORDS = TaskFacts("classification", ("bad", "good"), cloze=True)
HEAD = TaskFacts("classification", ("bad", "good"), trained_head=True)
TAGS = TaskFacts("token_classification", ("O", "B"), trained_head=True)
ANSWERS = TaskFacts("question_answering", trained_head=True)
SHAPE = BackboneShape("any", 8, 50, 64, (LayerShape(2, 4, 4),) * 3)
TWO_SIDED = BackboneShape("any", 8, 50, 64, (LayerShape(2, 4, 4, "encoder"), LayerShape(2, 4, 4, "cross")))


def check(name, facts, **settings):
    method(name).check(parse_method({"name": name, **settings}), facts)


def build(name, shape=SHAPE, facts=HEAD, **settings):
    return method(name).build(parse_method({"name": name, **settings}), shape, DrawnConditioner(shape), facts, seed=0)


def test_the_registry_lists_this_folder():
    assert methods().keys() >= {"prefix", "prompt", "p_tuning", "p_tuning_v2", "head", "hard_prompt"}


def test_every_methods_settings_have_defaults():
    assert {name: known.config() for name, known in methods().items()} == {
        name: parse_method({"name": name}) for name in methods()
    }


@pytest.mark.parametrize("facts", [TEXT, WORDS, HEAD, TAGS, ANSWERS], ids=lambda facts: facts.kind)
@pytest.mark.parametrize(
    ("name", "settings"),
    [("prefix", {}), ("prompt", {}), ("p_tuning", {"num_virtual_tokens": 3})],
    ids=lambda x: str(x),
)
def test_soft_prompts_suit_every_task(name, settings, facts):
    check(name, facts, **settings)


@pytest.mark.parametrize("facts", [HEAD, TAGS, ANSWERS], ids=lambda facts: facts.kind)
@pytest.mark.parametrize("name", ["head", "p_tuning_v2"])
def test_methods_made_of_a_head_suit_tasks_with_one(name, facts):
    check(name, facts)


@pytest.mark.parametrize(
    ("name", "facts", "message"),
    [
        ("head", TEXT, r"method\.name: head .* task\.kind causal_lm has none; set task\.kind: .*method\.name: prefix"),
        ("head", WORDS, r"method\.name: head .* remove task\.verbalizer .* or set method\.name: hard_prompt"),
        ("p_tuning_v2", TEXT, r"method\.name: p_tuning_v2 .* task\.kind causal_lm has none"),
        ("p_tuning_v2", WORDS, r"method\.name: p_tuning_v2 .* remove task\.verbalizer .* or set method\.name: prefix"),
        ("hard_prompt", TEXT, r"hard_prompt reads .* \(task\.kind causal_lm\) .*\{mask\}.*task\.verbalizer"),
        ("hard_prompt", HEAD, r"hard_prompt reads .*\{text\} It was \{mask\}"),
    ],
)
def test_a_task_that_does_not_suit_is_refused(name, facts, message):
    with pytest.raises(UserError, match=message):
        check(name, facts)


@pytest.mark.parametrize("name", ["prefix", "prompt", "p_tuning_v2", "head", "hard_prompt"])
def test_only_p_tuning_takes_marks(name):
    for facts in (WORDS, HEAD):
        marked = TaskFacts(facts.kind, facts.labels, facts.cloze, facts.trained_head, virtual_tokens=4)
        with pytest.raises(UserError, match=r"\{v:n\} .* set method\.name: p_tuning"):
            check(name, marked)


@pytest.mark.parametrize("name", ["head", "p_tuning_v2"])
def test_pooling_needs_one_vector_a_sequence(name):
    check(name, HEAD, pooling="mean")
    for facts in (TAGS, ANSWERS):
        with pytest.raises(UserError, match=rf"method\.pooling: has no effect with task\.kind {facts.kind}"):
            check(name, facts, pooling="mean")


@pytest.mark.parametrize(
    ("name", "settings", "want"),
    [
        ("head", {}, HeadSettings()),
        ("head", {"pooling": "mean", "hidden_sizes": [32, 16]}, HeadSettings("mean", (32, 16))),
        ("p_tuning_v2", {"pooling": "last"}, HeadSettings("last")),
        ("prefix", {}, HeadSettings()),
    ],
)
def test_the_head_a_method_asks_for(name, settings, want):
    assert method(name).head(parse_method({"name": name, **settings})) == want


@pytest.mark.parametrize(("name", "facts"), [("head", HEAD), ("hard_prompt", WORDS)])
def test_some_methods_put_nothing_beside_the_tokens(name, facts):
    encoder = build(name, facts=facts)
    assert isinstance(encoder, NoPromptEncoder)
    assert encoder.peft_type is None
    assert not list(encoder.parameters())
    assert isinstance(encoder.state(encoder()), NoPrompt)


def test_p_tuning_v2_has_prompts_at_every_layer():
    direct, projected = build("p_tuning_v2"), build("p_tuning_v2", prefix_projection=True, encoder_hidden_size=5)
    assert direct.layout == projected.layout
    assert direct.layout.layers == SHAPE.layers
    assert torch.equal(direct.network(), direct.embedding)
    assert projected().shape == direct().shape
    assert isinstance(projected, PrefixEncoder)
    assert projected.transform[0].weight.shape == (5, SHAPE.hidden_size)
    both = build("p_tuning_v2", TWO_SIDED, prefix_projection=True)
    assert isinstance(both, SeparatePrefixEncoder)
    assert both.parts.keys() == {"encoder", "cross"}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "head", "hidden_sizes": [8, 0]}, r"method\.hidden_sizes: got \[8, 0\]"),
        ({"name": "head", "pooling": "max"}, r"method\.pooling: got 'max'"),
        ({"name": "hard_prompt", "num_virtual_tokens": 1}, r"method\.num_virtual_tokens: unknown key"),
        ({"name": "p_tuning_v2", "num_virtual_tokens": 0}, r"method\.num_virtual_tokens: got 0"),
        ({"name": "p_tuning_v2", "encoder_hidden_size": 4}, r"no effect without method\.prefix_projection"),
        ({"name": "p_tuning_v2", "prefix_projection": True, "encoder_hidden_size": 0}, "encoder_hidden_size: got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(section, message):
    with pytest.raises(UserError, match=message):
        parse_method(section)
