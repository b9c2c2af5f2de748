"""Settings that some families need at the tiny size in addition to `sheet.configs.SIZES`, by model type.

Sub-configs are included. A model has layers of every kind in the family's checkpoints; this file names them if the
default config has only one kind.
"""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

THETA: Settings = {"rope_type": "default", "rope_theta": 10000.0}
WINDOWS: Settings = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
KV_SHARED: Settings = {
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    "sliding_window": 8,
}  # fmt: skip
MAMBA: Settings = {"mamba_n_heads": 4, "mamba_d_head": "auto", "mamba_d_state": 16, "mamba_chunk_size": 16}
CONV: Settings = {"layer_types": ["conv", "full_attention"]}
CODEC: Settings = {"num_filters": 2, "depths": [1] * 7}


def mrope(*sections: int) -> Settings:
    """Return settings for a rotary embedding over time, height and width with these numbers of a head's frequencies."""
    return {"rope_parameters": {**THETA, "mrope_section": list(sections)}}


DECODERS: dict[str, Settings] = {
    "afmoe": {"num_dense_layers": 1},
    "blt": {"encoder_hash_byte_group_vocab": 64, "local_attention_window_len": 8},
    "blt_local_decoder": {"hidden_size_global": 32},
    "blt_local_encoder": {"hidden_size_global": 32},
    "codegen": {"rotary_dim": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        "rope_parameters": THETA,
    },
    "diffusion_gemma_text": {**WINDOWS, "global_head_dim": 16},
    "embedding_gemma2_text": {**WINDOWS, "global_head_dim": 16},
    "gemma3n_text": {**KV_SHARED, "laurel_rank": 8},
    "gemma4_text": {**KV_SHARED, "global_head_dim": 16},
    "gemma4_unified_text": {**KV_SHARED, "global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "llama4_text": {"no_rope_layers": [1, 0]},
    "modernbert-decoder": {"local_attention": 16},  # a window of 8: the setting counts both sides, and only one is used
    "smollm3": {"no_rope_layers": [1, 0]},
    "unlimited_ocr_text": {"num_key_value_heads": 4},
}
HYBRIDS: dict[str, Settings] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32},
    "glm5_next_text": {
        "qk_rope_head_dim": 0, "qk_nope_head_dim": 8, "index_kpool": 2, "index_topk": 8, "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "lfm2": CONV,
    "lfm2_moe": {**CONV, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 16, "chunk_size": 16},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2},
    "qwen4_exp_text": {
        "num_experts_per_tok": 2, "hc_lowrank": 16, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8,
        "indexer_budget": 8, "indexer_compress_ratio": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xlstm": {"qk_dim_factor": 1.0, "chunk_size": 16},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "cca_time0": 2, "cca_time1": 2, "router_hidden_size": 16},
}  # fmt: skip
ENCODERS: dict[str, Settings] = {
    "canine": {"downsampling_rate": 2, "local_transformer_stride": 8, "upsampling_kernel_size": 2},
    "encoder-decoder": {
        "encoder": {"model_type": "bert"},
        "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
    },
    "esmc": {"num_key_value_heads": 4},
    "funnel": {"block_sizes": [2, 2], "block_repeats": None},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 2},
    "mpnet": {"relative_attention_num_buckets": 32},
    "neomme": {"head_dim": 16},
    "reformer": {
        "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16], "attn_layers": ["local", "lsh"],
        "attention_head_size": 8, "feed_forward_size": 48, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
        "num_buckets": 2, "local_attention_probs_dropout_prob": 0.0,
    },
    "t5gemma2_text": {"dropout_rate": 0.0, "attention_dropout": 0.0},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip
