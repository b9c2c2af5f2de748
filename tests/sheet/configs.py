"""Tiny random models of every text family in transformers: 2 layers or a few more, 32 wide, 320 tokens.

A family keeps its own config; every field that is named in `SIZES` gets that size (also in sub-configs). The model has
one layer of each kind that the family has at full size. special.py lists the exceptions by hand.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from sheet.special import SPECIAL, TOWERS, VARIANTS

VOCAB, PAD, BOS, EOS = 320, 1, 0, 2
FIRST_WORD, LAST_WORD = 5, 260
"""The range of ids from which texts are drawn; higher ids represent images, sound and the like."""
WINDOW, LAYERS, WIDTH, HEADS, KV_HEADS, HEAD = 8, 2, 32, 4, 2, 8

_CLASSES = {
    "causal_lm": (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq_lm": (AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "masked_lm": (AutoModelForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "body": (AutoModel, modeling_auto.MODEL_MAPPING_NAMES),
}
KINDS = tuple(_CLASSES)

_BY_VALUE: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (VOCAB, ("vocab_size", "text_vocab_size", "vocab_size_per_layer_input")),
    (WIDTH, (
        "hidden_size", "d_model", "dim", "n_embd", "embedding_size", "word_embed_proj_dim", "emb_dim", "embed_dim",
        "d_embed", "text_hidden_size", "decoder_hidden_size", "rnn_hidden_size", "lstm_hidden_size",
    )),
    (LAYERS, (
        "num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers", "depth",
        "num_decoder_layers", "num_encoder_layers", "decoder_num_hidden_layers", "encoder_num_hidden_layers",
    )),
    (HEADS, (
        "num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads",
        "num_encoder_attention_heads", "num_decoder_attention_heads", "decoder_num_attention_heads",
        "encoder_num_attention_heads",
    )),
    (KV_HEADS, (
        "num_key_value_heads", "decoder_num_key_value_heads", "encoder_num_key_value_heads",
        "num_global_key_value_heads", "swa_num_key_value_heads",
    )),
    (HEAD, ("head_dim", "d_kv", "qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim", "global_head_dim", "dim_head",
           "d_head", "index_head_dim", "swa_head_dim", "swa_v_head_dim", "attention_head_dim")),
    (HEAD, ("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim")),
    (KV_HEADS, ("linear_num_key_heads",)),
    (HEADS, ("linear_num_value_heads", "linear_num_heads")),
    (16, ("chunk_size", "mamba_chunk_size", "ssm_state_size", "mamba_d_state")),
    (16, ("q_lora_rank", "kv_lora_rank", "hidden_size_per_layer_input", "projection_dim", "text_embed_dim")),
    (48, (
        "intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim",
        "ffn_hidden_size", "dim_ff", "d_inner", "shared_intermediate_size", "mlp_hidden_size",
        "dense_intermediate_size", "decoder_intermediate_size", "moe_shared_expert_intermediate_size",
    )),
    (24, ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size", "expert_dim",
         "moe_ffn_hidden_size", "expert_intermediate_size", "intermediate_size_mlp")),
    (4, ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_routed_experts",
        "index_n_heads", "expert_capacity")),
    (2, ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k", "num_experts_per_token")),
    (1, ("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts",
        "num_zero_experts", "zero_expert_num", "first_k_dense_replace", "num_mtp_layers", "max_window_layers",
        "moe_layer_start_index")),
    (WINDOW, ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "local_attention")),
    (256, ("max_position_embeddings", "n_positions", "max_seq_len", "max_source_positions", "max_target_positions",
          "n_ctx", "max_sequence_length", "max_decoder_position_embeddings", "original_max_position_embeddings")),
    (0.0, (
        "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "activation_dropout",
        "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "dropout_rate", "classifier_dropout", "layerdrop",
        "encoder_layerdrop", "decoder_layerdrop", "embedding_dropout", "mlp_dropout", "embedding_dropout_prob",
        "embed_dropout", "attention_dropout_prob", "ffn_dropout", "residual_dropout", "dropout_prob", "emb_pdrop",
        "summary_first_dropout", "dropouth", "router_jitter_noise", "input_jitter_noise", "dropout_p", "drop_path_rate",
        "router_dropout", "expert_dropout", "drop_rate",
    )),
    (True, ("use_sliding_window",)),
    (PAD, ("pad_token_id",)),
    (BOS, ("bos_token_id",)),
    (EOS, ("eos_token_id", "decoder_start_token_id")),
)  # fmt: skip
SIZES: dict[str, Any] = {name: value for value, names in _BY_VALUE for name in names}
SIZES |= {
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}


def model_types(kinds: Iterable[str] = KINDS) -> list[tuple[str, str]]:
    """Return every (model type, kind of output) that transformers' auto classes name."""
    names = {
        kind: {*_CLASSES[kind][1], *(name for name in VARIANTS if base(name) in _CLASSES[kind][1])} for kind in kinds
    }
    return [(name, kind) for kind in kinds for name in sorted(names[kind])]


def base(name: str) -> str:
    """Return the model type of a variant: of ``llama/yarn``, a llama with other settings, it is ``llama``."""
    return name.split("/")[0]


