"""Plan the sequences of a row if labels are words at ``{mask}``, and where each word is read in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptd.data.filling import encode
from ptd.data.templates import MASK_SLOT, Template
from ptd.readouts.cloze import Word
from ptd.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Variant:
    """A sequence of a row: ``pattern`` with ``inserted`` in place of the mask, read at ``width`` positions.

    The first of these positions is the mask's plus ``shift``: -1 for a causal model, which predicts a token one
    position before it.
    """

    pattern: int
    inserted: tuple[int, ...]
    width: int
    shift: int

    def apply(self, filled: Sequence[int]) -> tuple[list[int], range]:
        """Return the token ids of the sequence for a filled template, and the positions that are read."""
        slot = filled.index(MASK_SLOT)
        begin = slot + self.shift
        return [*filled[:slot], *self.inserted, *filled[slot + 1 :]], range(begin, begin + self.width)


def plan_sequences(
    templates: Sequence[Template],
    verbalizer: Mapping[str, Sequence[str]],
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    causal: bool,
) -> tuple[list[Variant], list[Word]]:
    """Return the sequences of every row, pattern by pattern, and which tokens are read at which of their positions.

    Masked model: all words of k tokens share one sequence with k masks. Causal model: a word's sequence ends before its
    last token, and words with the same sequence share it, so all words of one token share the prompt without a word.
    Raises `UserError` for words that cannot be read, and for a masked model's tokenizer without a mask token.
    """
    mask = tokenizer.mask_token_id
    if mask is None and not causal:
        raise UserError(
            f"task.patterns: {templates[0].source!r} has a {{mask}}, but the tokenizer {tokenizer.name_or_path!r} has "
            "no mask token to put there; use a backbone that was trained to fill masks, or remove {mask} and "
            "task.verbalizer to train a head"
        )
    variants: list[Variant] = []
    words: list[Word] = []
    start = 0
    for number, template in enumerate(templates):
        found = word_tokens(template, verbalizer, labels, tokenizer)
        inserted = {(label, tokens): tokens[:-1] if causal else (mask,) * len(tokens) for label, tokens in found}
        first_of: dict[tuple[int, ...], int] = {}
        for label, tokens in sorted(found, key=lambda item: len(item[1])):
            between = inserted[label, tokens]
            if between not in first_of:
                first_of[between] = start
                variants.append(Variant(number, between, len(tokens), -1 if causal else 0))
                start += len(tokens)
            first = first_of[between]
            words.append(Word(number, label, tuple(range(first, first + len(tokens))), tokens))
    return variants, words


def word_tokens(
    template: Template,
    verbalizer: Mapping[str, Sequence[str]],
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> list[tuple[int, tuple[int, ...]]]:
    """Return the label number and the token ids of each word, tokenised as in the pattern.

    The literal text before ``{mask}`` determines the space that many tokenizers make part of the word. Raises
    `UserError` for a word without tokens or with the unknown token, and for two words with the same tokens.
    """
    context, spaces = template.mask_context
    (before,) = encode(tokenizer, [context])
    owner: dict[tuple[int, ...], tuple[str, str]] = {}
    found = []
    for number, label in enumerate(labels):
        for word in verbalizer[label]:
            place = f"task.verbalizer.{label}: the word {word!r}"
            whole, alone = encode(tokenizer, [context + spaces + word.strip(), spaces + word.strip()])
            # If the word changes the tokens of the text before it, use the tokens of the word alone.
            tokens = tuple(whole[len(before) :] if whole[: len(before)] == before else alone)
            if not tokens or not word.strip():
                raise UserError(f"{place} has no tokens in {template.source!r}; give another word")
            if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokens:
                raise UserError(
                    f"{place} is unknown to the tokenizer, so the model has no probability for it; give another word"
                )
            if tokens in owner:
                other_label, other = owner[tokens]
                raise UserError(
                    f"{place} has the same tokens as {other!r} of label {other_label!r}, so they cannot be told apart; "
                    "give each label words of its own"
                )
            owner[tokens] = (label, word)
            found.append((number, tokens))
    return found
