"""Fixtures that build tiny tokenizers; they need no network."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(*, bos: bool = False, appended_eos: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per byte, so lengths are clear; ``appended_eos``: its post-processor adds EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate([*SPECIALS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    if bos or appended_eos:
        backend.post_processor = processors.TemplateProcessing(
            single=("<s> " if bos else "") + "$A" + (" </s>" if appended_eos else ""),
            special_tokens=[("<s>", 0), ("</s>", 1)],
        )
    names = {"bos_token": "<s>", "pad_token": "<pad>", **({"eos_token": "</s>"} if eos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def word_tokenizer(words: str, *, bos: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word of ``words``; other words become <unk>."""
    vocab = {word: index for index, word in enumerate(["<s>", "</s>", "<unk>", *dict.fromkeys(words.split())])}
    backend = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def make_bytes():
    return byte_tokenizer


@pytest.fixture
def make_words():
    return word_tokenizer
