"""Templates: parsing, filling, and truncation that keeps all marks and literal text."""

from __future__ import annotations

import pytest
from datasets import Dataset
from families import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from ptd.config import DataConfig
from ptd.data import fill_prompts, marks_of, prompt_tokens, prompts_and_references, tokenize
from ptd.data.filling import fill
from ptd.data.templates import MASK_SLOT, Field, Mask, Text, Virtual, parse_template
from ptd.types import IGNORE_INDEX, UserError, virtual_id

BOS = 0


def spell(tokenizer, ids: list[int]) -> str:
    """Return token ids as text, with ‹i› for virtual token i and ‹_› for the mask."""
    marks = {MASK_SLOT: "‹_›"}
    return "".join(tokenizer.decode([token]) if token >= 0 else marks.get(token, f"‹{-1 - token}›") for token in ids)


def test_parts():
    template = parse_template("{v:2} {{{text}}} was{mask}. {v:1}{my col}")
    assert template.parts == (
        Virtual(0, 2),
        Text(" {"),
        Field("text"),
        Text("} was"),
        Mask(),
        Text(". "),
        Virtual(2, 1),
        Field("my col"),
    )
    assert template.pieces == (
        Virtual(0, 2),
        (Text(" {"), Field("text"), Text("} was")),
        Mask(),
        (Text("."),),
        Virtual(2, 1),
        (Field("my col"),),
    )
    assert (template.fields, template.virtual_tokens, template.masks) == (("text", "my col"), 3, 1)
    assert template.mask_context == ("} was", "")
    assert parse_template("{a} It was  {mask}").mask_context == (" It was", "  ")
    assert parse_template("{a}{mask}").mask_context == parse_template("{mask} {a}").mask_context == ("", "")
    assert parse_template("{a} {mask} b {c}").up_to_mask().parts == (Field("a"), Text(" "), Mask())


def test_the_spaces_in_front_of_a_mark_are_its_own():
    assert parse_template("{v:1} {mask} {v:1}").pieces == (
        Virtual(0, 1),
        (Text(""),),
        Mask(),
        (Text(""),),
        Virtual(1, 1),
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{text", "x.y: '{text' has an unpaired brace"),
        ("{v}", "x.y: '{v}' has {v}, which does not say how many virtual tokens stand there; write {v:n}"),
        ("{v:0}", "has {v:0}, which does not say how many"),
        ("{v:two}", "has {v:two}, which does not say how many"),
        ("{text:>3}", "x.y: {text:>3} cannot be used; write a plain {column} field"),
        ("{mask!r}", "{mask!r} cannot be used"),
    ],
)
def test_refused_templates(source, expected):
    with pytest.raises(UserError) as caught:
        parse_template(source, "x.y")
    assert expected in str(caught.value)


def test_marks_of():
    assert marks_of([]) == marks_of(["{a}", "b"]) == 0
    assert marks_of(["{v:2}{a}{v:3}", "{v:5} {a}"]) == 5
    with pytest.raises(UserError, match=r"task\.patterns: the number of virtual tokens differs: 2 in .* 0 in"):
        marks_of(["{v:2}{a}", "{a}"], "task.patterns")


def test_filled(make_bytes, make_words):
    tokenizer = make_bytes(bos=True)
    template = parse_template("{v:2}{a} or {b} is {mask}. {v:1}!")
    (ids,), cut = fill(template, [("x", "yz")], tokenizer, ([BOS], [1]))
    assert spell(tokenizer, ids) == "<s>‹0›‹1›x or yz is‹_›.‹2›!</s>"
    assert cut == 0
    assert [token for token in ids if token < 0 and token != MASK_SLOT] == [virtual_id(i) for i in range(3)]
    # The tokenizer receives the text between two marks as one string.
    words = make_words("ab")
    (ids,), _ = fill(parse_template("{v:1}{a}{b}{v:1}"), [("a", "b")], words, ([], []))
    assert ids == [-1, words.convert_tokens_to_ids("ab"), -2]


@pytest.mark.parametrize(
    ("values", "limit", "expected"),
    [
        (("abcdef", "xyz"), 99, "‹0›abcdef; xyz:‹_›."),
        (("abcdef", "xyz"), 13, "‹0›abcd; xyz:‹_›."),
        (("abcdef", "xyz"), 10, "‹0›ab; xy:‹_›."),
        (("abcdef", "xyz"), 11, "‹0›abc; xy:‹_›."),
        (("ab", "uvwxyz"), 9, "‹0›ab; u:‹_›."),
        (("", "uvwxyz"), 6, "‹0›; :‹_›."),
    ],
)
def test_the_longest_field_is_cut_first(make_bytes, values, limit, expected):
    tokenizer = make_bytes()
    template = parse_template("{v:1}{a}; {b}:{mask}.")
    (ids,), cut = fill(template, [values], tokenizer, ([], []), max_length=limit)
    assert spell(tokenizer, ids) == expected
    assert len(ids) <= limit
    assert cut == (limit < 99)


