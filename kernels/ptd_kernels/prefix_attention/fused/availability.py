"""Whether Triton can compute on a device. The first question about a GPU imports Triton and launches a kernel there."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ptd_kernels.prefix_attention.problem import nvidia_capability

INSTALLED = importlib.util.find_spec("triton") is not None
_TRUE = ("1", "true", "yes", "on", "y")
# Triton reads this variable when it is imported, so a later change would have no effect.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in _TRUE
EMULATING = os.environ.get("PTD_KERNELS_INTERPRET", "0").lower() in _TRUE
"""Whether kernels run in Triton's interpreter where they would be compiled on a GPU: the tests that emulate one ask for
it. Else the interpreter runs only what was asked for by name."""
_MISSING = "Triton is not installed (pip install triton; Linux only)"


def refuses_unasked(q: Tensor) -> str | None:
    """Return why nobody should choose a Triton kernel for tensors like `q`, unless it was asked for by name; or None.

    CPU tensors without data may represent a GPU (`problem.stand_in`); there, nothing is tried.
    """
    capability = nvidia_capability(q.device)
    if capability is None:
        return f"it needs an NVIDIA GPU, but the tensors are on {q.device}"
    if capability < (8, 0):
        return "it needs compute capability 8.0 or higher"
    if isinstance(q, FakeTensor):
        return None if INSTALLED else _MISSING
    if INTERPRETED and not EMULATING:
        return "Triton's interpreter (TRITON_INTERPRET=1) is slower than plain torch"
    return triton_refuses(q.device)


def triton_refuses(device: torch.device) -> str | None:
    """Return why Triton cannot run the kernels on `device`, or None."""
    if not INSTALLED:
        return _MISSING
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"Triton needs a GPU, but the tensors are on {device}; TRITON_INTERPRET=1 runs it slowly without one"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernel needs an NVIDIA GPU of the Ampere generation (sm_80) or newer"
    # torch.compile cannot trace the trial, and needs a working Triton itself.
    return None if torch.compiler.is_compiling() else _trial(device)


@functools.cache
def _trial(device: torch.device) -> str | None:
    """Launch the smallest kernel. Return why that fails: Triton needs a C compiler and Python's headers at run time."""
    try:
        from ptd_kernels.prefix_attention.fused.segment import launch_merge

        out, lse = torch.zeros(1, 1, 1, 16, device=device), torch.zeros(1, 1, 1, device=device)
        launch_merge(out, lse, out, lse, torch.empty_like(out), torch.empty_like(lse))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        return f"Triton cannot compile a kernel on this machine ({type(error).__name__}: {reason})"
    return None
