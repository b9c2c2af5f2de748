"""The adapter folder: PEFT's format, plus ``ptd.json`` with what PEFT has no field for.

``adapter_model.safetensors`` holds ``prompt_embeddings`` fp32 ``[P, Σ layers H·(Dk+Dv)]``: columns layer-major, keys
before values, then kv head, then head dimension. The re-parameterisation (MLP) is not needed any more and not kept.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptd.checkpoint.files import sync, write_json
from ptd.types import BackboneShape, LayerShape, UserError

CONFIG, WEIGHTS, EXTRA = "adapter_config.json", "adapter_model.safetensors", "ptd.json"
KEY = "prompt_embeddings"
PREFIX_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
PEFT_FORMAT = "0.21.2"
"""The PEFT version whose format is written and tested."""


@dataclass(frozen=True)
class Adapter:
    """A tuned prefix, independent of how it was trained.

    ``flat`` is fp32 ``[P, W]``; ``backbone`` the path or hub id it was trained on; ``facts`` what ptd.json holds
    (empty for an adapter that PEFT wrote): ``fingerprint``, ``method``, ``data``, ``layers``.
    """

    flat: Tensor
    layers: tuple[LayerShape, ...]
    backbone: str
    revision: str | None = None
    task_type: str = "CAUSAL_LM"
    facts: dict[str, Any] = field(default_factory=dict)

    def check_fits(self, shape: BackboneShape, fingerprint: str | None, *, path: str) -> None:
        """Refuse a backbone this adapter was not made for (`UserError`)."""
        if self.layers != shape.layers:
            raise UserError(
                f"the adapter was made for {_describe(self.layers)}, but the backbone {path} has "
                f"{_describe(shape.layers)}; use the backbone it was trained on: {self.backbone}"
            )
        made_for = self.facts.get("fingerprint")
        if made_for and fingerprint and made_for != fingerprint:
            raise UserError(
                f"the adapter was made for another backbone (fingerprint {made_for}) of the same shape as {path} "
                f"({fingerprint}); use the backbone it was trained on: {self.backbone}"
            )


def backbone_reference(path: str) -> str:
    """How an adapter names its backbone: a folder by its absolute path, so that it is found from anywhere."""
    return str(Path(path).resolve()) if path and Path(path).is_dir() else path


def save_adapter(folder: Path, adapter: Adapter, *, peft_only: bool = False) -> None:
    """Write the adapter; ``peft_only`` leaves out ptd.json.

    Raises `UserError` if ``peft_only`` and the layers differ in size, which PEFT's format cannot say.
    """
    first = adapter.layers[0]
    uniform = all(layer == first for layer in adapter.layers) and first.key_dim == first.value_dim
    if peft_only and not uniform:
        raise UserError("this backbone's layers differ in their key/value sizes; PEFT's prefix format cannot hold that")
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.backbone,
        "revision": adapter.revision,
        "inference_mode": True,
        "peft_version": PEFT_FORMAT,
        "num_virtual_tokens": adapter.flat.shape[0],
        "token_dim": first.kv_heads * first.key_dim,
        "num_transformer_submodules": 1,
        "num_attention_heads": first.kv_heads,
        "num_layers": len(adapter.layers),
        "encoder_hidden_size": first.kv_heads * first.key_dim,
        "prefix_projection": False,
    }
    save_file({KEY: adapter.flat.detach().float().cpu().contiguous()}, folder / WEIGHTS, metadata={"format": "pt"})
    sync(folder / WEIGHTS)
    if uniform:
        write_json(folder / CONFIG, config)
    if not peft_only:
        layers = [[layer.kv_heads, layer.key_dim, layer.value_dim] for layer in adapter.layers]
        write_json(
            folder / EXTRA,
            {**adapter.facts, "backbone": adapter.backbone, "revision": adapter.revision, "layers": layers},
        )


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter folder that ptd or PEFT wrote (or a run's output folder, which holds one in ``adapter/``).

    Raises `UserError` naming what is missing, damaged or not a prefix.
    """
    folder = Path(path)
    if not (folder / WEIGHTS).is_file() and (folder / "adapter" / WEIGHTS).is_file():
        folder = folder / "adapter"
    if not folder.is_dir():
        raise UserError(f"--adapter: there is no folder {path}")
    facts = _read_json(folder / EXTRA) if (folder / EXTRA).is_file() else {}
    config = _read_json(folder / CONFIG) if (folder / CONFIG).is_file() or not facts else {}
    kind = config.get("peft_type", "PREFIX_TUNING")
    if kind not in PREFIX_TYPES:
        raise UserError(f"--adapter: {folder} is a PEFT adapter of type {kind}; supported: {', '.join(PREFIX_TYPES)}")
    flat = _read_prompt(folder / WEIGHTS)
    try:
        if "layers" in facts:
            layers = tuple(LayerShape(*map(int, layer)) for layer in facts["layers"])
        else:
            heads = int(config["num_attention_heads"])
            head_dim = int(config["token_dim"]) // heads
            layers = (LayerShape(heads, head_dim, head_dim),) * int(config["num_layers"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"--adapter: the configuration in {folder} is incomplete or damaged: {error!r}") from error
    width = sum(layer.numel for layer in layers)
    virtual = config.get("num_virtual_tokens", len(flat))
    if not layers or virtual != len(flat) or flat.ndim != 2 or flat.shape[1] != width or not len(flat):
        raise UserError(
            f"--adapter: {folder / WEIGHTS} has shape {tuple(flat.shape)}, its configuration says [{virtual}, {width}]"
        )
    backbone = facts.get("backbone") or config.get("base_model_name_or_path") or ""
    revision = facts.get("revision", config.get("revision"))
    return Adapter(flat, layers, backbone, revision, config.get("task_type") or "CAUSAL_LM", facts)


def _read_prompt(path: Path) -> Tensor:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--adapter: cannot read {path}: {error}") from error
    if KEY not in tensors:
        raise UserError(f"--adapter: {path} has {sorted(tensors)[:5]} but no {KEY!r}; it is not a prompt adapter")
    if not torch.isfinite(tensors[KEY]).all():
        raise UserError(f"--adapter: {path} holds values that are not finite; the adapter is damaged")
    return tensors[KEY].float()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--adapter: cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"--adapter: {path} has to hold a JSON object")
    return value


def _describe(layers: tuple[LayerShape, ...]) -> str:
    first = layers[0]
    return f"{len(layers)} layers of {first.kv_heads} kv heads × {first.key_dim}"
