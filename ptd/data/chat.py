"""Conversations -> token ids and which of them the assistant writes, by the tokenizer's chat template.

A template with ``{% generation %}`` says itself what the assistant writes. For the others a turn is what the rendering
gains between "everything before it, with the generation prompt" and "everything up to it", provided that both are the
beginning of the whole rendering. Templates that render a turn differently once it is history (Qwen3 drops the
reasoning) break that; then only the last turn is supervised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ptd.types import UserError
from ptd.values import is_blank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def chat_tokens(
    conversations: list[Any], tokenizer: PreTrainedTokenizerBase, places: list[str]
) -> Iterator[tuple[list[int], bytes, int]]:
    """For each conversation: token ids, supervision of the same length, and where the last assistant turn starts.

    Supervised are all assistant turns but one that opens the conversation. ``places`` names each in messages.
    Raises `UserError` for a malformed conversation, a tokenizer without template, or a template that cannot be used.
    """
    template = _template(tokenizer)
    for messages, place in zip(conversations, places, strict=True):
        _check(messages, place)
    mark = _marked_by_template if _GENERATION.search(template) else _marked_by_prefixes
    encoded = mark(conversations, tokenizer, places)
    for (ids, learned), place in zip(encoded, places, strict=True):
        if not learned.any():
            raise UserError(f"{place}: the chat template marks nothing as written by the assistant; nothing to learn")
        where = np.flatnonzero(learned)
        gaps = np.flatnonzero(np.diff(where) > 1)
        start = where[gaps[-1] + 1] if len(gaps) else where[0]
        yield ids, learned.tobytes(), int(start)


def chat_prompt(messages: Any, tokenizer: PreTrainedTokenizerBase, place: str) -> list[int]:
    """Token ids of everything before the last message, with the generation prompt."""
    _template(tokenizer)
    _check(messages, place)
    text = _render(messages[:-1], tokenizer, place, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"data.format: messages needs a chat template, but the tokenizer {tokenizer.name_or_path!r} has none; "
            "use an instruction-tuned backbone, add chat_template.jinja to its folder, or use prompt_completion"
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"data.format: messages needs a fast tokenizer (one with tokenizer.json), {tokenizer.name_or_path!r} is not"
        )
    template: str = tokenizer.get_chat_template()
    return template


def _check(messages: Any, place: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{place}: messages has to be a list of {{role, content}}, but is {repr(messages)[:60]}")
    for number, message in enumerate(messages, start=1):
        calls = isinstance(message, dict) and message.get("tool_calls")
        if calls and number == len(messages) and not isinstance(message.get("content"), str):
            raise UserError(
                f"{place}: the last message calls a tool (tool_calls) and says nothing, and what is learned is text "
                "alone; let the row end in the assistant's answer, or write the call into its content as text"
            )
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, dict) else None
            if not isinstance(value, str):
                raise UserError(
                    f"{place}: message {number} has to have a {key!r} that is text, but is {repr(message)[:80]}"
                )
    if messages[-1]["role"] != "assistant":
        raise UserError(
            f"{place}: the last message is of role {messages[-1]['role']!r}, but has to be the assistant's: "
            "it is what is learned"
        )
    if len(messages) == 1:
        raise UserError(f"{place}: there is no message before the assistant's; put at least a user message there")
    if is_blank(messages[-1]["content"]):
        raise UserError(f"{place} has an empty last message: there is nothing to learn; remove the row")


def _render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, place: str, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **{"tokenize": False, **options})
    except Exception as error:  # a template is a program that raises what it likes
        raise UserError(f"{place}: the tokenizer's chat template refuses the conversation: {error}") from error


def _marked_by_template(
    conversations: list[list[Message]], tokenizer: PreTrainedTokenizerBase, places: list[str]
) -> Iterator[tuple[list[int], np.ndarray]]:
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    for messages, place in zip(conversations, places, strict=True):
        encoded = _render(messages, tokenizer, place, **options, tokenizer_kwargs={"verbose": False})
        yield encoded["input_ids"], np.array(encoded["assistant_masks"], dtype=bool)


def _marked_by_prefixes(
    conversations: list[list[Message]], tokenizer: PreTrainedTokenizerBase, places: list[str]
) -> Iterator[tuple[list[int], np.ndarray]]:
    # Whatever the tokenizer holds to be special may end a turn; it need not be its EOS.
    closing = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    texts, turns = [], []
    for messages, place in zip(conversations, places, strict=True):
        text = _render(messages, tokenizer, place)
        texts.append(text)
        regions = _assistant_turns(messages, text, tokenizer, place)
        turns.append([_without_line_break(text, begin, end, closing) for begin, end in regions])
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for ids, spans, regions in zip(encoded["input_ids"], encoded["offset_mapping"], turns, strict=True):
        starts = np.array([start for start, _ in spans])
        learned = np.zeros(len(ids), dtype=bool)
        for begin, end in regions:
            learned |= (starts >= begin) & (starts < end)
        yield ids, learned


def _assistant_turns(
    messages: list[Message], text: str, tokenizer: PreTrainedTokenizerBase, place: str
) -> list[tuple[int, int]]:
    """Character ranges ``[begin, end)`` of ``text`` that the assistant writes, what ends its turn included."""

    def before(index: int) -> str:
        rendered: str = _render(messages[:index], tokenizer, place, add_generation_prompt=True)
        return rendered

    last = before(len(messages) - 1)
    if not text.startswith(last):
        raise UserError(
            f"{place}: the tokenizer's chat template renders the generation prompt in a way that the finished "
            "conversation does not continue, so where the assistant's text begins is unknown; "
            "use a template with {% generation %}"
        )
    regions = [(len(last), len(text))]
    for index, message in enumerate(messages[:-1]):
        if message["role"] == "assistant" and index > 0:
            prompt, turn = before(index), _render(messages[: index + 1], tokenizer, place)
            if not (text.startswith(turn) and turn.startswith(prompt)):
                regions = regions[:1]
                break
            regions.append((len(prompt), len(turn)))
    return regions


def _without_line_break(text: str, begin: int, end: int, closing: tuple[str, ...]) -> tuple[int, int]:
    """Generation stops at the end-of-turn token, so the line break that many templates put behind it is not learned."""
    written = text[begin:end].rstrip()
    return begin, begin + len(written) if written.endswith(closing) else end
