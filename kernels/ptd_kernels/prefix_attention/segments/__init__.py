"""Kernels that attend to one segment of keys and also return the log-sum-exp: one file per library, and plain torch.

`pick` chooses the kernel of a segment, unless the caller prefers one. This is the only place where that is decided.
"""

from __future__ import annotations

from ptd_kernels.prefix_attention.segments.cudnn import CUDNN
from ptd_kernels.prefix_attention.segments.eager import EAGER
from ptd_kernels.prefix_attention.segments.flash_attn_2 import FLASH_ATTN_2
from ptd_kernels.prefix_attention.segments.flash_attn_4 import FLASH_ATTN_4
from ptd_kernels.prefix_attention.segments.kernel import Gradients, Kernel, Need, Rule
from ptd_kernels.prefix_attention.segments.own_triton import OWN_TRITON, OWN_TRITON_BIASED
from ptd_kernels.prefix_attention.segments.shared_keys import SHARED_KEYS
from ptd_kernels.prefix_attention.segments.timed import ranking
from ptd_kernels.prefix_attention.segments.torch_efficient import TORCH_EFFICIENT, TORCH_EFFICIENT_BIASED
from ptd_kernels.prefix_attention.segments.torch_flash_cpu import TORCH_FLASH_CPU
from ptd_kernels.prefix_attention.segments.torch_flash_cuda import TORCH_FLASH_CUDA

__all__ = [
    "CUDNN", "EAGER", "FLASH_ATTN_2", "FLASH_ATTN_4", "ON_REQUEST", "OWN_TRITON", "OWN_TRITON_BIASED", "SHARED_KEYS",
    "TIMED_KERNELS", "TORCH_EFFICIENT", "TORCH_EFFICIENT_BIASED", "TORCH_FLASH_CPU", "TORCH_FLASH_CUDA", "Gradients",
    "Kernel", "Need", "Rule", "explain_pick", "pick",
]  # fmt: skip

# `pick` chooses the first kernel that does not refuse. Plain torch refuses nothing.
_PREFERENCE = (
    TORCH_FLASH_CPU, TORCH_FLASH_CUDA, FLASH_ATTN_2, TORCH_EFFICIENT, TORCH_EFFICIENT_BIASED, SHARED_KEYS, OWN_TRITON,
    OWN_TRITON_BIASED, EAGER,
)  # fmt: skip
TIMED_KERNELS = (TORCH_FLASH_CUDA, FLASH_ATTN_2, FLASH_ATTN_4, CUDNN)
"""The kernels among which timings decide, where there are any (timed.py); else it is the first of them."""
ON_REQUEST = (FLASH_ATTN_2, FLASH_ATTN_4, CUDNN, EAGER)
"""Each is also a backend of its own: `merge` with this kernel wherever it can run."""


def pick(need: Need, preferred: Kernel | None = None) -> Kernel:
    """Return `preferred` if it supports `need`; else the fastest kernel by the timings of this GPU; else the first of
    the preference that supports it."""
    if preferred is not None and preferred.refuses(need) is None:
        return preferred
    chosen = next(kernel for kernel in _PREFERENCE if kernel.refuses(need) is None)
    return (_fastest(need) or chosen) if chosen is TORCH_FLASH_CUDA else chosen


def _fastest(need: Need) -> Kernel | None:
    by_name = {kernel.name: kernel for kernel in TIMED_KERNELS}
    timed = (by_name.get(name) for name in ranking(need))
    return next((kernel for kernel in timed if kernel is not None and kernel.refuses(need) is None), None)


def explain_pick(need: Need, preferred: Kernel | None = None) -> str:
    """Return the name of the kernel that `pick` returns and, where timings decided, what they compared."""
    kernel, order = pick(need, preferred), ranking(need)
    if kernel is preferred or kernel not in TIMED_KERNELS or kernel.name not in order:
        return kernel.name
    return f"{kernel.name} (timed on this GPU: {' < '.join(order)})"
