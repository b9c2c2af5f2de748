"""Common chat templates: the supervised tokens follow exactly the prompt of inference, and end where the turn ends."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from tokenizers import Tokenizer

from ptd.config import DataConfig, TaskConfig
from ptd.data import prompts_and_references, tokenize
from ptd.data.continuations import Reader
from ptd.data.typed import typed
from ptd.tasks import make_task
from ptd.types import IGNORE_INDEX, UserError

zoo = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("zoo.py"))))
FORMAT = DataConfig(format="messages")

GENERATION = "{% if add_generation_prompt %}<|bot|>{% endif %}"
TAGGED = "{% for m in messages %}{{ '<|bot|>' if m.role == 'assistant' else '<|user|>' }}{{ m.content }}END{% endfor %}"
TEMPLATES = {
    # A dedicated token, not EOS, ends a turn.
    "own-end": TAGGED.replace("END", "<|end|>") + GENERATION,
    # As in ChatML, line breaks follow the role and the end of a turn.
    "line-breaks": TAGGED.replace("END", "<|end|>\n").replace("}}{{ m.content", "}}\n{{ m.content")
    + "{% if add_generation_prompt %}<|bot|>\n{% endif %}",
    # Phi-3: EOS after the whole conversation.
    "phi": TAGGED.replace("END", "<|end|>\n") + "{% if add_generation_prompt %}<|bot|>{% else %}</s>{% endif %}",
    # Mistral, Llama-2: no generation prompt, a space before the answer, EOS and BOS between rounds.
    "inst": "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
    # The generation prompt ends in a space that byte-level tokenizers merge with the next word.
    "space": "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    # Gemma: the template trims the content, rejects the system role and gives the assistant's role another name.
    "gemma": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}<|user|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>model\n{% endif %}",
    # Qwen3: an empty thinking block before the last answer, none before earlier answers.
    "thinking": "{% for m in messages %}{% if m.role == 'assistant' %}<|bot|>{% if loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content.split('</think>')[-1] }}<|end|>{% else %}<|user|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}" + GENERATION,
    # Qwen3.5: the generation prompt opens a thinking block with a line break that merges with the one after it.
    "open-thought": "{% for m in messages %}{% if m.role == 'assistant' %}<|bot|>{% if loop.last %}<think>\n\n</think>"
    "\n\n{% endif %}{{ m.content }}<|end|>{% else %}<|user|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|><think>\n{% endif %}",
    # Llama-3: the template writes BOS and headers, and EOS does not end a turn.
    "headers": "{{ bos_token }}{% for m in messages %}<|user|>{{ m.role }}<|bot|>\n\n{{ m.content | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|user|>assistant<|bot|>\n\n{% endif %}",
}
THOUGHTS = {"thinking": "<think>\n\n</think>\n\n", "open-thought": "</think>\n\n"}
ROUNDS = [("is it?", "yes, é"), ("no?", "Hello, answer\nis no")]


def say(*contents: str, **last):
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    messages[-1] |= last
    return {"messages": messages}


TALKS = [say(*ROUNDS[0]), say(*ROUNDS[0], *ROUNDS[1])]


def make(name: str, template: str, **options):
    tokenizer = zoo.byte_level(**options) if options else zoo.ALL[name]()
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return tokenizer


def run(tokenizer, *rows, max_length=400):
    options = {"max_length": max_length, "what": "rows.jsonl"}
    return tokenize(Dataset.from_list(list(rows)), FORMAT, tokenizer, **options)


def refusal(tokenizer, *rows) -> str:
    with pytest.raises(UserError) as caught:
        run(tokenizer, *rows)
    return str(caught.value)


def spans(example):
    """Return ``(begin, end)``, as token positions, of each run of consecutive supervised tokens."""
    learned = [place + 1 for place, label in enumerate(example[1].tolist()) if label != IGNORE_INDEX]
    begins = [place for place in learned if place - 1 not in learned]
    return [(begin, next(end for end in range(begin, 10**6) if end not in learned)) for begin in begins]


def learned_texts(tokenizer, example):
    return [tokenizer.decode(example[0].tolist()[slice(*span)]) for span in spans(example)]


def asked(tokenizer, messages):
    """Return the prompt that inference sends, as transformers alone tokenises it."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize("name", zoo.ALL)
