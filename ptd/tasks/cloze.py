"""Which sequences a row becomes when labels are words at ``{mask}``, and where in them each word is read."""

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
    """A sequence of a row: ``pattern`` with ``inserted`` where the mask stands, read at ``width`` positions.

    The first of them is ``shift`` positions behind the mask's place: a causal model says one position before it what
    stands there.
    """

    pattern: int
    inserted: tuple[int, ...]
    width: int
    shift: int

    def apply(self, filled: Sequence[int]) -> tuple[list[int], range]:
        """Token ids of the sequence that a filled template makes, and the positions that are read."""
        slot = filled.index(MASK_SLOT)
        begin = slot + self.shift
        return [*filled[:slot], *self.inserted, *filled[slot + 1 :]], range(begin, begin + self.width)


def plan(
    templates: Sequence[Template],
    verbalizer: Mapping[str, Sequence[str]],
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    causal: bool,
) -> tuple[list[Variant], list[Word]]:
    """The sequences of every row, pattern by pattern, and which tokens are read where in them.

    Masked: words of k tokens share the sequence with k masks. Causal: words share the sequence that ends before their
    last token, so all words of one token have the bare prompt. Raises `UserError` for words that cannot be read.
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
    """Label number and token ids of each word as they stand in the pattern.

    The literal text before ``{mask}`` decides about the space that many tokenizers make a part of the word. Raises
    `UserError` for a word without tokens or with an unknown one, and for two words of the same tokens.
    """
    context, spaces = template.mask_context
    (before,) = encode(tokenizer, [context])
    owner: dict[tuple[int, ...], tuple[str, str]] = {}
    found = []
    for number, label in enumerate(labels):
        for word in verbalizer[label]:
            place = f"task.verbalizer.{label}: the word {word!r}"
            whole, alone = encode(tokenizer, [context + spaces + word.strip(), spaces + word.strip()])
            # Where the word changes how the text before it is split, it is read as it stands alone.
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
