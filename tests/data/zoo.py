"""Small tokenizers of every kind, which differ in how they treat the space before a text. They need no network."""

from __future__ import annotations

import string
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|bot|>", "<|end|>"]
LETTERS = [*string.ascii_letters, *string.digits, *"():,.?!=-+_'\"<>|/", "é", "ü"]
WORDS = ["def", "yes", "no", "Hello", "answer", "is", "return"]


def _finished(backend: Tokenizer, *, bos: bool = True, **options: Any) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**names, **options})


def _merged(words: list[str]) -> list[tuple[str, str]]:
    """Return the merges that build each word from left to right."""
    merges = {(word[:size], word[size]): None for word in words for size in range(1, len(word))}
    return list(merges)


def sentencepiece(scheme: str = "legacy") -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer with byte fallback, like Llama-2's.

    ``legacy`` puts ▁ before every text, including a text after a special token; ``first`` puts it only before the
    first text; ``never`` (Gemma's) puts it nowhere.
    """
    merges = _merged([*(f"▁{word}" for word in WORDS), *WORDS])
    symbols = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS, *map("".join, merges)]
    vocab = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = [] if scheme == "never" else [decoders.Strip(content=" ", left=1)]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return _finished(backend)


def unigram(scheme: str = "always") -> PreTrainedTokenizerFast:
    """Return a Unigram tokenizer with Metaspace, like T5's, XGLM's and ALBERT's; it has no token for a line break."""
    pieces = [*SPECIALS, "▁", *LETTERS, *WORDS, *(f"▁{word}" for word in WORDS)]
    scores = [(piece, 0.0 if piece in SPECIALS else -2.0 - 3.0 / len(piece)) for piece in pieces]
    backend = Tokenizer(models.Unigram(scores, 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _finished(backend)


def byte_level(*, add_prefix_space: bool = False, normalizer: Any = None, **options: Any) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with merges that require a leading space, like GPT-2's."""
    merges = _merged([*(f"Ġ{word}" for word in WORDS), *WORDS])
    symbols = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocab = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return _finished(backend, **options)


def wordpiece() -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer with whole words and ``##`` continuations of words, like BERT's."""
    pieces = [*SPECIALS, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return _finished(backend)


def bytes_in_python() -> ByT5Tokenizer:
    """Return a tokenizer without a fast implementation."""
    return ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<|user|>", "<|bot|>", "<|end|>"])


ALL: dict[str, Any] = {
    "legacy": lambda: sentencepiece("legacy"),
    "first": lambda: sentencepiece("first"),
    "gemma": lambda: sentencepiece("never"),
    "unigram-always": lambda: unigram("always"),
    "unigram-first": lambda: unigram("first"),
    "unigram-never": lambda: unigram("never"),
    "bytes": byte_level,
    "bytes-space": lambda: byte_level(add_prefix_space=True),
    "wordpiece": wordpiece,
    "python": bytes_in_python,
}
