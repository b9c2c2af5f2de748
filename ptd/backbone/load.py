"""Load a frozen language model, with the checkpoint's own weights or quantised."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file

from ptd.backbone.fp8 import check_device, quantise
from ptd.backbone.fusion import Fusion, choose_fusion
from ptd.backbone.liger import use_liger
from ptd.backbone.quantize import keep_differentiable, quantization_of
from ptd.backbone.shared_input import share_inputs
from ptd.config import BackboneConfig
from ptd.types import DTYPES, Architecture, Output, UserError

_CLASSES: dict[str, tuple[Any, Any]] = {
    "causal_lm": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "masked_lm": (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING),
    "seq2seq_lm": (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    "body": (AutoModel, MODEL_MAPPING),
}
Check = Callable[[type[PreTrainedModel] | None, Any], None]


def architecture_of(config: BackboneConfig) -> Architecture:
    """Return the kind of transformer, from the checkpoint's config alone; raises `UserError` if that cannot be read."""
    model_config = _model_config(config)
    if model_config.is_encoder_decoder:
        return "encoder-decoder"
    reads_both_ways = type(model_config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(
        model_config, "is_decoder", False
    )
    return "encoder" if reads_both_ways else "decoder"


def dtype_of(config: BackboneConfig) -> torch.dtype:
    """Return the dtype of the weights; ``auto``: that of the checkpoint's config, else float32. Raises `UserError`."""
    return DTYPES.get(config.dtype) or _model_config(config).dtype or torch.float32


def fusion_of(config: BackboneConfig, device_type: str) -> Fusion:
    """Return how `load_model` runs the elementwise work on ``cuda`` or ``cpu``; raises `UserError` as it does."""
    return choose_fusion(config, _model_config(config).model_type, device_type)


def text_config_of(config: BackboneConfig) -> Any:
    """Return the config of the checkpoint's text model; raises `UserError` if it cannot be read."""
    return _model_config(config).get_text_config()


def vocabulary_of(text_config: Any) -> int | None:
    """Return the number of rows of the embedding, from the config alone; None if the config does not name it."""
    size = getattr(text_config, "vocab_size", None)
    return size if isinstance(size, int) else None


def embeddings_of(model: PreTrainedModel) -> int:
    """Return the number of rows of a model's embedding, sharded or not."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.num_embeddings)


def load_model(
    config: BackboneConfig,
    output: Output = "causal_lm",
    *,
    device: torch.device,
    sharded: bool = False,
    check: Check = lambda model_class, model_config: None,
) -> PreTrainedModel:
    """Load the model of ``config.path`` in eval mode with every parameter frozen.

    Args:
        output: what the model computes; ``body``: the last hidden states (of an encoder-decoder, the encoder's).
        device: where the model goes. Weights are read directly to it, one at a time, if all that is read stays there.
        sharded: each weight is moved elsewhere as soon as it is read (`ptd.distributed.zero3.Shards`).
        check: called with model class and model config before any weight is read; raises if it rejects the model.

    Raises:
        UserError: the folder or hub id cannot be read, its weights do not match its config, or ``device`` cannot run
            them as ``config`` requires.
    """
    if config.quantization == "fp8":
        check_device(device)
    built_as = Blueprint.of(config, output, check)
    fusion = choose_fusion(config, built_as.config.model_type, device.type)
    options = dict(built_as.options)
    quantized = quantization_of(config, built_as.config, sharded=sharded)
    if quantized is not None:
        options["quantization_config"] = quantized
    # What is read may not fit the device if only a part stays: 8 of 16 bits, or the encoder without its decoder.
    stays = config.quantization != "fp8" and not (output == "body" and built_as.config.is_encoder_decoder)
    if quantized is not None or (stays and not sharded):
        options["device_map"] = {"": device}
    with readable(config):
        contradictory = _contradictory_settings(config)
        if contradictory is not None:
            options["generation_config"] = GenerationConfig()
        model, report = built_as.auto_class.from_pretrained(
            config.path,
            config=built_as.config,
            revision=config.revision,
            dtype=DTYPES.get(config.dtype, config.dtype),
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if config.allow_pickle else True,
            output_loading_info=True,
            **options,
        )
        if report["missing_keys"]:  # transformers fills them with random numbers and continues
            raise ValueError(f"the checkpoint lacks the weights {', '.join(sorted(report['missing_keys'])[:3])}.")
    if contradictory is not None and model.can_generate():
        model.generation_config = contradictory
    placed = sharded or getattr(model, "is_quantized", False)
    model = frozen(model, config, output)
    if config.quantization == "fp8":
        quantise(model, device)
    if fusion.by == "liger":
        use_liger(model)
        if not sharded:
            share_inputs(model)
    return model if placed else model.to(device)


def _contradictory_settings(config: BackboneConfig) -> GenerationConfig | None:
    """Return the checkpoint's generation settings if they contradict each other; None if they do not, or are missing.

    transformers refuses to load a model with contradictory settings, although neither training nor generation with
    explicit settings needs them.
    """
    file = cached_file(
        config.path,
        "generation_config.json",
        revision=config.revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return None
    found = json.loads(Path(file).read_text(encoding="utf-8"))
    try:
        GenerationConfig(**found)
    except ValueError:
        own = GenerationConfig()
        for name, value in found.items():
            setattr(own, name, value)
        return own
    return None


@dataclass(frozen=True)
class Blueprint:
    """What a model is built from: transformers' class, the class's options, and the model's config without dropout."""

    auto_class: Any
    config: Any
    options: dict[str, Any]

    @classmethod
    def of(cls, config: BackboneConfig, output: Output, check: Check) -> Blueprint:
        """Build the blueprint from the config alone; raises `UserError`, and whatever ``check`` raises."""
        model_config = _model_config(config)
        # A frozen body has nothing to regularise, but checkpointed layers run in training mode and would apply dropout.
        for name, value in model_config.to_dict().items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(model_config, name, 0.0)
        auto_class, mapping = _CLASSES[output]
        model_class = mapping.get(type(model_config), None)
        model_class = model_class[0] if isinstance(model_class, tuple) else model_class
        check(model_class, model_config)
        options: dict[str, Any] = {}
        if model_class is not None and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
            options["add_pooling_layer"] = False  # never read: trained for another task, and in few checkpoints
        return cls(auto_class, model_config, options)


def _encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the encoder of an encoder-decoder. Raises `UserError` if it is no model of its own in transformers."""
    encoder = model.get_encoder()
    if not isinstance(encoder, PreTrainedModel):
        raise UserError(
            f"backbone.path: the encoder of {type(model).__name__} is a plain {type(encoder).__name__}, no model of "
            "transformers, so ptd cannot run it alone; use task.kind: seq2seq_lm, or an encoder such as bert"
        )
    return encoder


def frozen(model: PreTrainedModel, config: BackboneConfig, output: Output) -> PreTrainedModel:
    """Return the part of a model that runs, in eval mode and with frozen parameters."""
    if getattr(model, "is_quantized", False):  # not otherwise: importing bitsandbytes takes two seconds
        keep_differentiable(model)
    if output == "body" and model.config.is_encoder_decoder:
        model = _encoder_of(model)
    model.requires_grad_(False)
    model.eval()
    if config.gradient_checkpointing:
        checkpoint_layers(model)
    return model


def _model_config(config: BackboneConfig) -> Any:
    _explain_missing(config)
    with readable(config):
        return AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Recompute each layer in the backward pass, with the model in eval mode (no dropout, no batch statistics).

    Raises `UserError` if the model does not support gradient checkpointing.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"backbone.gradient_checkpointing: {type(model).__name__} does not support gradient checkpointing; set "
            "gradient_checkpointing: false"
        )
    # Some releases of transformers have only the older name; in the others the older name warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            layers = [module for module in part.modules() if isinstance(module, GradientCheckpointingLayer)]
            part.register_forward_pre_hook(partial(_train_while_recording, layers))


def _train_while_recording(layers: list[GradientCheckpointingLayer], stack: torch.nn.Module, _: Any) -> None:
    # transformers checkpoints only layers in training mode (their children stay in eval mode), and then drops the
    # layer's cache, which generation needs. Some releases read the mode before a layer's own hooks run.
    for layer in layers:
        layer.training = torch.is_grad_enabled()


def load_tokenizer(config: BackboneConfig) -> Any:
    """Return the backbone's tokenizer; raises `UserError` if it cannot be read."""
    _explain_missing(config)
    with readable(config):
        return AutoTokenizer.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )


def _explain_missing(config: BackboneConfig) -> None:
    path = Path(config.path).expanduser()
    looks_local = path.is_absolute() or config.path.startswith((".", "~")) or config.path.count("/") != 1
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"backbone.path: the folder {config.path} has no config.json, so it is not a saved model")
    elif path.exists() or (looks_local and "/" in config.path):
        raise UserError(f"backbone.path: there is no model folder {config.path}; check the path")


class readable:
    """Context manager that turns any exception about a checkpoint into a `UserError` that names the key."""

    def __init__(self, config: BackboneConfig) -> None:
        self.path = config.path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):  # transformers raises many types
            reason = str(error).strip().split("\n")[0]
            advice = "Give a folder that save_pretrained wrote, or the id of a hub model that this machine can reach."
            if "safetensors" in reason and any(Path(self.path).expanduser().glob("*.bin")):
                advice = (
                    "Its .bin files are pickles: convert them (save_pretrained writes safetensors), or set "
                    "backbone.allow_pickle: true to unpickle them as tensors only."
                )
            raise UserError(f"backbone.path: cannot load {self.path!r}: {reason} {advice}") from error