def test_a_width_of_the_mask_takes_its_room(make_bytes):
    template = parse_template("{a}{mask}")
    (ids,), _ = fill(template, [("abcdef",)], make_bytes(), ([], []), max_length=6, mask_width=4)
    assert len(ids) == 3


parts = st.sampled_from(["{a}", "{b}", "{a}", " lit ", "é;", "{v:2}", "{v:1}", " "])
texts = st.text(alphabet="ab é\n", max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(parts, max_size=6), st.integers(0, 6), texts, texts, st.integers(1, 40), st.booleans())
def test_marks_and_literal_text_survive_every_cut(pieces, place, a, b, limit, specials):
    tokenizer = tiny_tokenizer()
    source = "".join([*pieces[:place], "{mask}", *pieces[place:]])
    template = parse_template(source)
    values = [tuple({"a": a, "b": b}[name] for name in template.fields)]
    affixes = ([BOS], [1]) if specials else ([], [])
    (whole,), _ = fill(template, values, tokenizer, affixes)
    (empty,), _ = fill(template, [("",) * len(template.fields)], tokenizer, affixes)
    if len(empty) > limit:
        with pytest.raises(UserError, match=f"takes more than data.max_length \\({limit}\\) tokens without its fields"):
            fill(template, values, tokenizer, affixes, max_length=limit)
        return
    (ids,), cut = fill(template, values, tokenizer, affixes, max_length=limit)
    assert len(ids) == min(len(whole), limit)
    assert cut == (len(whole) > limit)
    assert [token for token in ids if token < 0] == [token for token in whole if token < 0]
    assert is_part(empty, ids)
    assert is_part(ids, whole)


def is_part(short: list[int], long: list[int]) -> bool:
    rest = iter(long)
    return all(token in rest for token in short)


def test_a_prompt_template_with_marks(make_bytes):
    tokenizer = make_bytes(bos=True)
    rows = Dataset.from_list([{"q": "abcdef", "completion": "xy"}])
    config = DataConfig(prompt_template="{v:2}Q: {q} {v:1}")
    examples = tokenize(rows, config, tokenizer, max_length=64, what="rows")
    tokens, labels = (array.tolist() for array in examples[0])
    assert spell(tokenizer, tokens) == "<s>‹0›‹1›Q: abcdef‹2›xy</s>"
    assert labels == [IGNORE_INDEX] * 12 + [*tokens[13:], IGNORE_INDEX]
    (prompt,), references = prompts_and_references(rows, config, tokenizer, 64)
    assert prompt == tokens[: len(prompt)]
    assert references == ["xy"]
    assert fill_prompts(tokenizer, config.prompt_template, ["abcdef"]) == [prompt]
    # The prompt is cut on the left, except for BOS and marks; a completion that fills the row loses its end.
    for limit, expected in ((10, "<s>‹0›‹1›def‹2›xy</s>"), (7, "<s>‹0›‹1›‹2›xy</s>"), (6, "<s>‹0›‹1›‹2›xy")):
        examples = tokenize(rows, config, tokenizer, max_length=limit, what="rows")
        assert spell(tokenizer, examples[0][0].tolist()) == expected
    (prompt,), _ = prompts_and_references(rows, config, tokenizer, 6)
    assert spell(tokenizer, prompt) == "<s>‹0›‹1›ef‹2›"
    with pytest.raises(UserError, match=r"has 3 virtual tokens, which with the special tokens use up data\.max_length"):
        tokenize(rows, config, tokenizer, max_length=4, what="rows")


def test_free_texts_fill_a_template_with_one_field(make_bytes):
    tokenizer = make_bytes(bos=True)

    def told(template: str | None) -> str:
        (ids,) = fill_prompts(tokenizer, template, ["x"])
        return spell(tokenizer, ids)

    assert fill_prompts(tokenizer, None, ["x", ""]) == prompt_tokens(tokenizer, ["x", ""])
    assert told("{q}: {q} ") == "<s>x: x "
    assert told("{q}{r}") == told("fixed") == "<s>x"
    for template, count in (("{v:1}{q}{r}", "2"), ("{v:3}", "no")):
        with pytest.raises(UserError, match=f"has {count} fields and virtual tokens"):
            told(template)


def test_a_mask_has_no_place_in_a_prompt_template(make_bytes):
    rows = Dataset.from_list([{"completion": "b"}])
    with pytest.raises(UserError, match=r"data\.prompt_template: \{mask\} has no meaning where text is generated"):
        tokenize(rows, DataConfig(prompt_template="{mask}"), make_bytes(), max_length=9, what="rows")


def test_a_space_without_offsets_of_its_own_is_cut_like_the_word_behind_it():
    """Truncation is exact although RoBERTa's tokenizer trims offsets, so a token of one space has an empty span."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    encoded = tokenizer("in the old town", add_special_tokens=False, return_offsets_mapping=True)
    assert any(begin == end for begin, end in encoded["offset_mapping"])
    template = parse_template("{text}")
    for length in range(1, len(encoded["input_ids"])):
        (ids,), cut = fill(template, [("in the old town",)], tokenizer, ([], []), max_length=length)
        assert (ids, cut) == (encoded["input_ids"][:length], 1)
