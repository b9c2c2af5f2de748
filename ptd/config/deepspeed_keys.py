"""The keys of a DeepSpeed JSON, by what ptd does with them: honour, ignore with a warning, or refuse."""

from __future__ import annotations

from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The fields of DeepSpeedZeroConfig by the type of their value (a test compares them with DeepSpeed's class).
ZERO_FLAGS = _names(
    "allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients cpu_offload cpu_offload_param "
    "cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks gather_16bit_weights_on_model_save "
    "ignore_unused_parameters legacy_stage1 load_from_fp32_weights log_trace_cache_warnings memory_efficient_linear "
    "overlap_comm override_module_apply parameter_alignment pipeline_loading_checkpoint reduce_scatter "
    "round_robin_gradients save_muon_momentum_buffer_in_memory stage3_allgather_sequential "
    "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
    "stage3_use_all_reduce_for_fetch_params use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce "
    "zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights"
)
ZERO_SIZES = _names(
    "stage allgather_bucket_size max_live_parameters max_reuse_distance model_persistence_threshold "
    "module_granularity_threshold param_persistence_threshold prefetch_bucket_size reduce_bucket_size "
    "stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold "
    "stage3_module_granularity_threshold stage3_param_persistence_threshold stage3_prefetch_bucket_size "
    "sub_group_size zero_hpz_partition_size"
)
ZERO_SECTIONS = frozenset({"leaf_module", "offload_optimizer", "offload_param", "zenflow"})
ZERO_KEYS = ZERO_FLAGS | ZERO_SIZES | ZERO_SECTIONS
OFFLOAD_PARAM_KEYS = frozenset({"device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"})
BF16_KEYS = _names(
    "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
)
FP16_KEYS = _names(
    "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
    "min_loss_scale fp16_master_weights_and_grads"
)
ADAM_KEYS = _names(
    "lr betas eps weight_decay torch_adam adam_w_mode bias_correction amsgrad fp32_optimizer_states max_grad_norm"
)

HONOURED = _names(
    "zero_optimization aio gradient_clipping bf16 bfloat16 fp16 train_batch_size train_micro_batch_size_per_gpu "
    "gradient_accumulation_steps optimizer scheduler"
)
# Keys for reporting, or for gradients and optimizer state, which the backbone does not have.
IGNORED = _names(
    "activation_checkpointing check_overflow checkpoint comet comms_logger communication_data_type csv_monitor "
    "dataloader_drop_last datastates disable_allgather disable_python_gc dump_state flops_profiler "
    "gradient_predivide_factor log_level managed_gradient_accumulation memory_breakdown prescale_gradients "
    "seq_parallel_communication_data_type steps_per_print tensorboard timers use_data_before_expert_parallelism "
    "vocabulary_size wall_clock_breakdown wandb zero_allow_untested_optimizer zero_force_ds_cpu_optimizer"
)
ZERO_IGNORED = {
    "offload_optimizer": "the frozen backbone has no optimizer; to save GPU memory set zero_optimization.offload_param",
    "cpu_offload": "the frozen backbone has no optimizer; to save GPU memory set zero_optimization.offload_param",
    "zero_quantized_gradients": "the frozen backbone has no weight gradients",
    "compute_grad_norm": "the frozen backbone has no weight gradients",
    "elastic_checkpoint": "ptd writes its own checkpoints",
}
FP16_IGNORED = {
    "auto_cast": "the backbone's inputs are token ids",
    "hysteresis": "ptd lowers the loss scale at every overflow",
    "consecutive_hysteresis": "ptd lowers the loss scale at every overflow",
    "min_loss_scale": "ptd may lower the loss scale to 1",
    "fp16_master_weights_and_grads": "the frozen backbone has no weight gradients",
}
_GONE = "DeepSpeed has removed this feature; remove the key"
REFUSED = {
    "amp": f"{_GONE} and set backbone.dtype",
    "autotuning": "DeepSpeed's tuner needs a run with a DeepSpeed optimizer; remove it",
    "compile": "DeepCompile needs a model with a DeepSpeed optimizer; remove it",
    "compression_training": _GONE,
    "curriculum_learning": _GONE,
    "data_efficiency": "ptd reads and orders the data itself; remove it",
    "data_types": "the backbone has one dtype and the prompt encoder is float32; remove it and set backbone.dtype",
    "eigenvalue": _GONE,
    "elasticity": f"{_GONE}: a checkpoint of ptd can be resumed with another number of processes",
    "expert_parallel": "ptd does not distribute experts; remove it (ZeRO-3 shards them like other weights)",
    "gradient_allreduce_op": "ptd divides by the number of supervised tokens of all ranks; remove it",
    "graph_harvesting": _GONE,
    "hybrid_engine": "it serves RLHF with a DeepSpeed optimizer; remove it",
    "nebula": _GONE,
    "pipeline": "ptd has no pipeline parallelism; remove it and use zero_optimization.stage 3",
    "progressive_layer_drop": _GONE,
    "quantize_training": _GONE,
    "sequence_parallel_size": "ptd has no sequence parallelism; remove it or set 1",
    "sparse_attention": _GONE,
    "sparse_gradients": _GONE,
    "tensor_parallel": "ptd shards the backbone by ZeRO-3 only; remove it and use zero_optimization.stage 3",
    "torch_autocast": "it would compute in another dtype than backbone.dtype; remove it and set backbone.dtype",
    "weight_quantization": "it is for DeepSpeed's inference engine; remove it",
}
ZERO_REFUSED = {
    "mics_hierarchical_params_gather": _GONE,
    "mics_shard_size": _GONE,
    "zenflow": "it overlaps optimizer steps of the backbone, which has none; remove it",
    "zero_quantized_nontrainable_weights": "it works in fp16 on CUDA only and rounds the weights; remove it",
    "zero_quantized_weights": "it would run the backbone with weights rounded to int8 at every gather; remove it",
    "zeropp_loco_param": _GONE,
}
# Values without effect (as well as false, null, 0, {} and "auto"), which need no warning.
NEUTRAL: dict[str, Any] = {
    "compute_grad_norm": True,
    "gradient_allreduce_op": "mean",
    "gradient_predivide_factor": 1,
    "hysteresis": 1,
    "min_loss_scale": 1,
    "sequence_parallel_size": 1,
    "zero_hpz_partition_size": 1,
}

OPTIMIZERS = dict.fromkeys(("adam", "adamw", "fusedadam", "deepspeedcpuadam", "cpuadam"), "adamw") | dict.fromkeys(
    ("lion", "fusedlion", "deepspeedcpulion", "cpulion"), "lion"
)
"""DeepSpeed's names of optimizers, in small letters -> ``train.optimizer``."""
SCHEDULERS = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
