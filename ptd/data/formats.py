"""Rows -> token ids and which of them are learned: the formats prompt_completion, messages and text.

A prompt and its completion are tokenised separately, because that is what happens at generation: the prompt with the
special tokens that the tokenizer puts before a text (never those it appends), the completion with none, and EOS behind.
"""

from __future__ import annotations

import string
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ptd.config import DataConfig
from ptd.data.chat import chat_prompt, chat_tokens
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
    Raises `UserError` naming the row that cannot be used.
    """
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
    return Examples(
        tokens=np.frombuffer(tokens, dtype=np.int32),
        supervised=learned,
        offsets=np.frombuffer(offsets, dtype=np.int64),
        report=DataReport(len(rows), len(tokens), int(learned.sum()), prompts_cut, completions_cut),
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
    prompts: list[list[int]] = []
    references: list[str] = []
    head = _special_affixes(tokenizer)[0]
    for first, columns in _chunks(rows, config, what):
        if config.format == "messages":
            for row, messages in enumerate(columns["messages"], first):
                prompts.append(chat_prompt(messages, tokenizer, f"row {row} of {what}"))
                references.append(messages[-1]["content"])
        else:
            prompts += prompt_tokens(tokenizer, columns["prompt"])
            references += columns["completion"]
    for row, ids in enumerate(prompts, start=1):
        if not ids:
            raise UserError(f"row {row} of {what} has a prompt without tokens; generation needs at least one")
        if len(ids) > max_length:
            leading = _leading(ids, head, tokenizer)
            prompts[row - 1] = ids[:leading] + ids[len(ids) - (max_length - leading) :]
    return prompts, references


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of prompts as in training: behind the special tokens that the tokenizer puts before a text."""
    head = _special_affixes(tokenizer)[0]
    return [head + ids for ids in _encode(tokenizer, texts)]


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
    head = _special_affixes(tokenizer)[0]
    for first, columns in _chunks(rows, config, what):
        if config.format == "text":
            prompts, completions = None, _encode(tokenizer, columns["text"])
        else:
            prompts, completions = _encode(tokenizer, columns["prompt"]), _encode(tokenizer, columns["completion"])
        for index, completion in enumerate(completions):
            if not completion:
                name = "text" if prompts is None else "completion"
                raise UserError(f"row {first + index} of {what}: the {name} has no tokens; remove the row")
            prompt = head + prompts[index] if prompts is not None else head
            if completion[-1] != eos:
                completion.append(eos)
            mask = bytes(len(prompt)) + b"\1" * len(completion)
            yield prompt + completion, mask, len(prompt), len(head)


def _messages(rows: Dataset, config: DataConfig, tokenizer: PreTrainedTokenizerBase, what: str) -> Iterator[_Tokenized]:
    for first, columns in _chunks(rows, config, what):
        places = [f"row {first + index} of {what}" for index in range(len(columns["messages"]))]
        for ids, mask, start in chat_tokens(columns["messages"], tokenizer, places):
            yield ids, mask, start, _leading(ids, [], tokenizer)


def _fit(ids: list[int], mask: bytes, start: int, leading: int, max_length: int) -> tuple[list[int], bytes, bool, bool]:
    """Cut to ``max_length``; also whether the prompt (before ``start``) and the rest were cut."""
    if len(ids) <= max_length:
        return ids, mask, False, False
    # Something has to stand before the completion for its first token to be learned.
    kept = min(max(leading, 1), start, max_length - 1)
    room = max_length - (len(ids) - start)
    if room < kept:
        begin = range(kept) if leading else range(start - kept, start)
        end = start + max_length - kept
        return ids[begin.start : begin.stop] + ids[start:end], mask[:kept] + mask[start:end], start > kept, True
    head = min(leading, room)
    begin_tail = start - (room - head)
    return ids[:head] + ids[begin_tail:], mask[:head] + mask[begin_tail:], True, False


