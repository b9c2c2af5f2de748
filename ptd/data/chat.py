"""Conversations -> the turns of the assistant that are learned, by the tokenizer's chat template.

A turn is what the rendering of everything up to it has behind "everything before it, with the generation prompt", which
is what inference sends. It ends with the token that the template writes behind an answer; what stands behind that
token (a line break, or the end of the whole text) is not learned, because generation stops there.
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
"""An answer whose place in a rendering is certain."""


@dataclass(frozen=True)
class Turn:
    """One answer of the assistant.

    ``before``: the text that inference sends; ``written``: what the rendering has behind it; ``answer`` and ``learned``
    count its characters without and with ``end``, the added token that closes it (None: it closes with ordinary text,
    all of which is learned, or with nothing).
    """

    before: str
    written: str
    answer: int
    learned: int
    end: str | None


@dataclass(frozen=True)
class Talk:
    """A conversation up to its last learned turn, rendered, and its learned turns, of which the last is exact.

    ``left``: turns that were to be learned but that the template renders differently once they are history.
    ``opening``: what the template writes between the generation prompt and an answer: the model has to write it too.
    ``unmarked``: the template's ``{% generation %}`` leaves out part of the last turn, which is learned all the same.
    """

    turns: tuple[Turn, ...]
    left: int
    opening: str
    unmarked: bool


class Chat:
    """A tokenizer's chat template. Raises `UserError` if it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"data.format: messages needs a chat template, but the tokenizer {tokenizer.name_or_path!r} has none; "
                "use an instruction-tuned backbone, add chat_template.jinja to its folder, or use prompt_completion"
            )
        self.tokenizer, self.reader = tokenizer, Reader(tokenizer)
        try:
            self.template = str(tokenizer.get_chat_template())
        except ValueError as error:  # several, none of which is the default
            raise UserError(f"data.format: messages: {error}") from error
        self._frames: dict[tuple[str, ...], tuple[str, str]] = {}

    @cached_property
    def dated(self) -> bool:
        """Whether the template writes the day on which it is rendered."""
        return "strftime_now" in self.template

    def prompt(self, messages: Sequence[Message], place: str) -> str:
        """What inference sends for ``messages``: their rendering with the generation prompt. Raises `UserError`."""
        return str(self._render(messages, place, add_generation_prompt=True))

    def talk(self, messages: Any, place: str) -> Talk:
        """The turns that are learned; ``place`` names the conversation in messages ("row 3 of train.jsonl").

        All of the assistant's but one that opens the conversation and those with ``weight: 0`` or ``train: false``.
        Raises `UserError` for a conversation that cannot be learned from, or a template that cannot be used.
        """
        learned = _learned(messages, place)
        messages = [_plain(message) for message in messages[: learned[-1] + 1]]
        text = str(self._render(messages, place))
        marks = self._marks(messages, place)
        last = self._turn(messages, text, place)
        span = (len(last.before), len(last.before) + last.learned)
        if not last.written.strip() or (marks is not None and not _overlaps(marks, span)):
            raise UserError(f"{place}: the chat template marks nothing as written by the assistant; nothing to learn")
        turns, left = [], 0
        for index in learned[:-1]:
            earlier = messages[: index + 1]
            try:
                turn = self._turn(earlier, str(self._render(earlier, place)), place)
            except UserError:  # inference cannot ask for it either
                turn = None
            if turn is None or not text.startswith(turn.before + turn.written[: turn.learned]):
                left += 1
            elif marks is None or _overlaps(marks, (len(turn.before), len(turn.before) + turn.learned)):
                turns.append(turn)
        opening = self._framed(messages[:-1], place)[0]
        return Talk((*turns, last), left, opening, marks is not None and not _covers(marks, span, text))

    def end(self) -> str | None:
        """The added token that closes an answer to a lone question; None: there is none, or the template refuses."""
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
                f"{place}: the tokenizer's chat template renders the generation prompt in a way that the finished "
                f"conversation does not continue (it has {before[same : same + 30]!r} where the conversation has "
                f"{text[same : same + 30]!r}), so the model would learn from another prompt than inference sends; give "
                "the backbone's folder a chat_template.jinja whose conversations begin with its prompts, or render "
                "them yourself for data.format: prompt_completion"
            )
        written = text[len(before) :]
        closing = self._framed(messages[:-1], place)[1]
        return Turn(before, written, *self._parted(written, closing if written.endswith(closing) else ""))

    def _parted(self, written: str, closing: str) -> tuple[int, int, str | None]:
        """Where the answer ends, where what is learned ends, and the token between the two."""
        size = len(written)
        found = self.reader.added.search(closing) if self.reader.added is not None else None
        if found is None:
            return size, size, None
        start = size - len(closing)
        return start + found.start(), start + found.end(), found[0]

    def _framed(self, before: list[Message], place: str) -> tuple[str, str]:
        """What the template writes between the generation prompt and an answer that comes last, and behind that.

        It is taken to be the same for conversations of the same roles.
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
        """Character ranges that the template itself marks as the assistant's; None: it marks none at all."""
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
        except Exception as error:  # a template is a program that raises what it likes
            raise _refused(place, error) from error


def common_system(conversations: Sequence[Any]) -> str | None:
    """The system message that all conversations open with; None: not all do, or with different ones."""
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
    """Which messages are learned. Raises `UserError` for a malformed conversation, or one without such a message."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{place}: messages has to be a list of {{role, content}}, but is {repr(messages)[:60]}")
    for number, message in enumerate(messages, start=1):
        calls = isinstance(message, dict) and message.get("tool_calls")
        if calls and not isinstance(message.get("content"), str):
            which = "the last message" if number == len(messages) else f"message {number}"
            raise UserError(
                f"{place}: {which} calls a tool (tool_calls) and says nothing, and what is learned is text alone; let "
                "the row end in the assistant's answer, or write the call into its content as text"
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
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index > 0]
    learned = [index for index in answers if _counts(messages[index], f"{place}: message {index + 1}")]
    if not learned:
        raise UserError(
            f"{place}: all messages of the assistant have weight 0 (or train: false), so there is nothing to learn; "
            "remove the row"
        )
    return learned


def _counts(message: Message, place: str) -> bool:
    """Whether a message is learned, by OpenAI's ``weight`` (0 or 1) or by ``train``."""
    weight, train = message.get("weight"), message.get("train")
    if weight not in (None, 0, 1):
        raise UserError(f"{place} has the weight {weight!r}; it can be 0 (not learned) or 1")
    if train not in (None, True, False):
        raise UserError(f"{place} has train: {train!r}; it can be true or false (not learned)")
    return weight != 0 and train is not False


def _plain(message: Message) -> Message:
    """What the template sees. Columns of a data set give each message the keys of all, as None where it has none."""
    return {key: value for key, value in message.items() if value is not None and key not in ("weight", "train")}


def _overlaps(marks: list[tuple[int, int]], span: tuple[int, int]) -> bool:
    return any(begin < span[1] and end > span[0] for begin, end in marks)


def _covers(marks: list[tuple[int, int]], span: tuple[int, int], text: str) -> bool:
    """Whether everything in ``span`` but blanks is marked."""
    reached, open_text = span[0], ""
    for begin, end in sorted(marks):
        open_text += text[reached : min(begin, span[1])]
        reached = max(reached, end)
    return not (open_text + text[reached : span[1]]).strip()


def _refused(place: str, error: Exception) -> UserError:
    return UserError(f"{place}: the tokenizer's chat template refuses the conversation: {error}")
