"""Cross-entropy of a frozen output layer, ``Σ_n −log softmax(h_n Wᵀ + b)[t_n]``, without keeping its logits.

The layer is not trained: the only gradient is that of the hidden states, ``dh = (softmax(logits) − onehot) W``, which
needs nothing that backward would know better: it is computed with the loss, a block of rows at a time, in the memory of
the block's logits (Liger-Kernel, Hsu et al. 2024, arXiv:2410.10989, §3, does the same with a trained layer).
Plain autograd holds the logits, their log-softmax and the gradients of both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_BYTES = {"cpu": 2**27, "cuda": 2**29}
"""Bytes of a block's logits in fp32. With a fourth of the rows the products are a fifth slower on a CPU."""
BLOCK_BYTES_BF16 = {"cpu": 2**25}
"""The same for bf16 where it differs: with 256 rows all is a sixth faster on a CPU than with a thousand."""
LEAST_ROWS = 256
CACHED_ROWS = 16
"""Rows whose softmax a CPU takes at once: 2 MB in fp32 at a vocabulary of 32,000, which its cache holds from the
product to the gradient. The whole block at once takes 1.3 times as long in fp32 and 5 times in bf16."""
DTYPES = (torch.float32, torch.bfloat16)
"""Not fp16: the gradient is rounded before a loss scale could lift it."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, block_rows: int | None = None
) -> Tensor:
    """Sum of the cross-entropies: ``hidden`` ``[N, H]``, ``weight`` ``[V, H]``, ``targets`` ``[N]`` -> fp32 scalar.

    A row whose target is negative has no part in it (as with torch's ``ignore_index``).
    Logits have the dtype of ``hidden`` (one of `DTYPES`), softmax and loss are fp32. ``weight`` and ``bias`` get no
    gradient. ``block_rows``: rows whose logits exist at once; default: what `BLOCK_BYTES` holds. Raises `ValueError`
    for another dtype, and where an output layer is trained.
    """
    if hidden.dtype not in DTYPES:
        raise ValueError(f"linear_cross_entropy computes in float32 and bfloat16, not in {hidden.dtype}")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("linear_cross_entropy has no gradient of weight and bias; freeze them")
    if block_rows is None:
        of_dtype = BLOCK_BYTES | BLOCK_BYTES_BF16 if hidden.dtype is torch.bfloat16 else BLOCK_BYTES
        block_bytes = of_dtype.get(hidden.device.type, BLOCK_BYTES["cpu"])
        block_rows = max(LEAST_ROWS, block_bytes // (4 * weight.shape[0]))
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, block_rows)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, block_rows: int
    ) -> Tensor:
        rows = len(hidden)
        block_rows = -(-rows // max(1, -(-rows // block_rows)))  # in equal blocks
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        losses = hidden.new_zeros(rows, dtype=torch.float32)
        room = hidden.new_empty(block_rows, len(weight))
        nothing = targets < 0
        targets = targets.clamp(min=0)
        for start in range(0, rows, block_rows or 1):
            part = slice(start, start + block_rows)
            logits = room[: min(block_rows, rows - start)]
            losses[part] = _block(hidden[part], weight, bias, targets[part, None], logits)
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[part])
        ctx.gradient = None if gradient is None else gradient.masked_fill_(nothing[:, None], 0.0)
        return losses.masked_fill_(nothing, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradient is not None
        return (ctx.gradient * dloss.to(ctx.gradient.dtype), *(None,) * 4)


def _block(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, logits: Tensor) -> Tensor:
    """The losses ``[N]`` of a block of rows; what is left in ``logits`` ``[N, V]`` is their gradient."""
    if bias is None:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        torch.addmm(bias, hidden, weight.t(), out=logits)
    if logits.device.type != "cpu":
        return _losses(logits, target)
    parts = zip(logits.split(CACHED_ROWS), target.split(CACHED_ROWS), strict=True)
    return torch.cat([_losses(*part) for part in parts])


def _losses(logits: Tensor, target: Tensor) -> Tensor:
    """The losses ``[n]``; what is left in ``logits`` is their gradient."""
    on_cpu = logits.device.type == "cpu"
    scores = logits.float() if on_cpu else logits
    wanted = scores.gather(1, target).float()
    largest = scores.amax(1, keepdim=True).float()  # `max` also finds the place: on a CPU ten times as long
    # In place where the kernel writes a number after reading it.
    probability = torch.softmax(scores, 1, out=scores) if on_cpu else torch.softmax(scores, 1, dtype=torch.float32)
    # The largest probability is at least 1/V, so its logarithm is exact where that of the target's may not be.
    losses = (largest - probability.amax(1, keepdim=True).log() - wanted)[:, 0]
    probability.scatter_add_(1, target, torch.full_like(wanted, -1.0))
    if probability is not logits:
        logits.copy_(probability)
    return losses
