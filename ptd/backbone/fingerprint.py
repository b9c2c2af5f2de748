"""A short identity of the backbone, so that an adapter is not used on another one unnoticed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

SAMPLE = 8
"""Leading numbers of each parameter that enter the fingerprint."""


def fingerprint(model: PreTrainedModel, *, without: str | None = None) -> str:
    """Two hashes of names, shapes and leading values (rounded to bfloat16) of the parameters below the head.

    The first is of all parameters but those of linear layers, of which it has the names; the second is of these, and
    missing where they are quantised: `ptd.types.same_backbone` compares what both sides have. ``without`` names a
    submodule that is no part of the backbone; neither is BERT's pooler, which nothing here reads. So a model has the
    same fingerprint with and without a language-model head, loaded in float32 or bfloat16, replicated or partitioned
    (ZeRO-3: only rank 0, which holds the head of each flat partition, gets the right value; it has to be broadcast).
    """
    kept, linear = hashlib.sha256(model.config.model_type.encode()), hashlib.sha256()
    quantised = False
    samples: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter, in_linear in _parameters(model.base_model, without):
        held = part_of(parameter)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if in_linear:
            kept.update(name.encode())
            quantised |= held.element_size() == 1
        (linear if in_linear else kept).update(f"{name}{shape}".encode())
        samples[in_linear].append(held.detach().reshape(-1)[:SAMPLE].to(torch.bfloat16))
    for digest, values in ((kept, samples[False]), (linear, samples[True])):
        if values:
            joined = torch.cat([value.to(values[0].device) for value in values])
            digest.update(joined.cpu().view(torch.int16).numpy().tobytes())
    parts = [kept] if quantised else [kept, linear]
    return "-".join(digest.hexdigest()[:12] for digest in parts)


def part_of(parameter: Any) -> Any:
    """What this rank has of a parameter: all of it, or its shard (flat), fetched from the disk if it lies there."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter
    if shard.status.name == "AVAILABLE":
        return shard
    fetched = torch.empty(shard.ds_numel, dtype=parameter.dtype)
    parameter.nvme_swapper.swap_into_buffer(parameter, fetched)
    return fetched


def _parameters(model: nn.Module, without: str | None) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, parameter, and whether it is a linear layer's, in the order of the names."""
    found: dict[int, tuple[str, Tensor, bool]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            whole = f"{prefix}.{name}" if prefix else name
            skipped = whole.startswith("pooler.") or (without is not None and whole.startswith(f"{without}."))
            if not skipped:
                found.setdefault(id(parameter), (whole, parameter, isinstance(module, nn.Linear | Conv1D)))
    return iter(sorted(found.values(), key=lambda entry: entry[0]))
