"""The specification of `linear_cross_entropy`: logits, log-softmax and loss, in the precision of the inputs."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy, linear


def reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return the cross-entropies ``[N]`` (fp32; fp64 for fp64 inputs) of ``hidden [N, H]`` with ``targets [N]``.

    The cross-entropy of a row with a negative target is 0.
    """
    logits = linear(hidden, weight, bias)
    logits = logits if logits.dtype.itemsize > 4 else logits.float()
    return cross_entropy(logits, targets.clamp(min=-1), ignore_index=-1, reduction="none")
