"""A short identity of the backbone, which shows when an adapter is used on a different backbone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

SAMPLE = 8
"""Number of leading values of each parameter that enter the fingerprint."""


def fingerprint(model: PreTrainedModel, *, without: str | None = None) -> str:
    """Return two hashes of names, shapes and leading values (rounded to bfloat16) of the parameters below the head.

    The first hash covers the model type, the names of all parameters, and the shapes and values of those outside linear
    layers. The second hash covers the parameters of linear layers, and is missing if these are quantised;
    `ptd.types.same_backbone` compares the hashes that both fingerprints have. ``without`` names a submodule that is not
    part of the backbone. BERT's pooler does not count either, because ptd does not read it. A model therefore has the
    same fingerprint with and without a language-model head, loaded in float32 or bfloat16, replicated or partitioned.
    With ZeRO-3 only rank 0, which holds the start of each flat partition, gets the correct value and has to broadcast
    it.
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
    """Return this rank's part of a parameter: all of it, or its flat shard, which is read from disk if necessary."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter
    if shard.status.name == "AVAILABLE":
        return shard
    fetched = torch.empty(shard.ds_numel, dtype=parameter.dtype)
    parameter.nvme_swapper.swap_into_buffer(parameter, fetched)
    return fetched


def _parameters(model: nn.Module, without: str | None) -> Iterator[tuple[str, Tensor, bool]]:
    """Return each parameter's name, the parameter, and whether it belongs to a linear layer, sorted by name."""
    found: dict[int, tuple[str, Tensor, bool]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            whole = f"{prefix}.{name}" if prefix else name
            skipped = whole.startswith("pooler.") or (without is not None and whole.startswith(f"{without}."))
            if not skipped:
                found.setdefault(id(parameter), (whole, parameter, isinstance(module, nn.Linear | Conv1D)))
    return iter(sorted(found.values(), key=lambda entry: entry[0]))
