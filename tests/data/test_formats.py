"""`tokenize` and `prompts_and_references`: token ids, supervision, truncation, and every refusal."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from ptd.config import DataConfig
from ptd.data import prompts_and_references, tokenize
from ptd.data.formats import _fit
from ptd.types import IGNORE_INDEX, UserError

BOS, EOS = 0, 1


def run(tokenizer, rows: list[dict], *, max_length: int = 64, **config):
    return tokenize(Dataset.from_list(rows), DataConfig(**config), tokenizer, max_length=max_length, what="rows.jsonl")


def refusal(tokenizer, rows: list[dict], call=run, **config) -> str:
    with pytest.raises(UserError) as caught:
        call(tokenizer, rows, **config)
    return str(caught.value)


def learned(tokenizer, example) -> str:
    """Return the text of the supervised tokens."""
    _, labels = example
    return tokenizer.decode(labels[labels != IGNORE_INDEX].tolist())


def whole(tokenizer, example) -> str:
    return tokenizer.decode(example[0].tolist())


def pair(prompt, completion) -> dict:
    return {"prompt": prompt, "completion": completion}


def test_prompt_and_completion(make_bytes):
    tokenizer = make_bytes(bos=True)
    examples = run(tokenizer, [pair("ab ", "cd"), pair("", "é")])
    assert [whole(tokenizer, example) for example in examples] == ["<s>ab cd</s>", "<s>é</s>"]
    assert [learned(tokenizer, example) for example in examples] == ["cd</s>", "é</s>"]
    assert (examples.tokens.dtype, examples.labels.dtype, examples.offsets.dtype) == (np.int32, np.int32, np.int64)
    for tokens, labels in examples:
        follows = np.append(tokens[1:], IGNORE_INDEX)
        assert (labels[labels != IGNORE_INDEX] == follows[labels != IGNORE_INDEX]).all()
    assert examples.offsets.tolist() == [0, 7, 11]
    assert examples.lengths().tolist() == [7, 4]
    assert len(examples) == 2
    assert str(examples.report) == "2 rows, 11 tokens, 6 of them supervised"


def test_the_two_are_tokenised_apart(make_words):
    tokenizer = make_words("x1 x2 x1x2")
    (example,) = run(tokenizer, [pair("x1", "x2")])
    assert example[0].tolist() == [BOS, *tokenizer.convert_tokens_to_ids(["x1", "x2"]), EOS]


def test_no_end_token_stands_behind_the_prompt(make_bytes):
    for tokenizer in (make_bytes(bos=True, appended_eos=True), make_bytes(appended_eos=True)):
        examples = run(tokenizer, [pair("ab", "c"), pair("ab</s>", "c</s>")])
        head = "<s>" if tokenizer("")["input_ids"][0] == BOS else ""
        # EOS in the row's own text stays, and a completion that ends in EOS gets no second one.
        assert [whole(tokenizer, example) for example in examples] == [f"{head}abc</s>", f"{head}ab</s>c</s>"]
        prompts, _ = prompts_and_references(Dataset.from_list([pair("ab", "c")]), DataConfig(), tokenizer, 9)
        assert tokenizer.decode(prompts[0]) == f"{head}ab"


def test_special_tokens_of_a_tokenizer_that_drops_the_letter_a():
    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "x": 2}, merges=[]))
    specials = [("<s>", 0), ("</s>", 1)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    (example,) = run(tokenizer, [pair("x", "x")])
    assert example[0].tolist() == [BOS, 2, 2, EOS]


def test_without_prompt_and_bos_the_first_token_is_context(make_bytes):
    tokenizer = make_bytes()
    (example,) = run(tokenizer, [pair("", "abc")])
    assert whole(tokenizer, example) == "abc</s>"
    assert learned(tokenizer, example) == "bc</s>"


def test_text(make_bytes):
    for bos, first in ((True, "<s>"), (False, "")):
        tokenizer = make_bytes(bos=bos)
        examples = run(
            tokenizer, [{"body": "abc"}, {"body": "abcdefgh"}], format="text", columns={"text": "body"}, max_length=6
        )
        cut = "abcdefgh"[: 6 - bos]
        assert [whole(tokenizer, example) for example in examples] == [f"{first}abc</s>", f"{first}{cut}"]
        assert [learned(tokenizer, example) for example in examples] == ["abc</s>", cut] if bos else ["bc</s>", cut[1:]]
        assert (examples.report.prompts_cut, examples.report.completions_cut) == (0, 1)


def test_columns_and_template(make_bytes):
    tokenizer = make_bytes()
    rows = [{"q": "one", "n": 2, "my col": "z", "a": "yes"}]
    (example,) = run(tokenizer, rows, columns={"prompt": "q", "completion": "a"})
    assert whole(tokenizer, example) == "oneyes</s>"
    template = "Q: {q} {{{n}}} {my col}\nA:"
    (example,) = run(tokenizer, rows, columns={"completion": "a"}, prompt_template=template)
    assert whole(tokenizer, example) == "Q: one {2} z\nA:yes</s>"
    assert learned(tokenizer, example) == "yes</s>"
    (example,) = run(tokenizer, rows, columns={"completion": "a"}, prompt_template="fixed:")
    assert whole(tokenizer, example) == "fixed:yes</s>"
    # {prompt} is the prompt's column, even if there is another column of that name.
    columns = {"prompt": "q", "completion": "a"}
    (example,) = run(tokenizer, [{**rows[0], "prompt": "no"}], columns=columns, prompt_template="{prompt} {n}: ")
    assert whole(tokenizer, example) == "one 2: yes</s>"


def test_cuts(make_bytes):
    tokenizer = make_bytes(bos=True)
    rows = [pair("abcdefgh", "xy"), pair("abc", "stuvwxyz"), pair("abcd", "uvwxy"), pair("ab", "xy")]
    examples = run(tokenizer, rows, max_length=7)
    assert [whole(tokenizer, e) for e in examples] == ["<s>fghxy</s>", "<s>stuvwx", "<s>uvwxy</s>", "<s>abxy</s>"]
    assert [learned(tokenizer, e) for e in examples] == ["xy</s>", "stuvwx", "uvwxy</s>", "xy</s>"]
    assert (examples.report.prompts_cut, examples.report.completions_cut) == (3, 1)
    said = "3 prompts truncated to the maximum length; 1 completions truncated to the maximum length"
    assert str(examples.report).endswith(said)
    plain = make_bytes()
    (example,) = run(plain, [pair("abc", "stuvwxyz")], max_length=4)
    assert whole(plain, example) == "cstu"
    assert learned(plain, example) == "stu"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 12), st.integers(0, 3), st.integers(1, 12), st.integers(2, 16))
def test_fit(prompt, leading, completion, max_length):
    leading = min(leading, prompt)
    ids = list(range(prompt + completion))
    mask = bytes(prompt) + b"\1" * completion
    cut, cut_mask, prompt_cut, completion_cut = _fit(ids, mask, prompt, leading, max_length)
    assert len(cut) == len(cut_mask) == min(len(ids), max_length)
    assert sorted(set(cut)) == cut
    assert [mask[i] for i in cut] == list(cut_mask)
    kept_prompt, kept_completion = [i for i in cut if i < prompt], [i for i in cut if i >= prompt]
    assert kept_completion == list(range(prompt, prompt + len(kept_completion)))
    assert completion_cut == (len(kept_completion) < completion)
    assert prompt_cut == (len(kept_prompt) < prompt)
    assert kept_prompt[:leading] == list(range(min(leading, max_length - 1)))
    assert kept_prompt[leading:] == list(range(prompt - len(kept_prompt[leading:]), prompt))
    assert bool(kept_prompt) == bool(prompt)
    if completion_cut:
        assert len(kept_prompt) == min(max(leading, 1), prompt, max_length - 1)


def test_many_rows_keep_their_order(make_bytes):
    tokenizer = make_bytes(bos=True)
    rows = [pair(f"{number} ", f"is {number}") for number in range(2500)]
    examples = run(tokenizer, rows)
    assert all(whole(tokenizer, examples[i]) == f"<s>{i} is {i}</s>" for i in (0, 999, 1000, 1999, 2499))
    assert whole(tokenizer, examples[-1]) == "<s>2499 is 2499</s>"
    with pytest.raises(IndexError):
        examples[2500]
    rows[1700]["completion"] = ""
    assert "row 1701 of rows.jsonl has an empty 'completion'" in refusal(tokenizer, rows)


def test_prompts_and_references(make_bytes):
    tokenizer = make_bytes(bos=True)
    rows = Dataset.from_list([pair("abcdefgh", "xy"), pair("", "z")])
    config = DataConfig()
    prompts, references = prompts_and_references(rows, config, tokenizer, 5)
    assert [tokenizer.decode(prompt) for prompt in prompts] == ["<s>efgh", "<s>"]
    assert references == ["xy", "z"]
    prompts, _ = prompts_and_references(rows, config, tokenizer, 64)
    examples = tokenize(rows, config, tokenizer, max_length=64, what="rows")
    for prompt, (tokens, labels) in zip(prompts, examples, strict=True):
        assert prompt == tokens[: np.flatnonzero(labels != IGNORE_INDEX)[0] + 1].tolist()
    with pytest.raises(UserError, match=r"row 2 of data\.eval has a prompt without tokens"):
        prompts_and_references(rows, config, make_bytes(), 5)
    with pytest.raises(UserError, match="text has no prompts"):
        prompts_and_references(rows, DataConfig(format="text"), tokenizer, 5)


@pytest.mark.parametrize(
    ("rows", "config", "expected"),
    [
        ([{"prompt": "a"}], {}, "rows.jsonl has no column 'completion'; it has prompt."),
        ([{"p": "a", "completion": "b"}], {}, "data.columns: {prompt: p}"),
        ([pair("a", "b"), pair("a", None)], {}, "row 2 of rows.jsonl has no 'completion'"),
        ([pair("a", "b"), pair(None, "b")], {}, "row 2 of rows.jsonl has no 'prompt'"),
        ([pair("a", "b"), pair("a", "")], {}, "row 2 of rows.jsonl has an empty 'completion'"),
        ([pair("a", 3)], {}, "row 1 of rows.jsonl: 'completion' has to be text, but is int (3)"),
        ([{"text": ""}], {"format": "text"}, "row 1 of rows.jsonl has an empty 'text'"),
        ([pair("a", "b")], {"prompt_template": "{q}"}, "{q} is not a column of rows.jsonl; it has prompt, completion"),
        ([pair("a", "b")], {"prompt_template": "{}"}, "{} is not a column"),
        ([pair("a", "b")], {"prompt_template": "{prompt!r}"}, "write a plain {column} field"),
        ([pair("a", "b")], {"prompt_template": "{prompt"}, "unpaired brace"),
        (
            [{"q": "a", "completion": "b"}, {"q": None, "completion": "b"}],
            {"prompt_template": "{q}"},
            "row 2 of rows.jsonl: 'q', which data.prompt_template uses, is missing",
        ),
        (
            [{"q": ["a"], "completion": "b"}],
            {"prompt_template": "{q}"},
            "row 1 of rows.jsonl: 'q', which data.prompt_template uses, is list, but has to be text or a number",
        ),
        (
            [pair("a", "b")],
            {"prompt_template": "{completion}", "columns": {"prompt": "prompt"}},
            "data.columns.prompt: has no effect, because data.prompt_template has no field {prompt}",
        ),
        (
            [pair("a", "b")],
            {"prompt_template": "{prompt}", "columns": {"prompt": "q"}},
            "data.prompt_template: 'q' is not a column of rows.jsonl; it has prompt, completion",
        ),
        (
            [{"q": "a", "completion": "b"}],
            {"prompt_template": "{prompt}: "},
            "or give data.columns: {prompt: COLUMN}.",
        ),
    ],
)
def test_refusals(make_bytes, rows, config, expected):
    assert expected in refusal(make_bytes(bos=True), rows, **config)


def test_refuses_a_tokenizer_without_end_token(make_bytes):
    for config in ({}, {"format": "text"}):
        assert "has no end-of-sequence token" in refusal(
            make_bytes(eos=False), [{**pair("a", "b"), "text": "c"}], **config
        )


def test_refuses_a_completion_without_tokens(make_words):
    tokenizer = make_words("x")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    assert "row 1 of rows.jsonl: the completion has no tokens" in refusal(tokenizer, [pair("x", "~")])
