"""Turn the text that a person types into the prompt for the model: in the form of the training rows, or raw."""

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
    """Return the token ids of the prompts for free ``texts``, built as in training.

    With ``messages`` each text is a user message in the chat template, after the ``system`` message if one is given.
    Otherwise each text fills ``data.prompt_template`` if the template has exactly one field. ``raw``: the texts are
    complete prompts already. Raises `UserError` if the position of virtual tokens would be unknown.
    """
    if config.format == "messages" and not raw:
        chat = Chat(tokenizer)
        before = [] if system is None else [{"role": "system", "content": system}]
        asked = [[*before, {"role": "user", "content": text}] for text in texts]
        return encode(tokenizer, [chat.prompt(messages, "the prompt") for messages in asked])
    template = None if config.prompt_template is None else parse_template(config.prompt_template)
    if raw and template is not None and template.virtual_tokens:
        raise UserError(
            f"--raw: data.prompt_template {template.source!r} places virtual tokens in the prompt, but a raw text does "
            "not say where they belong; leave --raw out"
        )
    return fill_prompts(tokenizer, None if raw else config.prompt_template, list(texts))


def how_typed(config: DataConfig, *, system: str | None, raw: bool) -> str | None:
    """Return a sentence on how free texts become prompts; None if there is nothing to explain."""
    if raw:
        return None
    if config.format == "messages":
        behind = f", after the system message {_short(system)!r}" if system is not None else ""
        return (
            f"each prompt is sent as a user message in the tokenizer's chat template{behind}; "
            "--raw sends the text unchanged"
        )
    fields = set(parse_template(config.prompt_template).fields) if config.prompt_template is not None else {"one"}
    if len(fields) != 1:
        return f"data.prompt_template has {len(fields) or 'no'} fields, so each text is sent as a complete prompt"
    return None


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each prompt as in training, after the tokenizer's leading special tokens."""
    head = special_affixes(tokenizer)[0]
    return [affixed(ids, head) for ids in encode(tokenizer, texts)]


def fill_prompts(tokenizer: PreTrainedTokenizerBase, template: str | None, texts: list[str]) -> list[list[int]]:
    """Return the token ids of the prompts for free ``texts``: each text fills a template with exactly one field.

    With several fields, no field or no template, the texts are complete prompts already. Raises `UserError` if a
    template of this kind has ``{v:n}`` marks, because the position of the virtual tokens would be unknown.
    """
    parsed = parse_template(template) if template is not None else None
    if parsed is None or (len(set(parsed.fields)) != 1 and not parsed.virtual_tokens):
        return prompt_tokens(tokenizer, texts)
    if len(set(parsed.fields)) != 1:
        count = len(set(parsed.fields)) or "no"
        raise UserError(
            f"data.prompt_template: {template!r} has {count} fields and virtual tokens between them, so a single text "
            "cannot fill it; give rows with the template's columns (ptd eval), or train with one field"
        )
    values = [(text,) * len(parsed.fields) for text in texts]
    return fill(parsed, values, tokenizer, (special_affixes(tokenizer)[0], []))[0]


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"