def _chunks(rows: Dataset, config: DataConfig, what: str) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """The format's fields of up to `_ROWS_AT_ONCE` rows at a time, checked, with the first row's number (from 1)."""
    fields = {"prompt_completion": ["prompt", "completion"], "messages": ["messages"], "text": ["text"]}[config.format]
    columns = {field: config.columns.get(field, field) for field in fields}
    template = None
    if config.prompt_template is not None:
        if "prompt" in config.columns:
            raise UserError("data.columns.prompt: has no effect beside data.prompt_template; remove one of them")
        template = _parse_template(config.prompt_template, rows.column_names, what)
        del columns["prompt"]
    for field, column in columns.items():
        if column not in rows.column_names:
            raise UserError(
                f"{what} has no column {column!r}; it has {', '.join(rows.column_names)}. "
                f"Name the column that holds the {field}, e.g. data.columns: {{{field}: {rows.column_names[0]}}}"
            )
    used = {*columns.values(), *(name for _, name in template or [] if name is not None)}
    rows = rows.select_columns(sorted(used)).with_format(None)
    for begin in range(0, len(rows), _ROWS_AT_ONCE):
        piece = rows[begin : begin + _ROWS_AT_ONCE]
        chunk = {field: piece[column] for field, column in columns.items()}
        for field, column in columns.items():
            _check(chunk[field], column, field, begin + 1, what)
        if template is not None:
            chunk["prompt"] = _fill(template, piece, begin + 1, what)
        yield begin + 1, chunk


def _check(values: list[Any], column: str, field: str, first: int, what: str) -> None:
    for row, value in enumerate(values, first):
        if value is None:
            raise UserError(f"row {row} of {what} has no {column!r}; add it or remove the row")
        if field == "messages":
            continue
        if not isinstance(value, str):
            raise UserError(
                f"row {row} of {what}: {column!r} has to be text, but is {type(value).__name__} ({repr(value)[:60]}); "
                "write it as a string"
            )
        if not value and field != "prompt":
            raise UserError(f"row {row} of {what} has an empty {column!r}: there is nothing to learn; remove the row")


_Template = list[tuple[str, str | None]]  # text, then the column that follows it


def _parse_template(template: str, columns: list[str], what: str) -> _Template:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"data.prompt_template: {template!r} has an unpaired brace ({error}); write {{column}}; {{{{ is a brace"
        ) from error
    for _, name, spec, conversion in parts:
        if name is not None and (name not in columns or spec or conversion):
            raise UserError(
                f"data.prompt_template: {{{name}}} is not a column of {what}; it has {', '.join(columns)} "
                "(only plain {column} fields; write {{ for a brace)"
            )
    return [(text, name) for text, name, _, _ in parts]


def _fill(template: _Template, piece: dict[str, list[Any]], first: int, what: str) -> list[str]:
    """Numbers may be filled in as well as texts: "{a} + {b} =" is a fair prompt."""
    names = {name for _, name in template if name is not None}
    for name in names:
        for row, value in enumerate(piece[name], first):
            if not isinstance(value, str | int | float):
                kind = "missing" if value is None else f"{type(value).__name__}, not text or a number"
                raise UserError(f"row {row} of {what}: {name!r}, which data.prompt_template uses, is {kind}")
    size = len(next(iter(piece.values())))
    return [
        "".join(text + ("" if name is None else str(piece[name][index])) for text, name in template)
        for index in range(size)
    ]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose: no warning about texts longer than the model's context; they are cut, counted and reported.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _special_affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for begin in range(len(full) - len(bare) + 1 if bare else 0):
        if full[begin : begin + len(bare)] == bare:
            return full[:begin], full[begin + len(bare) :]
    # The tokenizer knows no "a": what it adds cannot be told apart by position, but an end token gives itself away.
    closing = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {tokenizer.bos_token_id, None}
    end = len(full)
    while end and full[end - 1] in closing:
        end -= 1
    return full[:end], full[end:]


def _leading(ids: list[int], head: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens open the row: those the tokenizer adds, or a BOS that the chat template wrote."""
    if head and ids[: len(head)] == head:
        return len(head)
    return int(bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
