"""Kernels that attend to one segment of keys and also return the log-sum-exp: one file per library, and plain torch.

`pick` chooses among the kernels that need no optional library, unless the caller prefers another.
"""

from __future__ import annotations

from ptd_kernels.prefix_attention.segments.cudnn import CUDNN
from ptd_kernels.prefix_attention.segments.eager import EAGER
from ptd_kernels.prefix_attention.segments.flash_attn_2 import FLASH_ATTN_2
from ptd_kernels.prefix_attention.segments.flash_attn_4 import FLASH_ATTN_4
from ptd_kernels.prefix_attention.segments.kernel import Gradients, Kernel, Need, Rule
from ptd_kernels.prefix_attention.segments.own_triton import OWN_TRITON, OWN_TRITON_BIASED
from ptd_kernels.prefix_attention.segments.torch_efficient import TORCH_EFFICIENT, TORCH_EFFICIENT_BIASED
from ptd_kernels.prefix_attention.segments.torch_flash_cpu import TORCH_FLASH_CPU
from ptd_kernels.prefix_attention.segments.torch_flash_cuda import TORCH_FLASH_CUDA

__all__ = [
    "CUDNN", "EAGER", "FLASH_ATTN_2", "FLASH_ATTN_4", "ON_REQUEST", "TORCH_FLASH_CPU", "TORCH_FLASH_CUDA", "Gradients",
    "Kernel", "Need", "Rule", "pick",
]  # fmt: skip

# `pick` chooses the first kernel that does not refuse. Plain torch refuses nothing.
_PREFERENCE = (
    TORCH_FLASH_CPU, TORCH_FLASH_CUDA, FLASH_ATTN_2, TORCH_EFFICIENT, TORCH_EFFICIENT_BIASED, OWN_TRITON,
    OWN_TRITON_BIASED, EAGER,
)  # fmt: skip
# Each is also a backend of its own, `merge` with this kernel.
ON_REQUEST = (FLASH_ATTN_2, FLASH_ATTN_4, CUDNN, EAGER)


def pick(need: Need, preferred: Kernel | None = None) -> Kernel:
    """Return `preferred` if it supports `need`, else the first kernel that does."""
    candidates = _PREFERENCE if preferred is None else (preferred, *_PREFERENCE)
    return next(kernel for kernel in candidates if kernel.refuses(need) is None)
