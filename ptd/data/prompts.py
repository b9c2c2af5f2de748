"""Turn rows into prompts and completions as token ids, for training, evaluation and samples alike.

`ptd.data.typed` builds the same prompts from typed text. A prompt's ids are what inference sends: the special tokens
that the tokenizer puts before a text (never those that it appends) and the text, or what the chat template writes. A
completion's ids are those of the text as it continues the prompt (`ptd.data.continuations`), and a token that ends it.
``{v:n}`` marks of ``data.prompt_template`` become `ptd.types.virtual_id`s in the prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptd.config import DataConfig, fields_of
from ptd.data.chat import Chat, Talk, Turn
from ptd.data.collecting import ROWS_PER_PIECE
from ptd.data.continuations import Reader, continuations
from ptd.data.fields import TEXT, Column, cell, check_column
from ptd.data.filling import affixed, encode, fill, special_affixes
from ptd.data.templates import Template, prompt_template
from ptd.types import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Written:
    """A row as token ids.

    ``learned``: for each token of prompt and completion, whether it is supervised. ``text`` is the completion's text,
    and ``before`` the text before it (since the last virtual token). ``reference`` is the text that generation should
    produce. ``leading``: number of special tokens at the start of the prompt.
    """

    prompt: list[int]
    completion: list[int]
    learned: bytes
    before: str
    text: str
    reference: str
    leading: int


@dataclass
class PromptFindings:
    """Findings from reading the rows: the ids of tokens that end a text, and what the notes have to report."""

    ends: set[int] = dataclasses.field(default_factory=set)
    turns_left: int = 0
    unmarked: int = 0
    openings: set[str] = dataclasses.field(default_factory=set)
    open_ends: int = 0
    dated: bool = False
    tools: bool = False

    def notes(self, eos: str | None) -> list[str]:
        """Return one sentence per finding; ``eos``: the tokenizer's end token."""
        said = []
        if self.turns_left:
            said.append(
                f"{self.turns_left:,} earlier turns of the assistant are not learned, because the chat template or the "
                "tokenizer writes them differently once other turns follow"
            )
        for opening in sorted(filter(str.strip, self.openings))[:3]:
            said.append(f"the chat template begins answers with {opening!r}, which the model has to write too")
        if self.unmarked:
            said.append(
                f"in {self.unmarked:,} rows the template's {{% generation %}} omits part of what the model has to "
                "write; the loss covers that part as well"
            )
        if self.open_ends:
            said.append(f"the chat template ends turns without a token of its own, so {eos} is learned after them")
        if self.dated:
            said.append("the chat template writes the current date, so prompts differ from day to day")
        if self.tools:
            said.append("the column tools is not used: neither training nor generation describes tools to the model")
        return said


def written(
    rows: Dataset, config: DataConfig, tokenizer: PreTrainedTokenizerBase, what: str, found: PromptFindings
) -> Iterator[Written]:
    """Yield each row in ``config.format``, and add to ``found``. Raises `UserError`, naming the row."""
    if config.format == "messages":
        yield from _conversations(rows, config, tokenizer, what, found)
        return
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if eos is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so the model could not learn "
            f"where a text ends; data.format {config.format} needs one (set eos_token in its tokenizer_config.json)"
        )
    found.ends.add(eos)
    head, reader = special_affixes(tokenizer)[0], Reader(tokenizer)
    name = "text" if config.format == "text" else "completion"
    for first, chunk in _chunks(rows, config, tokenizer, what):
        completions = continuations(tokenizer, chunk.before, chunk.texts)
        for index, completion in enumerate(completions):
            prompt, text = affixed(chunk.prompts[index], head), chunk.texts[index]
            if not chunk.prompts[index] and completion[: len(head)] == head:
                completion = completion[len(head) :]
            if not completion:
                raise UserError(f"row {first + index} of {what}: the {name} has no tokens; remove the row")
            if completion[-1] != eos:
                completion.append(eos)
            learned = b"\1" * len(completion)
            if bos != eos and bos in completion:  # the model never predicts BOS
                begins = range(len(completion)) if config.format == "text" else range(_run_of(bos, completion))
                learned = bytes(place not in begins or token != bos for place, token in enumerate(completion))
            mask = bytes(len(prompt)) + learned
            reference = reader.plain(text)
            leading = _leading(prompt, head, tokenizer)
            yield Written(prompt, completion, mask, chunk.before[index], text, reference, leading)


def _conversations(
    rows: Dataset, config: DataConfig, tokenizer: PreTrainedTokenizerBase, what: str, found: PromptFindings
) -> Iterator[Written]:
    chat = Chat(tokenizer)
    found.dated, found.tools = chat.dated, "tools" in rows.column_names
    for first, chunk in _chunks(rows, config, tokenizer, what):
        places = [f"row {first + index} of {what}" for index in range(len(chunk.texts))]
        talks = [chat.talk(messages, place) for messages, place in zip(chunk.texts, places, strict=True)]
        befores = iter(encode(tokenizer, [turn.before for talk in talks for turn in talk.turns]))
        lasts = [talk.turns[-1] for talk in talks]
        completions = continuations(tokenizer, [turn.before for turn in lasts], [turn.written for turn in lasts])
        for talk, completion, place in zip(talks, completions, places, strict=True):
            yield _conversation(talk, [next(befores) for _ in talk.turns], completion, chat, place, found)