@pytest.mark.parametrize("template", TEMPLATES)
def test_each_learned_turn_stands_behind_what_inference_sends(name, template):
    tokenizer = make(name, template)
    examples = run(tokenizer, *TALKS)
    for talk, example in zip(TALKS, examples, strict=True):
        messages, tokens = talk["messages"], example[0].tolist()
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        found = spans(example)
        # An earlier turn is supervised only if inference would send the same prompt for it; the last turn always is.
        for (begin, end), index in zip(found[::-1], answers[::-1], strict=False):
            assert tokens[:begin] == asked(tokenizer, messages[:index])
            assert tokens[end - 1] in examples.report.ends
        assert len(found) <= len(answers)
        assert len(found) == len(answers) or "are not learned" in str(examples.report)
    prompts, references = prompts_and_references(Dataset.from_list(TALKS), FORMAT, tokenizer, 400)
    assert prompts == [asked(tokenizer, talk["messages"][:-1]) for talk in TALKS]
    assert typed(tokenizer, FORMAT, [ROUNDS[0][0]]) == prompts[:1]
    thought = THOUGHTS.get(template, "")
    assert [text.strip() for text in references] == [thought + answer for _, answer in (ROUNDS[0], ROUNDS[1])]


@pytest.mark.parametrize(
    ("template", "end"),
    [("own-end", "<|end|>"), ("line-breaks", "<|end|>"), ("phi", "<|end|>"), ("inst", "</s>"), ("space", "<|end|>")],
)
def test_a_turn_ends_with_the_token_that_closes_it(template, end):
    tokenizer = make("bytes", template)
    examples = run(tokenizer, *TALKS)
    assert examples.report.ends == (tokenizer.convert_tokens_to_ids(end),)
    space = " " * (template == "inst")
    expected = [f"{space}{answer}{space}{end}" for _, answer in ROUNDS]
    assert learned_texts(tokenizer, examples[0]) == expected[:1]
    # A token that spans the border and the first word, as " yes" does here, cannot be both prompt and target.
    assert learned_texts(tokenizer, examples[1]) == (expected[1:] if template == "space" else expected)
    task = make_task(TaskConfig(), FORMAT, "decoder")
    assert set(task.ends(tokenizer)) == {tokenizer.eos_token_id, *examples.report.ends}


def test_the_first_token_behind_a_space_is_learned():
    tokenizer = make("bytes", "space")
    (example,) = run(tokenizer, TALKS[0])
    begin, end = spans(example)[0]
    tokens = tokenizer.convert_ids_to_tokens(example[0].tolist())
    assert tokens[begin - 2 : begin + 1] == [":", "Ġ", "yes"], "joint they are ':', 'Ġyes'"
    assert end == len(tokens)


def test_what_a_template_writes_before_an_answer_is_learned_and_said():
    tokenizer = make("bytes", "thinking")
    examples = run(tokenizer, TALKS[1])
    assert learned_texts(tokenizer, examples[0]) == ["<think>\n\n</think>\n\nHello, answer\nis no<|end|>"]
    assert "begins answers with '<think>\\n\\n</think>\\n\\n', which the model has to write too" in str(examples.report)
    assert "1 earlier turns of the assistant are not learned" in str(examples.report)


@pytest.mark.parametrize("closing", ["\n", "<end>", ""])
def test_without_a_token_that_closes_a_turn_eos_is_learned(closing):
    template = TAGGED.replace("END", closing) + GENERATION
    tokenizer = make("bytes", template)
    examples = run(tokenizer, *TALKS)
    assert learned_texts(tokenizer, examples[0]) == [f"yes, é{closing}</s>"]
    assert learned_texts(tokenizer, examples[1]) == [f"yes, é{closing}", f"Hello, answer\nis no{closing}</s>"]
    assert "ends turns without a token of its own, so </s> is learned after them" in str(examples.report)
    assert examples.report.ends == (tokenizer.eos_token_id,)
    endless = make("bytes", template, eos_token=None)
    assert "and the tokenizer has no end-of-sequence token" in refusal(endless, *TALKS)


STRIPPING = [{"rstrip": True}, {"lstrip": True}, {"rstrip": True, "lstrip": True}, {"normalized": True}]


