"""What a person types -> the prompt that is sent: as training had its like, or raw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ptd.config import DataConfig
from ptd.data.chat import Chat
from ptd.data.filling import affixed, encode, fill, special_affixes
from ptd.data.templates import parse_template
from ptd.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def typed(
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    texts: Sequence[str],
    *,
    system: str | None = None,
    raw: bool = False,
) -> list[list[int]]:
    """Token ids of the prompts that free texts make, as in training.

    With ``messages`` each is a user message in the chat template, behind a ``system`` message if one is given; else it
    is put into ``data.prompt_template`` if that has a single field. ``raw``: the texts are whole prompts already.
    Raises `UserError` where virtual tokens would have no place.
    """
    if config.format == "messages" and not raw:
        chat = Chat(tokenizer)
        before = [] if system is None else [{"role": "system", "content": system}]
        asked = [[*before, {"role": "user", "content": text}] for text in texts]
        return encode(tokenizer, [chat.prompt(messages, "the prompt") for messages in asked])
    template = None if config.prompt_template is None else parse_template(config.prompt_template)
    if raw and template is not None and template.virtual_tokens:
        raise UserError(
            f"--raw: data.prompt_template {template.source!r} places virtual tokens in the prompt, and a raw text says "
            "nowhere where they stand; leave --raw out"
        )
    return fill_prompts(tokenizer, None if raw else config.prompt_template, list(texts))


def how_typed(config: DataConfig, *, system: str | None, raw: bool) -> str | None:
    """What becomes of free texts before they are sent, if that is not plain; None: nothing to say."""
    if raw:
        return None
    if config.format == "messages":
        behind = f", behind the system message {_short(system)!r}" if system is not None else ""
        return f"each prompt is sent as a user message in the tokenizer's chat template{behind}; --raw sends the text"
    fields = set(parse_template(config.prompt_template).fields) if config.prompt_template is not None else {"one"}
    if len(fields) != 1:
        return f"data.prompt_template has {len(fields) or 'no'} fields, so each prompt is sent as it is, as a whole one"
    return None


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of prompts as in training: behind the special tokens that the tokenizer puts before a text."""
    head = special_affixes(tokenizer)[0]
    return [affixed(ids, head) for ids in encode(tokenizer, texts)]


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


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"
