"""Check, when ptd attaches to a model on a GPU, that attention computes there what it should, gradients included.

The checks of self_check.py compare a model with itself, on rows of a few tokens and without gradients. Which library
kernel a training step calls depends on the GPU, the dtype, masks and lengths, and no test suite has run on every GPU.
So the kernels themselves are tried on small random problems, once per process and kind of layer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from ptd_kernels import COMPLETE, LayerKind, find_fault, trials_tell

from ptd.inject.attention import Call
from ptd.types import UserError


class KernelFault(UserError):
    """Attention computes something else on this GPU than it should, which no other way to attach a prompt mends."""


def backend_of_any_pass(configured: str) -> str:
    """Return the backend for passes that the configured backend may not support: itself if it supports every pass."""
    return configured if configured in COMPLETE else "auto"


def check_kernels(calls: Iterable[Call], configured: set[str], device: torch.device, dtype: torch.dtype) -> None:
    """Raise `UserError` if attention as ``calls`` describe it, computed by a backend that may run, is wrong here."""
    if not trials_tell(device):
        return
    if dtype.itemsize < 2:  # quantised weights
        dtype = torch.bfloat16
    kinds = {
        LayerKind(
            call.heads, call.kv_heads, call.key_dim, call.value_dim, call.causal, call.window if call.causal else None,
            call.softcap,
        )
        for call in calls
    }  # fmt: skip
    for backend in sorted(configured | {backend_of_any_pass(name) for name in configured}):
        for kind in kinds:
            fault = find_fault(kind, device, dtype, backend)
            if fault is not None:
                raise KernelFault(
                    f"backbone.attention: on {torch.cuda.get_device_name(device)}, attention by {backend!r} computes "
                    f"something else than it should in {dtype}: {fault}. A prompt would be trained on wrong numbers; "
                    "set backbone.attention: merge-plain-torch, which is slow, or use another version of torch or CUDA"
                )