def _conversation(
    talk: Talk,
    befores: list[list[int]],
    completion: list[int],
    chat: Chat,
    place: str,
    found: PromptFindings,
) -> Written:
    tokenizer, last, prompt = chat.tokenizer, talk.turns[-1], befores[-1]
    if not completion:
        raise UserError(f"{place}: the last message has no tokens; remove the row")
    reference = chat.reader.plain(last.written[: last.answer])
    learned_to = _closed(completion, last, tokenizer, found)
    if learned_to is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{place}: the chat template closes the assistant's turn with {last.written[-20:]!r}, which is not "
                "a token of its own, and the tokenizer has no end-of-sequence token, so the model could not learn "
                "where an answer ends; set eos_token in tokenizer_config.json"
            )
        found.ends.add(tokenizer.eos_token_id)
        found.open_ends += 1
        if completion[-1] != tokenizer.eos_token_id:
            completion = [*completion, tokenizer.eos_token_id]
        learned_to = len(completion)
        reference = chat.reader.behind(prompt, completion)
    mask = bytearray(len(prompt) + len(completion))
    mask[len(prompt) : len(prompt) + learned_to] = b"\1" * learned_to
    ids = prompt + completion
    left = talk.left
    for turn, before in zip(talk.turns[:-1], befores[:-1], strict=True):
        size = _end_in(ids, before, turn, tokenizer, found)
        if size is None:
            left += 1
        else:
            mask[len(before) : size] = b"\1" * (size - len(before))
    found.turns_left += left
    found.unmarked += talk.unmarked
    found.openings.add(talk.opening)
    return Written(
        prompt, completion, bytes(mask), last.before, last.written, reference, _leading(prompt, [], tokenizer)
    )


def _closed(ids: list[int], turn: Turn, tokenizer: PreTrainedTokenizerBase, found: PromptFindings) -> int | None:
    """Return how many of a turn's ``ids`` are supervised, with the token that closes it; None: no token closes it."""
    if turn.end is None:
        return None
    end = tokenizer.convert_tokens_to_ids(turn.end)
    places = [place for place, token in enumerate(ids) if token == end]
    number = turn.written[: turn.learned].count(turn.end)
    if len(places) < number:
        return None
    found.ends.add(end)
    return places[number - 1] + 1


def _end_in(
    ids: list[int], before: list[int], turn: Turn, tokenizer: PreTrainedTokenizerBase, found: PromptFindings
) -> int | None:
    """Return where an earlier turn ends in the conversation's ``ids``; None if inference would send other tokens."""
    if ids[: len(before)] != before:
        return None
    size = _closed(ids[len(before) :], turn, tokenizer, found)
    if size is not None:
        return len(before) + size
    (whole,) = encode(tokenizer, [turn.before + turn.written[: turn.learned]])
    return len(whole) if ids[: len(whole)] == whole else None


@dataclass(frozen=True)
class _Chunk:
    """Consecutive rows: ``texts`` are what the model has to write (with messages: the conversations).

    ``prompts``: token ids without special tokens; ``before``: the prompts' texts after their last virtual token.
    """

    texts: list[Any]
    prompts: list[list[int]]
    before: list[str]


def _chunks(
    rows: Dataset, config: DataConfig, tokenizer: PreTrainedTokenizerBase, what: str
) -> Iterator[tuple[int, _Chunk]]:
    """Yield up to `ROWS_PER_PIECE` checked rows at a time, with the first row's number (from 1)."""
    fields = fields_of("causal_lm", config.format)
    columns = {
        field: Column(
            config.columns.get(field, field),
            "a list of messages" if field == "messages" else TEXT,
            may_be_blank=field == "prompt",
        )
        for field in fields
    }
    template = prompt_template(config, rows.column_names, what)
    if template is not None:
        del columns["prompt"]
    for field, column in columns.items():
        check_column(rows, field, column.name, what)
    used = {*(column.name for column in columns.values()), *(template.fields if template is not None else ())}
    rows = rows.select_columns(sorted(used)).with_format(None)
    for begin in range(0, len(rows), ROWS_PER_PIECE):
        piece = rows[begin : begin + ROWS_PER_PIECE]
        chunk = {
            field: [cell(value, column, row, what) for row, value in enumerate(piece[column.name], begin + 1)]
            for field, column in columns.items()
        }
        texts = chunk[fields[-1]]
        if template is not None:
            values = template.values(piece, begin + 1, what)
            prompts = fill(template, values, tokenizer, ([], []))[0]
            before = [_last_run(template, row) for row in values]
        else:
            before = chunk.get("prompt", [""] * len(texts))
            prompts = encode(tokenizer, before) if "prompt" in chunk else [[] for _ in texts]
        yield begin + 1, _Chunk(texts, prompts, before)


def _last_run(template: Template, values: tuple[str, ...]) -> str:
    """Return the text of a filled template after its last mark."""
    run = template.pieces[-1] if template.pieces else ()
    if not isinstance(run, tuple):
        return ""
    rest = iter(values[len(values) - sum(hasattr(part, "column") for part in run) :])
    return "".join(next(rest) if hasattr(part, "column") else part.text for part in run)


def _leading(ids: list[int], head: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many special tokens begin the row: those that the tokenizer adds, or the chat template's BOS."""
    if head and ids[: len(head)] == head:
        return len(head)
    return int(bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)


def _run_of(token: int, ids: list[int]) -> int:
    """Return how many times ``token`` is repeated at the start of ``ids``."""
    return next((place for place, other in enumerate(ids) if other != token), len(ids))
