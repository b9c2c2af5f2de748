"""What a launch of one of the project's Triton kernels reads, writes and computes, from its arguments and its tile.

Bytes count each tensor once, as for torch's operations: programs that read the same rows run at the same time and share
them in the L2 cache. FLOPs are those that run: the products of whole tiles, padded heads and keys included.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

Arguments = dict[str, Any]


class Work(NamedTuple):
    """``read``, ``written``: the tensors; ``flops``; ``rate``: which of the GPU's rates bounds the FLOPs."""

    read: list[Tensor]
    written: list[Tensor]
    flops: int
    rate: str


def work_of(name: str, arguments: Arguments) -> Work:
    """Return the work of a launch. Raises `RuntimeError` for a kernel, or a use of one, without a price."""
    if name not in WRITES or arguments.get("T", 0) or any(arguments.get(flag) for flag in ("SEVERAL", "BIAS")):
        raise RuntimeError(
            f"the model has no price for this launch of the Triton kernel {name} (own keys: {arguments.get('T', 0)}); "
            "add it to benchmarks/gpu_model_triton.py"
        )
    queries = arguments.get("q")  # also stands for tensors that a launch does not have
    tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
    tensors = {key: value for key, value in tensors.items() if key == "q" or value is not queries}
    written = [tensors[key] for key in WRITES[name] if key in tensors]
    read = [value for key, value in tensors.items() if key not in WRITES[name]]
    if arguments.get("ADD") and "dq" in tensors:
        read.append(tensors["dq"])
    products = _pairs(name, arguments) * _channels(name, arguments)
    return Work(read, written, 2 * products, "flash backward" if products else "memory")


WRITES = {
    "delta_kernel": ("delta",),
    "merge_kernel": ("out", "lse"),
    "prefix_gradient_kernel": ("partial",),
    "query_gradient_kernel": ("dq",),
    "short_prefix_kernel": ("dq", "partial"),
}
"""The kernels whose launches have a price, and the arguments that each writes."""


def _pairs(name: str, arguments: Arguments) -> int:
    """Return the pairs of a query row and a prefix key that the tiles cover, over all heads."""
    if name in ("delta_kernel", "merge_kernel"):
        return 0
    batch, heads, rows, _ = arguments["q"].shape
    tiles = math.ceil(rows / arguments["BLOCK_M"]) * math.ceil(arguments["P"] / arguments["BLOCK_N"])
    return int(batch * heads * tiles * arguments["BLOCK_M"] * arguments["BLOCK_N"])


def _channels(name: str, arguments: Arguments) -> int:
    """Return the channels of the products per pair: of the scores, dO V', dV, dK and dQ, those that the kernel has."""
    if name in ("delta_kernel", "merge_kernel"):
        return 0
    of_keys, of_values = {
        "prefix_gradient_kernel": (2, 2),
        "query_gradient_kernel": (2, 1),
        "short_prefix_kernel": (3 if arguments.get("QUERIES") else 2, 2),
    }[name]
    return int(of_keys * arguments["BLOCK_D"] + of_values * arguments["BLOCK_E"])