WITH_IMAGES: dict[str, Settings] = {
    "chameleon": {"vocabulary_map": {"<image>": 310}},
    "cohere_compass_text": {
        **WINDOWS,
        "rope_parameters": {name: {**THETA, "mrope_section": [2, 1, 1]} for name in WINDOWS["layer_types"]},
    },
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense", "dense"]},
    "emu3": {"vocabulary_map": {"<image>": 310}},
    "emu3_vqgan": {"base_channels": 32, "embed_dim": 4},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [24, 24], **mrope(1, 1, 2)},
    "glm4v_moe_text": mrope(1, 1, 0),
    "granite4_vision": {
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 64},
        "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1], "downsample_rate": "4/8",
    },
    "granite_docling_vision": {"out_hidden_size": 32, "deepstack_visual_indexes": [0, 1]},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 312},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 312},
    "step3p5": {**WINDOWS, "mlp_layer_types": ["dense", "sparse"]},
    **{
        f"{name}_text": mrope(2, 1, 1)
        for name in ("cosmos3_edge", "glm4v", "glm_image", "glm_ocr", "hunyuan_vl", "paddleocr_vl", "qwen2_5_omni",
                     "qwen2_5_vl", "qwen2_vl", "qwen3_omni_moe", "qwen3_vl", "qwen3_vl_moe")
    },
}  # fmt: skip
WITH_SOUND: dict[str, Settings] = {
    "csm": {"num_codebooks": 4},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8, "hidden_size": 32}},
    "gemma3n_audio": {"vocab_offset": 328, "vocab_size": 8, "conf_num_hidden_layers": 1},
    "gradium_phonon_tts": {"flow_head_config": {"condition_dim": 32}},
    "kyutai_speech_to_text": {"num_codebooks": 4},
    "mimi": {"num_filters": 4, "upsample_groups": 32},
    "muse_spark_audio": {
        "num_hidden_layers": 2, "patch_sizes": [16, 6], "hidden_sizes": [16, 16], "depths": [1, 1],
        "out_hidden_size": 32,
    },
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 319},
    "nemotron3_diarization": {"head_config": {"audio_hidden_size": 32}},
    "pocket_tts": {"flow_head_config": {"condition_dim": 32}},
    "vibevoice_acoustic_tokenizer": CODEC,
    "vibevoice_acoustic_tokenizer_encoder": CODEC,
}  # fmt: skip
SPECIAL = {**DECODERS, **HYBRIDS, **ENCODERS, **WITH_IMAGES, **WITH_SOUND}

TOWER: Settings = {
    "model_type": "siglip_vision_model", "vocab_offset": 320, "vocab_size": 8, "rms_norm_eps": 1e-6,
    "model_args": {"embed_dim": 32},
}  # fmt: skip
TOWERS = {name: {"vision_config": TOWER} for name in ("fast_vlm", "gemma3n", "perception_lm")}
"""Image encoders in place of timm's, which is not installed; a text never reaches them."""

VARIANTS: dict[str, Settings] = {
    "albert/groups": {"num_hidden_groups": 2},
    "big_bird/full": {"attention_type": "original_full"},
    "bigbird_pegasus/full": {"attention_type": "original_full"},
    "esm/esm2": {"position_embedding_type": "rotary", "token_dropout": True, "mask_token_id": 4},
    "gemma3_text/bidirectional": {"use_bidirectional_attention": True, "sliding_window": 8},
    "gpt2/scaled": {"scale_attn_by_inverse_layer_idx": True},
    "gpt2/upcast": {"reorder_and_upcast_attn": True},
    "granite/multipliers": {
        "embedding_multiplier": 3.0, "attention_multiplier": 0.25, "residual_multiplier": 0.5, "logits_scaling": 2.0,
    },
    "llama/dynamic": {
        "max_position_embeddings": 8, "rope_parameters": {**THETA, "rope_type": "dynamic", "factor": 2.0},
    },
    "llama/yarn": {
        "rope_parameters": {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    },
    "llama4_text/tuned": {"no_rope_layers": [1, 0], "floor_scale": 4, "attn_scale": 0.5},
    "mbart/scaled": {"scale_embedding": True},
    "ministral3/tempered": {
        "rope_parameters": {
            **THETA, "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4,
            "max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "mistral/whole": {"sliding_window": None},
    "opt/350m": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "phi3/longrope": {
        "max_position_embeddings": 64, "original_max_position_embeddings": 8,
        "rope_parameters": {
            **THETA, "rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 8,
            "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.0, 2.0, 4.0, 8.0],
        },
    },
    "qwen2/whole": {"use_sliding_window": False},
    "qwen2_moe/whole": {"use_sliding_window": False},
    "t5/v1_1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}  # fmt: skip
"""Families with settings that their checkpoints have but their default config lacks."""
