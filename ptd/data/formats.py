"""Rows -> token ids and which of them are learned: the formats prompt_completion, messages and text.

A prompt and its completion are tokenised separately, because that is what happens at generation: the prompt with the
special tokens that the tokenizer puts before a text (never those it appends), the completion with none, and EOS behind.
``{v:n}`` marks of ``data.prompt_template`` become `ptd.types.virtual_id`s in the prompt.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ptd.config import DataConfig, fields_of
from ptd.data.chat import chat_prompt, chat_tokens
from ptd.data.fields import TEXT, Column, cell, check_column
from ptd.data.filling import encode, fill, special_affixes
from ptd.data.templates import marks_of, parse_template, prompt_template
from ptd.types import DataReport, Examples, UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_ROWS_AT_ONCE = 1000


def tokenize(
    rows: Dataset, config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, max_length: int, what: str
) -> Examples:
    """Tokenise all rows in ``config.format``; ``what`` names the rows in messages ("row 3 of ``what`` …").

    - ``prompt_completion``: the completion and EOS are supervised. A completion that ends in EOS gets no second one.
    - ``messages``: what the assistant writes is supervised (see `ptd.data.chat`).
    - ``text``: the text and EOS, all supervised.

    The first token of a row is never supervised, so without prompt and BOS the first completion token is not learned.
    Over ``max_length`` tokens the prompt is cut on the left, behind the tokenizer's leading special tokens; when the
    completion alone is too long it is cut on the right and the leading special tokens, or the prompt's last one, stay.
    Virtual tokens are never cut.
    Raises `UserError` naming the row that cannot be used.
    """
    _check_room(config, tokenizer, max_length)
    tokens, supervised, offsets = array("i"), bytearray(), array("q", [0])
    prompts_cut = completions_cut = 0
    for ids, mask, start, leading in _tokenized(rows, config, tokenizer, what):
        ids, mask, prompt_cut, completion_cut = _fit(ids, mask, start, leading, max_length)
        prompts_cut += prompt_cut
        completions_cut += completion_cut
        tokens.extend(ids)
        supervised += mask
        supervised[offsets[-1]] = 0
        offsets.append(len(tokens))
    learned = np.frombuffer(supervised, dtype=bool)
    report = DataReport(len(rows), len(tokens), int(learned.sum()), prompts_cut, completions_cut)
    return Examples.of_text(
        np.frombuffer(tokens, dtype=np.int32), learned, np.frombuffer(offsets, dtype=np.int64), report
    )


def prompts_and_references(
    rows: Dataset, config: DataConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, *, what: str = "data.eval"
) -> tuple[list[list[int]], list[str]]:
    """For evaluation by generation: each row's prompt as token ids, as in training, and the text that should follow.

    Prompts over ``max_length`` tokens are cut on the left as in `tokenize`. With ``messages`` the prompt is everything
    before the last message, rendered with the template's generation prompt. Raises `UserError`, also for ``text``.
    """
    if config.format == "text":
        raise UserError("data.format: text has no prompts to generate from; use prompt_completion or messages")
    _check_room(config, tokenizer, max_length)
    prompts: list[list[int]] = []
    references: list[str] = []
    head = special_affixes(tokenizer)[0]
    for first, columns in _chunks(rows, config, tokenizer, what):
        if config.format == "messages":
            for row, messages in enumerate(columns["messages"], first):
                prompts.append(chat_prompt(messages, tokenizer, f"row {row} of {what}"))
                references.append(messages[-1]["content"])
        else:
            prompts += [head + ids for ids in columns["prompt"]]
            references += columns["completion"]
    for row, ids in enumerate(prompts, start=1):
        if not ids:
            raise UserError(f"row {row} of {what} has a prompt without tokens; generation needs at least one")
        if len(ids) > max_length:
            prompts[row - 1] = [ids[i] for i in _kept(ids, _leading(ids, head, tokenizer), max_length)]
    return prompts, references


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of prompts as in training: behind the special tokens that the tokenizer puts before a text."""
    head = special_affixes(tokenizer)[0]
    return [head + ids for ids in encode(tokenizer, texts)]


def fill_prompts(tokenizer: PreTrainedTokenizerBase, template: str | None, texts: list[str]) -> list[list[int]]:
    """Token ids of the prompts that free texts make: each put into the template, if that has a single field.

    With several fields (or none, or no template) a text alone cannot fill it, and the texts are taken to be whole
    prompts already. Raises `UserError` if such a template has ``{v:n}`` marks, whose place would then be unknown.
    """
    parsed = parse_template(template) if template is not None else None
    if parsed is None or (len(set(parsed.fields)) != 1 and not parsed.virtual_tokens):
        return prompt_tokens(tokenizer, texts)
    if len(set(parsed.fields)) != 1:
        count = len(set(parsed.fields)) or "no"
        raise UserError(
            f"data.prompt_template: {template!r} has {count} fields and virtual tokens between them, so a single text "
            "does not make a prompt; give rows with the template's columns (ptd evaluate), or train with one field"
        )
    values = [(text,) * len(parsed.fields) for text in texts]
    return fill(parsed, values, tokenizer, (special_affixes(tokenizer)[0], []))[0]


