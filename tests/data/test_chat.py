"""Format messages: the assistant's turns are supervised, with three kinds of chat template."""

from __future__ import annotations

import pytest
from datasets import Dataset

from ptd.config import DataConfig
from ptd.data import prompts_and_references, tokenize
from ptd.types import IGNORE_INDEX, UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{%- generation -%}{{ m.content }}<|im_end|>{%- endgeneration -%}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Earlier assistant turns lose the text before "|", as the templates of reasoning models drop earlier reasoning.
FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('|')[-1] }}")


def say(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


TALK = say(("system", "S"), ("user", "u1"), ("assistant", "t|a1"), ("user", "u2"), ("assistant", "a2"))
FORMAT = DataConfig(format="messages")


@pytest.fixture
def chat(make_bytes):
    def make(template, **options):
        tokenizer = make_bytes(**options)
        tokenizer.chat_template = template
        return tokenizer

    return make


def run(tokenizer, *rows: dict, max_length: int = 200):
    return tokenize(Dataset.from_list(list(rows)), FORMAT, tokenizer, max_length=max_length, what="rows.jsonl")


def refusal(tokenizer, *rows: dict) -> str:
    with pytest.raises(UserError) as caught:
        run(tokenizer, *rows)
    return str(caught.value)


def spans(tokenizer, example) -> list[str]:
    """Return the text of each run of consecutive supervised tokens."""
    _, labels = example
    runs: list[list[int]] = [[]]
    for label in labels.tolist():
        if label != IGNORE_INDEX:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_all_assistant_turns_are_supervised_with_their_end_token(chat, template):
    tokenizer = chat(template, bos=True)
    (example,) = run(tokenizer, TALK)
    assert spans(tokenizer, example) == ["t|a1<|im_end|>", "a2<|im_end|>"]
    text = tokenizer.apply_chat_template(TALK["messages"], tokenize=False)
    assert tokenizer.decode(example[0].tolist()) == text  # one BOS if the template writes it, otherwise none


def test_a_template_that_rewrites_the_past_supervises_the_last_turn(chat):
    tokenizer = chat(FORGETFUL)
    first, second = run(tokenizer, TALK, say(("user", "u"), ("assistant", "t|a")))
    assert spans(tokenizer, first) == ["a2<|im_end|>"]
    assert spans(tokenizer, second) == ["t|a<|im_end|>"]


def test_an_opening_assistant_turn_is_context(chat):
    tokenizer = chat(CHATML)
    (example,) = run(tokenizer, say(("assistant", "hi"), ("user", "u"), ("assistant", "é")))
    assert spans(tokenizer, example) == ["é<|im_end|>"]


def test_cuts_keep_the_last_turn_and_a_bos(chat):
    tokenizer = chat(MARKED)
    size = len(run(tokenizer, TALK)[0][0])
    examples = run(tokenizer, TALK, max_length=size - 3)
    text = tokenizer.decode(examples[0][0].tolist())
    assert text.startswith("<s>stem\nS<|im_end|>")
    assert text.endswith("a2<|im_end|>")
    assert (examples.report.prompts_cut, examples.report.completions_cut) == (1, 0)
    examples = run(tokenizer, TALK, max_length=3)
    assert tokenizer.decode(examples[0][0].tolist()) == "<s>a2"
    assert (examples.report.prompts_cut, examples.report.completions_cut) == (1, 1)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_prompts_are_those_of_training(chat, template):
    tokenizer = chat(template, bos=True)
    rows = Dataset.from_list([TALK])
    prompts, references = prompts_and_references(rows, FORMAT, tokenizer, 200)
    tokens = run(tokenizer, TALK)[0][0].tolist()
    assert references == ["a2"]
    assert tokens[: len(prompts[0])] == prompts[0]
    assert tokenizer.decode(tokens[len(prompts[0]) :]).strip() == "a2<|im_end|>"
    cut, _ = prompts_and_references(rows, FORMAT, tokenizer, 5)
    assert cut[0] == ([0] if template is MARKED else []) + prompts[0][-4 if template is MARKED else -5 :]


def test_no_end_token_is_needed(chat):
    tokenizer = chat(CHATML, eos=False)
    assert spans(tokenizer, run(tokenizer, TALK)[0])[-1] == "a2<|im_end|>"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (say(("user", "u")), "the last message has the role 'user', but the model learns to write the last message"),
        (say(("assistant", "a")), "there is no message before the assistant's"),
        (say(("user", "u"), ("assistant", "")), "has an empty last message"),
        (say(("user", "u"), ("assistant", " \n")), "has an empty last message"),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": None, "tool_calls": [1]}]},
            "the last message calls a tool (tool_calls) but has no text",
        ),
        ({"messages": []}, "messages has to be a list of {role, content}, but is []"),
        ({"messages": "hello"}, "messages has to be a list of {role, content}, but is 'hello'"),
        ({"messages": ["hello"]}, "message 1 has to have a 'role' that is text, but is 'hello'"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 has to have a 'content' that is text"),
        ({"messages": [{"role": "user"}]}, "message 1 has to have a 'content' that is text"),
        ({"messages": None}, "row 1 of rows.jsonl has no 'messages'"),
    ],
)
def test_refuses_malformed_conversations(chat, row, expected):
    message = refusal(chat(CHATML), row)
    assert message.startswith("row 1 of rows.jsonl")
    assert expected in message


def test_refuses_templates_that_cannot_be_used(chat):
    talk = say(("user", "u"), ("assistant", "a"))
    assert "has none; use an instruction-tuned backbone" in refusal(chat(None), talk)
    picky = "{{ raise_exception('no system role') }}"
    assert "chat template refuses the conversation: no system role" in refusal(chat(picky), talk)
    other = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    assert "has '<think>\\n' where the conversation has 'a<|im_end|>\\n'" in refusal(chat(other), talk)
    blind = "{{ messages[0].content }}{% if false %}{% generation %}x{% endgeneration %}{% endif %}"
    assert "marks none of the last answer as written by the assistant" in refusal(chat(blind), talk)
    with pytest.raises(UserError, match="chat template, but the tokenizer"):
        prompts_and_references(Dataset.from_list([talk]), FORMAT, chat(None), 9)
