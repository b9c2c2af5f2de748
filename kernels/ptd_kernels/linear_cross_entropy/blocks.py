"""Cross-entropies of a frozen output layer, ``−log softmax(h_n Wᵀ + b)[t_n]``, without storing the logits.

The layer is frozen, so only the hidden states have a gradient: ``dh = (softmax(logits) − onehot) W``. Up to the factor
``dloss`` of each row, this gradient is known in the forward pass. Forward therefore computes it together with the loss,
one block of rows at a time, in the memory of that block's logits. Liger-Kernel (Hsu et al. 2024, arXiv:2410.10989, §3)
does the same for a trained layer. Plain autograd stores the logits, their log-softmax and the gradients of both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_BYTES = {"cpu": 2**27, "cuda": 2**29}
"""Bytes of one block's logits, counted in fp32. On a CPU, blocks of a quarter of the rows make the matrix products a
fifth slower."""
BLOCK_BYTES_BF16 = {"cpu": 2**25}
"""The same for bf16, on devices where it differs. On a CPU, blocks of 256 rows are a sixth faster than blocks of a
thousand."""
LEAST_ROWS = 256
CACHED_ROWS = 16
"""Rows per softmax call on a CPU: 2 MB in fp32 at a vocabulary of 32,000, which stay in the cache until their gradient
is written. One call for the whole block takes 1.3 times as long in fp32 and 5 times as long in bf16."""
DTYPES = (torch.float32, torch.bfloat16)
"""fp16 is missing: the gradient would be rounded before a loss scale could enlarge it."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, block_rows: int | None = None
) -> Tensor:
    """Return the cross-entropies (fp32 ``[N]``) of ``hidden [N, H]``, ``weight [V, H]`` and ``targets [N]``.

    The cross-entropy of a row with a negative target is 0 (like torch's ``ignore_index``). The logits have the dtype of
    ``hidden`` (one of `DTYPES`); softmax and loss are fp32. ``weight`` and ``bias`` get no gradient. ``block_rows`` is
    the number of rows whose logits exist at a time; the default is as many as `BLOCK_BYTES` holds, at least
    `LEAST_ROWS`. Raises `ValueError` for another dtype, and if ``weight`` or ``bias`` requires a gradient.
    """
    if hidden.dtype not in DTYPES:
        raise ValueError(
            f"linear_cross_entropy computes in float32 and bfloat16, not in {hidden.dtype}; cast its inputs"
        )
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(
            "linear_cross_entropy computes no gradient for weight and bias, but one requires it; freeze them"
        )
    if block_rows is None:
        of_dtype = BLOCK_BYTES | BLOCK_BYTES_BF16 if hidden.dtype is torch.bfloat16 else BLOCK_BYTES
        block_bytes = of_dtype.get(hidden.device.type, BLOCK_BYTES["cpu"])
        block_rows = max(LEAST_ROWS, block_bytes // (4 * weight.shape[0]))
    losses: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, block_rows)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, block_rows: int
    ) -> Tensor:
        rows = len(hidden)
        block_rows = -(-rows // max(1, -(-rows // block_rows)))  # divide the rows into equal blocks
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
        return losses.masked_fill_(nothing, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradient is not None
        return (ctx.gradient * dlosses.to(ctx.gradient.dtype)[:, None], *(None,) * 4)


def _block(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, logits: Tensor) -> Tensor:
    """Return the losses ``[N]`` of a block of rows, and overwrite ``logits`` ``[N, V]`` with their gradient."""
    if bias is None:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        torch.addmm(bias, hidden, weight.t(), out=logits)
    if logits.device.type != "cpu":
        return _losses(logits, target)
    parts = zip(logits.split(CACHED_ROWS), target.split(CACHED_ROWS), strict=True)
    return torch.cat([_losses(*part) for part in parts])


def _losses(logits: Tensor, target: Tensor) -> Tensor:
    """Return the losses ``[n]``, and overwrite ``logits`` with their gradient."""
    on_cpu = logits.device.type == "cpu"
    scores = logits.float() if on_cpu else logits
    wanted = scores.gather(1, target).float()
    largest = scores.amax(1, keepdim=True).float()  # `max` also returns indices: ten times slower on a CPU
    # In place on a CPU, whose kernel reads each number before it writes it.
    probability = torch.softmax(scores, 1, out=scores) if on_cpu else torch.softmax(scores, 1, dtype=torch.float32)
    # The largest probability is at least 1/V, so its logarithm is exact; the target's probability may be too small.
    losses = (largest - probability.amax(1, keepdim=True).log() - wanted)[:, 0]
    probability.scatter_add_(1, target, torch.full_like(wanted, -1.0))
    if probability is not logits:
        logits.copy_(probability)
    return losses
