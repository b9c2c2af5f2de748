"""The families' real tokenizers with small vocabularies, and readouts run by transformers alone, without a network."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertTokenizer,
    MBartTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    T5Tokenizer,
)

from ptd.readouts import Ask, Run
from ptd.types import Batch

LETTERS = string.ascii_lowercase + string.digits
MARKS = ".,?!'-"


def bert() -> BertTokenizer:
    """Return a WordPiece tokenizer with a few words, single letters and ``##`` letters."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "in", "lives", *LETTERS, *MARKS]
    pieces = [*words, *(f"##{letter}" for letter in LETTERS)]
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)})


def roberta(*, add_prefix_space: bool = False) -> RobertaTokenizer:
    """Return a byte-level BPE tokenizer with merges that require a leading space, like BART's and RoBERTa's."""
    merges = [("Ġ", "l"), ("Ġl", "i"), ("i", "n"), ("Ġ", "in")]
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {symbol: index for index, symbol in enumerate([*symbols, *("".join(pair) for pair in merges)])}
    return RobertaTokenizer(vocab=vocab, merges=merges, add_prefix_space=add_prefix_space)


def t5() -> T5Tokenizer:
    """Return a Unigram tokenizer; every text ends in </s>."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS, *MARKS, "▁in", "in"]
    return T5Tokenizer(vocab=[(piece, -1.0 if len(piece) > 1 else -2.0) for piece in pieces], extra_ids=0)


def mbart(source: str = "en_XX", target: str = "ro_RO") -> MBartTokenizer:
    """Return a Unigram tokenizer; every text ends in </s> and the code of its language."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS, *MARKS]
    return MBartTokenizer(
        vocab=[*((piece, -2.0) for piece in pieces), ("en_XX", 0.0), ("ro_RO", 0.0), ("<mask>", 0.0)],
        src_lang=source,
        tgt_lang=target,
    )


def byte_level(*, specials: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, like a decoder's; it adds BOS if ``specials``, otherwise nothing."""
    symbols = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if specials:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**names, **options})


ALL: dict[str, Any] = {
    "bert": bert,
    "roberta": roberta,
    "roberta-space": lambda: roberta(add_prefix_space=True),
    "t5": t5,
    "gpt": byte_level,
    "llama": lambda: byte_level(specials=True),
    "left": lambda: byte_level(specials=True, truncation_side="left", padding_side="left"),
}


def texts_of(tokenizer: PreTrainedTokenizerBase, ids: Any) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens([int(token) for token in ids]))


def plain_run(body: Callable[..., Any]) -> Run:
    """Return a ``run`` for readouts that lets a transformers body read one sequence at a time, without padding."""

    def run(batch: Batch, ask: Ask) -> torch.Tensor:
        found: dict[int, torch.Tensor] = {}
        for start, length in zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True):
            here = slice(start, start + length)
            given = {"input_ids": batch.input_ids.flatten()[here][None]}
            if batch.token_type_ids is not None:
                given["token_type_ids"] = batch.token_type_ids.flatten()[here][None]
            found |= dict(enumerate(body(**given).last_hidden_state[0], start))
        return torch.stack([found[position] for position in ask.positions.tolist()])

    return run