@pytest.mark.parametrize("how", [*STRIPPING, {"single_word": True}], ids=str)
@pytest.mark.parametrize("name", ["bytes", "legacy", "first"])
def test_added_tokens_that_swallow_blanks_or_are_no_tokens_there(name, how):
    """Prompts, targets and references agree if added tokens strip blanks or are ordinary text.

    Phi-3's added tokens strip the line break after them; a ``single_word`` token next to a letter is ordinary text.
    """
    for template in TEMPLATES:
        tokenizer = make(name, template)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            token.update(how if token["content"].startswith("<|") else {})
        tokenizer = type(tokenizer)(
            tokenizer_object=Tokenizer.from_str(json.dumps(state)), chat_template=tokenizer.chat_template,
            bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        )  # fmt: skip
        examples = run(tokenizer, *TALKS)
        prompts, references = prompts_and_references(Dataset.from_list(TALKS), FORMAT, tokenizer, 400)
        for talk, example, prompt, reference in zip(TALKS, examples, prompts, references, strict=True):
            begin, end = spans(example)[-1]
            tokens = example[0].tolist()
            assert tokens[:begin] == prompt == asked(tokenizer, talk["messages"][:-1])
            assert tokens[end - 1] in examples.report.ends
            # The supervised tokens before the end token decode to the reference that generated text is compared with.
            written = Reader(tokenizer).behind(prompt, tokens[begin : end - 1])
            assert written.strip() == reference.strip()
            assert talk["messages"][-1]["content"] in reference


def test_an_added_token_that_is_not_special_closes_a_turn_and_line_breaks_do_not():
    tokenizer = make("bytes", "own-end")
    tokenizer.add_tokens(["<stop>", "\n\n", "</b>"])
    tokenizer.chat_template = TAGGED.replace("END", "<stop>\n\n") + GENERATION
    examples = run(tokenizer, say("is it?", "<b>yes</b>"))
    assert learned_texts(tokenizer, examples[0]) == ["<b>yes</b><stop>"]
    assert examples.report.ends == (tokenizer.convert_tokens_to_ids("<stop>"),)


def test_messages_of_weight_zero_are_not_learned():
    tokenizer = make("bytes", "own-end")
    for unwanted in ({"weight": 0}, {"train": False}):
        talk = say(*ROUNDS[0], *ROUNDS[1])
        talk["messages"][1] |= unwanted
        assert learned_texts(tokenizer, run(tokenizer, talk)[0]) == ["Hello, answer\nis no<|end|>"]
        # The prompt asks for the last turn that is learned; no message after it is needed.
        talk = say(*ROUNDS[0], *ROUNDS[1], **unwanted)
        (example,) = run(tokenizer, talk)
        assert learned_texts(tokenizer, example) == ["yes, é<|end|>"]
        prompts, references = prompts_and_references(Dataset.from_list([talk]), FORMAT, tokenizer, 400)
        assert (prompts, references) == ([asked(tokenizer, talk["messages"][:1])], ["yes, é"])
        said = refusal(tokenizer, say(*ROUNDS[0], **unwanted))
        assert said.startswith("row 1 of rows.jsonl: all messages of the assistant have weight 0")
    assert run(tokenizer, say(*ROUNDS[0], weight=1)).report.supervised_tokens > 0
    assert "message 2 has the weight 0.5; set it to 0 (not learned) or 1" in refusal(
        tokenizer, say(*ROUNDS[0], weight=0.5)
    )
    assert "message 2 has train: 'no'; set it to true or false" in refusal(tokenizer, say(*ROUNDS[0], train="no"))


def test_keys_that_other_messages_have_are_not_there():
    """The template does not see keys that only other messages have.

    A dataset's columns give each message the keys of all messages, and templates test whether a key is defined.
    """
    asks = TAGGED.replace("{{ m.content }}", "{{ 'bad' if 'name' in m or m.weight is defined else m.content }}")
    tokenizer = make("bytes", asks.replace("END", "<|end|>") + GENERATION)
    talk = say(*ROUNDS[0], weight=1)
    talk["messages"][0] |= {"name": None}
    assert learned_texts(tokenizer, run(tokenizer, talk)[0]) == ["yes, é<|end|>"]


def test_a_tool_call_is_refused_by_its_name():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    talk = {"messages": [{"role": "user", "content": "u"}, call]}
    assert "the last message calls a tool (tool_calls) but has no text" in refusal(make("bytes", "own-end"), talk)


MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|bot|>{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}<|user|>{{ m.content }}<|end|>{% endif %}{% endfor %}" + GENERATION
)


def test_marks_of_a_template_have_the_same_checks():
    both = learned_texts(tokenizer := make("bytes", MARKED), run(tokenizer, TALKS[1])[0])
    assert both == ["yes, é<|end|>", "Hello, answer\nis no<|end|>"]
    # Marks that omit the end, or the text between generation prompt and answer, would teach only part of an answer.
    for part in (
        MARKED.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>"),
        MARKED.replace("<|bot|>{% generation %}", "<|bot|>#{% generation %}"),
    ):
        tokenizer = make("bytes", part)
        examples = run(tokenizer, TALKS[0])
        opening = "#" if "#" in part else ""
        assert learned_texts(tokenizer, examples[0]) == [f"{opening}yes, é<|end|>"]
        assert "in 1 rows the template's {% generation %} omits part" in str(examples.report)
    # If a template marks only the last answer, its marks are followed.
    last = MARKED.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.last %}").replace(
        "{% else %}<|user|>", "{% else %}{{ '<|bot|>' if m.role == 'assistant' else '<|user|>' }}"
    )
    tokenizer = make("bytes", last)
    assert learned_texts(tokenizer, run(tokenizer, TALKS[1])[0])[-1:] == ["Hello, answer\nis no<|end|>"]
    # A generation prompt that the conversation does not continue is refused, with or without marks.
    other = MARKED.replace(GENERATION, GENERATION.replace("<|bot|>", "<|bot|><think>"))
    assert "has '<think>' where the conversation has 'yes, é<|end|>'" in refusal(make("bytes", other), TALKS[0])


def test_a_system_message_that_all_rows_have_stands_before_what_is_typed():
    tokenizer = make("bytes", "own-end")
    system = {"role": "system", "content": "Be brief."}
    rows = [{"messages": [system, *talk["messages"]]} for talk in TALKS]
    task = make_task(TaskConfig(), FORMAT, "decoder").fit(Dataset.from_list(rows), "rows")
    assert task.facts()["system"] == "Be brief."
    assert task.prompts(["is it?"], tokenizer) == [asked(tokenizer, rows[0]["messages"][:2])]
    assert "after the system message 'Be brief.'; --raw sends the text" in task.how_typed(raw=False)
    assert task.prompts(["is it?"], tokenizer, raw=True) == [tokenizer("is it?")["input_ids"]]
    assert task.how_typed(raw=True) is None
    for others in ([rows[0], TALKS[0]], [rows[0], {"messages": [{**system, "content": "x"}, *TALKS[0]["messages"]]}]):
        task = make_task(TaskConfig(), FORMAT, "decoder").fit(Dataset.from_list(others), "rows")
        assert "system" not in task.facts()
        assert task.prompts(["is it?"], tokenizer) == [asked(tokenizer, TALKS[0]["messages"][:1])]
    given = make_task(TaskConfig(system=""), FORMAT, "decoder").fit(Dataset.from_list(rows), "rows")
    assert given.prompts(["is it?"], tokenizer) == [asked(tokenizer, TALKS[0]["messages"][:1])]


def test_a_template_that_refuses_what_is_typed_says_so():
    tokenizer = make("bytes", "gemma")
    with pytest.raises(UserError, match=r"the prompt: the tokenizer's chat template refuses .* no system role"):
        typed(tokenizer, FORMAT, ["is it?"], system="Be brief.")


def test_a_date_in_the_prompt_is_said():
    tokenizer = make("bytes", "{{ strftime_now('%d %b %Y') }}" + TEMPLATES["own-end"])
    assert "writes the current date, so prompts differ from day to day" in str(run(tokenizer, *TALKS).report)


def test_a_prompt_that_is_another_each_time_is_said():
    tokenizer = make("bytes", "{{ strftime_now('%f') }}" + TEMPLATES["own-end"])
    said = refusal(tokenizer, TALKS[0])
    assert "renders a prompt that is not the beginning of the finished conversation" in said


def test_thousands_of_conversations_keep_their_order():
    tokenizer = make("bytes", "own-end")
    examples = run(tokenizer, *(say(f"is {number}?", f"yes {number}") for number in range(1100)))
    assert learned_texts(tokenizer, examples[1099]) == ["yes 1099<|end|>"]
