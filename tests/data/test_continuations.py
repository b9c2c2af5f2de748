"""With tokenizers of every kind, a completion is tokenised and decoded as the continuation of its prompt."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from ptd.config import DataConfig
from ptd.data import prompts_and_references, tokenize
from ptd.data.continuations import Reader, continuations, joins
from ptd.data.filling import affixed, encode
from ptd.data.typed import typed
from ptd.types import IGNORE_INDEX, UserError

zoo = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("zoo.py"))))
TOKENIZERS = {name: build() for name, build in zoo.ALL.items()}
PAIRS = [
    ("def f(", "x): 1"),
    ("Answer: ", "yes"),
    ("Answer:", " yes"),
    ("Answer:", "yes"),
    ("ab", "cd"),
    ("Hello ", "Hello"),
    ("ret", "urn is"),
    ("is 1", "2."),
    ("x  ", "y"),
    ("(", "is"),
    ("", "yes"),
    ("é", "ü"),
]


def run(tokenizer, rows, **config):
    options = {"max_length": 64, "what": "rows.jsonl"}
    return tokenize(Dataset.from_list(rows), DataConfig(**config), tokenizer, **options)


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def reads(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt_and_completion_read_as_the_two_joined(name):
    tokenizer = TOKENIZERS[name]
    before = encode(tokenizer, [prompt for prompt, _ in PAIRS])
    found = continuations(tokenizer, [prompt for prompt, _ in PAIRS], [text for _, text in PAIRS])
    for first, ids, (prompt, text) in zip(before, found, PAIRS, strict=True):
        # WordPiece decodes to single spaces between words, so the expected text is the decoded joined text.
        whole = reads(tokenizer, encode(tokenizer, [prompt + text])[0])
        assert reads(tokenizer, first + ids) == whole, (prompt, text)
        if name != "wordpiece":
            assert whole.removeprefix(" ") == prompt + text
            assert Reader(tokenizer).behind(first, ids).removeprefix("" if prompt else " ") == text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_training_generation_and_typed_prompts_agree(name):
    tokenizer = TOKENIZERS[name]
    rows = [pair(*each) for each in PAIRS if each[0]]
    examples = run(tokenizer, rows)
    prompts, references = prompts_and_references(Dataset.from_list(rows), DataConfig(), tokenizer, 64)
    assert prompts == typed(tokenizer, DataConfig(), [row["prompt"] for row in rows])
    assert references == [row["completion"] for row in rows]
    for (tokens, labels), prompt in zip(examples, prompts, strict=True):
        whole, learned = tokens.tolist(), labels[labels != IGNORE_INDEX].tolist()
        assert whole == prompt + learned
        assert learned[-1] == tokenizer.eos_token_id
    notes = [note for note in examples.report.notes if "the tokenizer cannot reproduce" not in note]
    assert notes == []
    assert bool(examples.report.notes) == (name == "wordpiece")
    assert examples.report.ends == (tokenizer.eos_token_id,)


@pytest.mark.parametrize("name", ["legacy", "first", "unigram-always", "unigram-first"])
def test_no_space_is_learned_that_the_text_does_not_have(name):
    tokenizer = TOKENIZERS[name]
    (example,) = run(tokenizer, [pair("def f(", "x): 1")])
    labels = example[1][example[1] != IGNORE_INDEX].tolist()
    assert tokenizer.convert_ids_to_tokens(labels) == ["x", ")", ":", "▁", "1", "</s>"]
    (example,) = run(tokenizer, [pair("def f(", " x): 1")])
    assert tokenizer.convert_ids_to_tokens(example[1][example[1] != IGNORE_INDEX].tolist())[:2] == ["▁", "x"]


def test_only_tokenizers_that_join_are_taken_to():
    joining = {name for name, tokenizer in TOKENIZERS.items() if joins(Reader(tokenizer))}
    assert joining == {"gemma", "unigram-never", "bytes", "python"}


texts = st.text(alphabet="aisno yes(é12.", min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(texts, texts)
def test_any_two_texts_join(first, second):
    for name in ("legacy", "first", "gemma", "unigram-never", "bytes", "python"):
        tokenizer = TOKENIZERS[name]
        (before,), (ids,) = encode(tokenizer, [first]), continuations(tokenizer, [first], [second])
        whole = reads(tokenizer, encode(tokenizer, [first + second])[0])
        assert reads(tokenizer, before + ids) == whole
        assert Reader(tokenizer).behind(before, ids) == second


def test_a_prompt_that_begins_with_bos_gets_no_second_one():
    for name in ("legacy", "gemma", "bytes", "unigram-always"):
        tokenizer = zoo.ALL[name]()
        with_bos, without = run(tokenizer, [pair("<s>no ", "yes"), pair("no ", "yes")])
        assert [int(token) for token in with_bos[0]].count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(with_bos[0].tolist()).replace(" ", "") == "<s>noyes</s>"
        assert without[0].tolist()[0] == tokenizer.bos_token_id
        for text in ("<s>no", "no"):
            assert typed(tokenizer, DataConfig(), [text])[0].count(tokenizer.bos_token_id) == 1
        # BOS is never a target, neither the one that the text starts with nor one in its middle.
        (example,) = run(tokenizer, [{"text": "<s>no</s><s>yes"}], format="text")
        assert example[0].tolist().count(tokenizer.bos_token_id) == 2
        assert tokenizer.bos_token_id not in example[1]
        assert example[1].tolist().count(tokenizer.eos_token_id) == 2
        (example,) = run(tokenizer, [pair("", "<s>yes")])
        assert example[0].tolist().count(tokenizer.bos_token_id) == 1


def test_a_token_that_begins_and_ends_texts_is_learned_as_the_end():
    tokenizer = zoo.byte_level(bos_token="</s>", bos=False)
    (example,) = run(tokenizer, [{"text": "no</s>yes"}], format="text")
    assert example[1].tolist().count(tokenizer.eos_token_id) == 2


def test_affixes_stand_once_around_virtual_tokens():
    assert affixed([1, 5, 6], [1]) == [1, 5, 6]
    assert affixed([-1, 1, 5], [1]) == [1, -1, 5]
    assert affixed([5, 2, -1], [1], [2]) == [1, 5, -1, 2]
    assert affixed([], [1], [2]) == [1, 2]
    assert affixed([2], [2], [2]) == [2, 2]


def test_what_a_tokenizer_writes_differently_is_said():
    lower = zoo.byte_level(normalizer=normalizers.Lowercase())
    report = run(lower, [pair("no ", "Hello"), pair("no ", "yes")]).report
    assert report.notes == (
        "the tokenizer cannot reproduce 1 of the first 2 completions, so generated text cannot match them exactly "
        "(row 1: 'Hello' becomes 'hello')",
    )
    report = run(TOKENIZERS["unigram-always"], [pair("no", " yes\nno")]).report
    assert "(row 1: 'yes\\nno' becomes 'yesno')" in str(report), "its unknown token is special and left out"
    report = run(TOKENIZERS["bytes"], [pair("no ", "yes</s>no"), pair("no ", "yes</s>")]).report
    assert report.notes == (
        "1 of the first 2 completions contain </s> before their end, where generation stops (row 1: 'yes</s>no')",
    )


def test_refuses_texts_of_which_the_tokenizer_knows_nothing():
    with pytest.raises(UserError, match=r"rows\.jsonl: the tokenizer .* knows none of the text to be learned"):
        run(TOKENIZERS["unigram-never"], [pair("no ", "東京"), pair("no ", "京都")])


def test_special_tokens_are_no_part_of_a_reference():
    tokenizer = TOKENIZERS["bytes"]
    assert Reader(tokenizer).plain("<s>yes</s> <|end|>") == "yes "
    _, references = prompts_and_references(Dataset.from_list([pair("a", "yes</s>")]), DataConfig(), tokenizer, 9)
    assert references == ["yes"]


def test_the_space_before_a_continuation_is_kept_and_none_is_invented():
    for name in ("legacy", "first", "unigram-always"):
        tokenizer = TOKENIZERS[name]
        (prompt,) = encode(tokenizer, ["Answer:"])
        (spaced,) = encode(tokenizer, ["yes"])  # tokenised on its own: with ▁
        (bare,) = continuations(tokenizer, ["Answer:"], ["yes"])
        assert tokenizer.decode(spaced) == tokenizer.decode(bare) == "yes", "alone they read alike"
        assert Reader(tokenizer).behind(prompt, spaced) == " yes"
        assert Reader(tokenizer).behind(prompt, bare) == "yes"
        special = encode(tokenizer, ["Answer<|bot|>"])[0]
        assert Reader(tokenizer).behind(special, spaced) == "yes"
        assert Reader(tokenizer).behind([*prompt, -1], spaced) == "yes"