_Tokenized = tuple[list[int], bytes, int, int]  # ids, supervision, start of the completion, leading special tokens


def _tokenized(
    rows: Dataset, config: DataConfig, tokenizer: PreTrainedTokenizerBase, what: str
) -> Iterator[_Tokenized]:
    if config.format == "messages":
        yield from _messages(rows, config, tokenizer, what)
        return
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so the model could not learn "
            f"where a text ends; data.format {config.format} needs one (set eos_token in its tokenizer_config.json)"
        )
    head = special_affixes(tokenizer)[0]
    for first, columns in _chunks(rows, config, tokenizer, what):
        prompts = None if config.format == "text" else columns["prompt"]
        completions = encode(tokenizer, columns["text" if prompts is None else "completion"])
        for index, completion in enumerate(completions):
            if not completion:
                name = "text" if prompts is None else "completion"
                raise UserError(f"row {first + index} of {what}: the {name} has no tokens; remove the row")
            prompt = head if prompts is None else head + prompts[index]
            if completion[-1] != eos:
                completion.append(eos)
            mask = bytes(len(prompt)) + b"\1" * len(completion)
            yield prompt + completion, mask, len(prompt), len(head)


def _messages(rows: Dataset, config: DataConfig, tokenizer: PreTrainedTokenizerBase, what: str) -> Iterator[_Tokenized]:
    for first, columns in _chunks(rows, config, tokenizer, what):
        places = [f"row {first + index} of {what}" for index in range(len(columns["messages"]))]
        for ids, mask, start in chat_tokens(columns["messages"], tokenizer, places):
            yield ids, mask, start, _leading(ids, [], tokenizer)


def _fit(ids: list[int], mask: bytes, start: int, leading: int, max_length: int) -> tuple[list[int], bytes, bool, bool]:
    """Cut to ``max_length``; also whether the prompt (before ``start``) and the rest were cut."""
    if len(ids) <= max_length:
        return ids, mask, False, False
    room = max_length - (len(ids) - start)
    # Something has to stand before the completion for its first token to be learned.
    least = _staying(ids[:start], leading)[: max_length - 1] or list(range(max(start - 1, 0), start))
    kept = _kept(ids[:start], leading, room) if room >= len(least) else least
    chosen = [*kept, *range(start, start + max_length - len(kept))]
    return [ids[i] for i in chosen], bytes(mask[i] for i in chosen), len(kept) < start, room < len(least)


def _kept(prompt: list[int], leading: int, room: int) -> list[int]:
    """Places of ``room`` tokens: leading special and virtual ones, and as many of the last ones as fit beside them."""
    staying = _staying(prompt, leading)[:room]
    others = sorted(set(range(len(prompt))) - set(staying))
    return sorted([*staying, *others[max(len(others) - (room - len(staying)), 0) :]])


def _staying(prompt: list[int], leading: int) -> list[int]:
    """What is not cut off a prompt."""
    return [place for place, token in enumerate(prompt) if place < leading or token < 0]


def _check_room(config: DataConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Virtual tokens are part of the sequence: `UserError` if they leave no room for anything else."""
    marks = marks_of([config.prompt_template]) if config.prompt_template is not None else 0
    fixed = marks + len(special_affixes(tokenizer)[0])
    if marks and fixed >= max_length:
        raise UserError(
            f"data.prompt_template: {config.prompt_template!r} has {marks} virtual tokens, which with the special "
            f"tokens fill data.max_length ({max_length}); raise it"
        )


def _chunks(
    rows: Dataset, config: DataConfig, tokenizer: PreTrainedTokenizerBase, what: str
) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """The format's fields of up to `_ROWS_AT_ONCE` rows at a time, checked, with the first row's number (from 1).

    Prompts come as token ids without special tokens, with `ptd.types.virtual_id`s where the template has marks.
    """
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
    for begin in range(0, len(rows), _ROWS_AT_ONCE):
        piece = rows[begin : begin + _ROWS_AT_ONCE]
        chunk = {
            field: [cell(value, column, row, what) for row, value in enumerate(piece[column.name], begin + 1)]
            for field, column in columns.items()
        }
        if template is not None:
            values = template.values(piece, begin + 1, what)
            chunk["prompt"] = fill(template, values, tokenizer, ([], []))[0]
        elif "prompt" in chunk:
            chunk["prompt"] = encode(tokenizer, chunk["prompt"])
        yield begin + 1, chunk


def _leading(ids: list[int], head: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens open the row: those the tokenizer adds, or a BOS that the chat template wrote."""
    if head and ids[: len(head)] == head:
        return len(head)
    return int(bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