def tiny_config(model_type: str) -> PretrainedConfig:
    """Return the family's config at a tiny size."""
    config_class = CONFIG_MAPPING[base(model_type)]
    settings = _settings(config_class, base(model_type), VARIANTS.get(model_type, {}))
    config = config_class(**settings)
    for name, tower in TOWERS.get(model_type, {}).items():
        tower_class = CONFIG_MAPPING[tower["model_type"]]
        vars(config)[name] = tower_class(**_settings(tower_class, tower["model_type"], tower))
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = EOS  # checkpoints set it where the family's config has no such field
    _give_special_ids(config, VOCAB - 1)
    return config


def tiny_model(model_type: str, kind: str, seed: int = 0) -> PreTrainedModel:
    """Return a random fp32 model in eval mode; its weights are large enough that one token visibly affects another."""
    config = tiny_config(model_type)
    if kind == "causal_lm" and not config.is_encoder_decoder and getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    options = _pooling(model_type) if kind == "body" else {}
    names = _CLASSES[kind][1][base(model_type)]
    config.architectures = [names if isinstance(names, str) else names[0]]  # choose one if there are several
    torch.manual_seed(seed)
    model: PreTrainedModel = _CLASSES[kind][0].from_config(config, dtype=torch.float32, **options)
    redraw(model)
    return model.eval().requires_grad_(False)


def part(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Return the part of a model that is run: the encoder, for a trained head on an encoder-decoder; else the model."""
    encoder: PreTrainedModel = model.get_encoder() if kind == "body" and model.config.is_encoder_decoder else model
    return encoder


@torch.no_grad()
def redraw(model: torch.nn.Module) -> None:
    """Draw weights of standard deviation 0.2, norms near 1 and small biases, whatever the family's initialisation."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter, dtype=torch.float32)
        if parameter.ndim > 1:
            parameter.copy_(0.2 * noise)
        elif "norm" in name.lower() or bool((parameter == 1).all()):
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(parameter.clamp(-1, 1) + 0.1 * noise)


def _pooling(model_type: str) -> dict[str, Any]:
    """Return the option that omits the pooler of bodies that have one, as ptd does."""
    model_class = MODEL_MAPPING[CONFIG_MAPPING[base(model_type)]]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    takes = inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}


def _settings(
    config_class: type[PretrainedConfig], model_type: str, changes: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Return arguments for the config class: tiny sizes and one layer of each kind, also in sub-configs."""
    special: Mapping[str, Any] = {**SPECIAL.get(model_type, {}), **changes}
    known = {field.name: field.default for field in fields(config_class)}
    settings: dict[str, Any] = {
        name: value
        for name, value in SIZES.items()
        if name in known and (name.endswith("_token_id") or not isinstance(known[name], list | tuple))
    }
    for name in ("sliding_window", "attention_chunk_size"):  # a family without a window by default gets none
        if name in known and known[name] is None:
            settings.pop(name, None)
    if "kv_lora_rank" in known and "num_key_value_heads" in known:  # latent attention has no groups
        settings["num_key_value_heads"] = HEADS
    settings |= _layers(config_class, known, settings, special)
    for name, spec in config_class.sub_configs_defaults.items():
        given = special.get(name)
        if given is None and (spec.optional or name in special):
            continue
        sub_type = (given or {}).get("model_type") or spec.init_kwargs.get("model_type") or spec.model_type
        sub_class = spec.config_class
        if sub_class.__name__ == "AutoConfig":
            sub_class = CONFIG_MAPPING[sub_type]
        settings[name] = {**_settings(sub_class, sub_class.model_type), **(given or {}), "model_type": sub_type}
    return settings | {name: value for name, value in special.items() if name not in config_class.sub_configs_defaults}


def _layers(
    config_class: type[PretrainedConfig], known: dict[str, Any], settings: dict[str, Any], special: Mapping[str, Any]
) -> dict[str, Any]:
    """Return settings for one layer of each kind that the family has at full size, at least two layers."""
    names = [name for name in ("layer_types", "mlp_layer_types", "layers_block_type") if name in known]
    names = [name for name in names if name not in special]
    if not names or "num_hidden_layers" in special:
        return {}
    try:
        windows = {name: {**settings, **special}.get(name) for name in ("use_sliding_window", "sliding_window")}
        full = config_class(**{name: value for name, value in windows.items() if name in known})
    except Exception:
        return {}
    kinds = {name: list(dict.fromkeys(getattr(full, name, None) or ())) for name in names}
    kinds = {name: found for name, found in kinds.items() if found}
    if not kinds:
        return {}
    count = max(LAYERS, *(len(found) for found in kinds.values()))
    chosen: dict[str, Any] = {
        name: [found[index % len(found)] for index in range(count)] for name, found in kinds.items()
    }
    layers = next((name for name in ("num_hidden_layers", "num_layers", "n_layers") if name in known), None)
    return chosen | ({} if layers is None else {layers: count})


def _give_special_ids(config: PretrainedConfig, last: int) -> int:
    """Move the ids of images, sound and the like into the vocabulary, above those of words; return the next free id."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            last = _give_special_ids(value, last)
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCAB:
            setattr(config, name, last)
            last -= 1
    return last
