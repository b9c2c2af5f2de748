"""Build tiny random backbones of every supported family and a byte-level tokenizer for all, without a network.

``from families import …`` works in every test (tests/conftest.py registers this file under that name).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ptd.types import BackboneShape

SPECIALS = ("<pad>", "<s>", "</s>", "<mask>", "<unk>")
PAD, BOS, EOS, MASK, UNK = range(5)
VOCAB = len(SPECIALS) + 256
WINDOW = 32
"""Sliding window of the families that have one (mistral, gemma2, gemma3)."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}
_GROUPED = {"num_key_value_heads": 2}
_WIDE = {**_GROUPED, "head_dim": 16}  # heads × head_dim ≠ hidden size
_GEMMA = {**_WIDE, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}

_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": WINDOW},
    "qwen2": _GROUPED,
    "qwen3": _WIDE,
    # transformers' SDPA has no softcap, but older releases use it nevertheless
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 5.0, "attn_implementation": "eager"},
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": _GROUPED,
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "mixtral": {**_GROUPED, "num_local_experts": 4},
}
FAMILIES: tuple[str, ...] = tuple(_SETTINGS)
"""The decoders."""
_OWN_ATTENTION_SETTINGS: dict[str, dict[str, Any]] = {
    "bloom": {},
    "falcon": {"multi_query": False, "alibi": False, "new_decoder_architecture": False},
    "gptj": {"rotary_dim": 4, "n_inner": 48},
}
OWN_ATTENTION: tuple[str, ...] = tuple(_OWN_ATTENTION_SETTINGS)
"""Decoders whose attention ptd cannot replace: a prefix goes through their own cache."""
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ENCODER_SETTINGS: dict[str, dict[str, Any]] = {
    "bert": _QUIET,
    "roberta": {**_QUIET, "type_vocab_size": 1},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0},
    "modernbert": {"layer_types": ["full_attention", "sliding_attention"], "local_attention": 16, "cls_token_id": BOS},
}
ENCODERS: tuple[str, ...] = tuple(_ENCODER_SETTINGS)
_BART: dict[str, Any] = {
    "d_model": 32,
    **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
       (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))},
    "dropout": 0.0,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
}  # fmt: skip
_ENCODER_DECODER_SETTINGS: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
           "decoder_start_token_id": PAD, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
    "bart": _BART,
    "mbart": {**_BART, "scale_embedding": True},
}  # fmt: skip
ENCODER_DECODERS: tuple[str, ...] = tuple(_ENCODER_DECODER_SETTINGS)
WINDOWED: tuple[str, ...] = ("mistral", "gemma2", "gemma3_text")


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """Return the config of a 2-layer, 32-wide model of ``family``; ``changes`` override its keys."""
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    if family in ENCODER_DECODERS:
        common = {key: _COMMON[key] for key in ("vocab_size", "max_position_embeddings")}
        return AutoConfig.for_model(family, **{**common, **_ENCODER_DECODER_SETTINGS[family], **special, **changes})
    settings = {**_ENCODER_SETTINGS, **_SETTINGS, **_OWN_ATTENTION_SETTINGS}.get(family, {})
    return AutoConfig.for_model(family, **{**_COMMON, **settings, **special, **changes})


def _auto_class(family: str) -> Any:
    if family in ENCODER_DECODERS:
        return AutoModelForSeq2SeqLM
    return AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random language model in eval mode and fp32, with weights large enough for meaningful logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _auto_class(family).from_config(tiny_config(family, **changes), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(0.2 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model.eval()


def attend_by(model: PreTrainedModel, implementation: str) -> None:
    """Set every stack's attention; in older releases, ``set_attn_implementation`` does not change T5's two stacks."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = implementation


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with the special tokens `SPECIALS`, then one token per byte; it adds no special token."""
    vocab = {symbol: index for index, symbol in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
        unk_token="<unk>",
        padding_side="left",
    )


def save_backbone(folder: str | Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Write a model and its tokenizer to a folder that ``backbone.path`` accepts."""
    tiny_model(family, seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


class DrawnConditioner:
    """Replaces a backbone: whatever an initialiser needs is drawn at random, with the widths of ``shape``."""

    def __init__(self, shape: BackboneShape, seed: int = 0) -> None:
        self.shape = shape
        self._generator = torch.Generator().manual_seed(seed)

    def rows(self, count: int) -> list[list[int]]:
        return [torch.randint(self.shape.vocab_size, (count,), generator=self._generator).tolist()]

    chunks = rows

    def frequent(self, count: int) -> list[int]:
        return self.rows(count)[0]

    def token_ids(self, text: str, *, special: bool = False) -> list[int]:
        return [ord(letter) % self.shape.vocab_size for letter in text]

    def keys_and_values(self, sides: Sequence[Sequence[int]]) -> Tensor:
        width = sum(layer.numel for layer in self.shape.layers)
        scale = torch.linspace(0.1, 3.0, width)
        return scale * torch.randn(len(sides[0]), width, generator=self._generator)

    def embeddings(self, ids: Sequence[int]) -> Tensor:
        return 0.2 * torch.randn(len(ids), self.shape.input_size, generator=self._generator)
