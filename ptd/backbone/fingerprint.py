"""A short identity of the backbone, so that an adapter is not used on another one unnoticed."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from transformers import PreTrainedModel

SAMPLE = 8
"""Leading numbers of each parameter that enter the fingerprint."""


def fingerprint(model: PreTrainedModel, *, without: str | None = None) -> str:
    """Hash of the name, shape and leading values, rounded to bfloat16, of every parameter below the head.

    ``without`` names a submodule that is no part of the backbone; neither is BERT's pooler, which nothing here reads.
    So a model has the same fingerprint with and without a language-model head. The same for a model loaded in float32
    or bfloat16, replicated or partitioned (ZeRO-3: only rank 0, which holds the head of each flat partition, gets the
    right value; it has to be broadcast).
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    samples: list[Tensor] = []
    for name, parameter in sorted(model.base_model.named_parameters()):
        if name.startswith("pooler.") or (without is not None and name.startswith(f"{without}.")):
            continue
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        held = getattr(parameter, "ds_tensor", parameter)
        digest.update(f"{name}{shape}".encode())
        samples.append(held.detach().reshape(-1)[:SAMPLE].to(torch.bfloat16))
    values = torch.cat([sample.to(samples[0].device) for sample in samples])
    digest.update(values.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
