"""Tiny random backbones of every supported family, and a byte-level tokenizer that fits them all. No network.

``from families import …`` works in every test (tests/conftest.py registers this file under that name).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<s>", "</s>")
PAD, BOS, EOS = range(3)
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
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": _GROUPED,
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "mixtral": {**_GROUPED, "num_local_experts": 4},
}
FAMILIES: tuple[str, ...] = tuple(_SETTINGS)
WINDOWED: tuple[str, ...] = ("mistral", "gemma2", "gemma3_text")


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """The config of a 2-layer, 32-wide model of ``family``; ``changes`` override its keys."""
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return AutoConfig.for_model(family, **{**_COMMON, **_SETTINGS.get(family, {}), **special, **changes})


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random causal language model in eval mode, fp32, with weights large enough that its logits say something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(0.2 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; ids 0–2 are ``<pad>``, ``<s>`` and ``</s>``, none of which is added by itself."""
    vocab = {symbol: index for index, symbol in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def save_backbone(folder: str | Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Write model and tokenizer as a folder that ``backbone.path`` takes."""
    tiny_model(family, seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)
