"""Render conversations with the tokenizer's chat template, and find the assistant turns that are supervised.

Inference sends all messages before a turn, rendered with the generation prompt. The turn is what follows this text when
all messages up to the turn are rendered. Its supervised part ends with the token that the template writes after an
answer; what follows that token (a line break, or the end of the whole text) is not learned, because generation stops
there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ptd.data.continuations import Reader
from ptd.types import UserError
from ptd.values import is_blank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE = "ptd 7 probe"
"""An answer that is certain to be found in a rendered conversation."""


@dataclass(frozen=True)
class Turn:
    """One answer of the assistant.

    ``before``: the text that inference sends; ``written``: the rendered text after it. The first ``answer`` characters
    of ``written`` are the answer; the first ``learned`` characters also contain ``end``, the added token that closes
    the answer (None: the turn closes with ordinary text, all of which is supervised, or with nothing).
    """

    before: str
    written: str
    answer: int
    learned: int
    end: str | None


@dataclass(frozen=True)
class Talk:
    """The supervised turns of a conversation; its text ends with the last of them.

    ``left``: number of turns that are not supervised because the template renders them differently once others follow.
    ``opening``: what the template writes between the generation prompt and an answer; the model has to write it too.
    ``unmarked``: the template's ``{% generation %}`` omits part of the last turn, which is supervised all the same.
    """

    turns: tuple[Turn, ...]
    left: int
    opening: str
    unmarked: bool


class Chat:
    """Renders conversations with a tokenizer's chat template. Raises `UserError` if the tokenizer has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"data.format: messages needs a chat template, but the tokenizer {tokenizer.name_or_path!r} has none; "
                "use an instruction-tuned backbone, add chat_template.jinja to its folder, or use prompt_completion"
            )
        self.tokenizer, self.reader = tokenizer, Reader(tokenizer)
        try:
            self.template = str(tokenizer.get_chat_template())
        except ValueError as error:  # several templates, none of which is the default
            raise UserError(f"data.format: messages: {error}") from error
        self._frames: dict[tuple[str, ...], tuple[str, str]] = {}

    @cached_property
    def dated(self) -> bool:
        """Whether the template writes the day on which it is rendered."""
        return "strftime_now" in self.template

    def prompt(self, messages: Sequence[Message], place: str) -> str:
        """Return what inference sends: ``messages``, rendered with the generation prompt. Raises `UserError`."""
        return str(self._render(messages, place, add_generation_prompt=True))

    def talk(self, messages: Any, place: str) -> Talk:
        """Return the supervised turns; ``place`` names the conversation in messages ("row 3 of train.jsonl").

        Every assistant turn is supervised, except an opening one and those with ``weight: 0`` or ``train: false``.
        Raises `UserError` for a conversation without anything to learn, or a template that cannot be used.
        """
        learned = _learned(messages, place)
        messages = [_plain(message) for message in messages[: learned[-1] + 1]]
        text = str(self._render(messages, place))
        marks = self._marks(messages, place)
        last = self._turn(messages, text, place)
        span = (len(last.before), len(last.before) + last.learned)
        if not last.written.strip() or (marks is not None and not _overlaps(marks, span)):
            raise UserError(
                f"{place}: the chat template marks none of the last answer as written by the assistant, so "
                "there is nothing to learn; correct the template or remove the row"
            )
        turns, left = [], 0
        for index in learned[:-1]:
            earlier = messages[: index + 1]
            try:
                turn = self._turn(earlier, str(self._render(earlier, place)), place)
            except UserError:  # inference cannot render its prompt either
                turn = None
            if turn is None or not text.startswith(turn.before + turn.written[: turn.learned]):
                left += 1
            elif marks is None or _overlaps(marks, (len(turn.before), len(turn.before) + turn.learned)):
                turns.append(turn)
        opening = self._framed(messages[:-1], place)[0]
        return Talk((*turns, last), left, opening, marks is not None and not _covers(marks, span, text))

    def end(self) -> str | None:
        """Return the added token that closes the answer to a question; None if there is none or the template fails."""
        question = [{"role": "user", "content": "a"}]
        try:
            closing = self._framed(question, "the chat template")[1]
        except UserError:
            return None
        return self._parted(closing, closing)[2]

    def _turn(self, messages: list[Message], text: str, place: str) -> Turn:
        before = self.prompt(messages[:-1], place)
        if not text.startswith(before):
            pairs = enumerate(zip(before, text, strict=False))
            same = next((place for place, (one, other) in pairs if one != other), min(len(before), len(text)))
            raise UserError(
                f"{place}: the tokenizer's chat template renders a prompt that is not the beginning of the finished "
                f"conversation (the prompt has {before[same : same + 30]!r} where the conversation has "
                f"{text[same : same + 30]!r}), so the model would learn from another prompt than inference sends; put "
                "a chat_template.jinja whose conversations begin with their prompts into the backbone's folder, or "
                "render the conversations yourself and use data.format: prompt_completion"
            )
        written = text[len(before) :]
        closing = self._framed(messages[:-1], place)[1]
        return Turn(before, written, *self._parted(written, closing if written.endswith(closing) else ""))

    def _parted(self, written: str, closing: str) -> tuple[int, int, str | None]:
        """Return where the answer ends, where the supervised part ends, and the token between the two."""
        size = len(written)
        found = self.reader.added.search(closing) if self.reader.added is not None else None
        if found is None:
            return size, size, None
        start = size - len(closing)
        return start + found.start(), start + found.end(), found[0]

    def _framed(self, before: list[Message], place: str) -> tuple[str, str]:
        """Return what the template writes between the generation prompt and a last answer, and after that answer.

        Both are assumed to be the same for all conversations with the same roles.
        """
        roles = tuple(message["role"] for message in before)
        if roles not in self._frames:
            text = str(self._render([*before, {"role": "assistant", "content": _PROBE}], place))
            opening, found, closing = text.rpartition(_PROBE)
            prompt = self.prompt(before, place)
            opening = opening[len(prompt) :] if opening.startswith(prompt) else ""
            self._frames[roles] = (opening, closing) if found else ("", "")
        return self._frames[roles]

    def _marks(self, messages: list[Message], place: str) -> list[tuple[int, int]] | None:
        """Return the character ranges that the template marks as the assistant's; None if it never marks any."""
        if not _GENERATION.search(self.template):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            _, found = render_jinja_template(
                [messages],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise _refused(place, error) from error
        return [(begin, end) for begin, end in found[0]]

    def _render(self, messages: Sequence[Message], place: str, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(messages), **{"tokenize": False, **options})
        except Exception as error:  # a template is a program and may raise anything
            raise _refused(place, error) from error


def common_system(conversations: Sequence[Any]) -> str | None:
    """Return the system message with which all conversations begin; None if they do not all begin with the same."""
    found: str | None = None
    for messages in conversations:
        first = messages[0] if isinstance(messages, list) and messages else None
        if not isinstance(first, dict) or first.get("role") != "system":
            return None
        content = first.get("content")
        if not isinstance(content, str) or (found is not None and content != found):
            return None
        found = content
    return found


def _learned(messages: Any, place: str) -> list[int]:
    """Return the indices of the supervised messages; raise `UserError` if there are none or they are malformed."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{place}: messages has to be a list of {{role, content}}, but is {repr(messages)[:60]}")
    for number, message in enumerate(messages, start=1):
        calls = isinstance(message, dict) and message.get("tool_calls")
        if calls and not isinstance(message.get("content"), str):
            which = "the last message" if number == len(messages) else f"message {number}"
            raise UserError(
                f"{place}: {which} calls a tool (tool_calls) but has no text, and only text can be learned; end the "
                "row with the assistant's answer, or write the call as text into the message's content"
            )
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, dict) else None
            if not isinstance(value, str):
                raise UserError(
                    f"{place}: message {number} has to have a {key!r} that is text, but is {repr(message)[:80]}"
                )
    if messages[-1]["role"] != "assistant":
        raise UserError(
            f"{place}: the last message has the role {messages[-1]['role']!r}, but the model learns to write the "
            "last message; end the row with an assistant message"
        )
    if len(messages) == 1:
        raise UserError(f"{place}: there is no message before the assistant's; add at least a user message")
    if is_blank(messages[-1]["content"]):
        raise UserError(f"{place} has an empty last message: there is nothing to learn; remove the row")
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index > 0]
    learned = [index for index in answers if _counts(messages[index], f"{place}: message {index + 1}")]
    if not learned:
        raise UserError(
            f"{place}: all messages of the assistant have weight 0 (or train: false), so there is nothing to learn; "
            "remove the row"
        )
    return learned


def _counts(message: Message, place: str) -> bool:
    """Return whether a message is supervised, by OpenAI's ``weight`` (0 or 1) or by ``train``. Raises `UserError`."""
    weight, train = message.get("weight"), message.get("train")
    if weight not in (None, 0, 1):
        raise UserError(f"{place} has the weight {weight!r}; set it to 0 (not learned) or 1")
    if train not in (None, True, False):
        raise UserError(f"{place} has train: {train!r}; set it to true or false (not learned)")
    return weight != 0 and train is not False


def _plain(message: Message) -> Message:
    """Return the message without ``weight``, ``train`` and the keys of value None, which a data set's columns add."""
    return {key: value for key, value in message.items() if value is not None and key not in ("weight", "train")}


def _overlaps(marks: list[tuple[int, int]], span: tuple[int, int]) -> bool:
    return any(begin < span[1] and end > span[0] for begin, end in marks)


def _covers(marks: list[tuple[int, int]], span: tuple[int, int], text: str) -> bool:
    """Return whether everything in ``span`` except white space is marked."""
    reached, open_text = span[0], ""
    for begin, end in sorted(marks):
        open_text += text[reached : min(begin, span[1])]
        reached = max(reached, end)
    return not (open_text + text[reached : span[1]]).strip()


def _refused(place: str, error: Exception) -> UserError:
    return UserError(f"{place}: the tokenizer's chat template refuses the conversation: {error}")
