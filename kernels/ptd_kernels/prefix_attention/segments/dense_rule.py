"""A segment's whole rule as one additive bias, for kernels that hide a key in no other way. Legend: problem.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.segments.kernel import Rule, visible_keys

ALIGNED = 16
"""The rows of the bias begin at multiples of this many numbers: kernels load several of them at once."""
MOST_SCORES = 1 << 30
"""The largest number of scores of one call, which bounds the memory of the bias."""
LOWEST = -torch.finfo(torch.float32).max / math.log2(math.e)
"""Kernels multiply scores by log2(e) in fp32. A bias from here on becomes -inf there: it hides its key."""


def dense_bias(rows: int, keys: int, rule: Rule, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return bound, packing, mask and bias of `rule` as one bias ``[B or 1, H or 1, rows, keys]``, -inf where hidden.

    Also returns which rows see no key, bool ``[B or 1, H or 1, rows]``.
    """
    shown = visible_keys(rows, keys, rule, device)
    if rule.mask is not None:
        shown = rule.mask if shown is None else rule.mask & shown
    given = [x.shape for x in (shown, rule.bias) if x is not None]
    shape = torch.broadcast_shapes((1, 1, rows, keys), *given)
    # Numbers beyond the last key are loaded too, and have to be finite.
    stored = torch.zeros(*shape[:3], -(-keys // ALIGNED) * ALIGNED, dtype=dtype, device=device)
    bias = stored[..., :keys]
    if rule.bias is not None:
        bias.copy_(rule.bias)
    if shown is not None:
        bias.masked_fill_(~shown, -torch.inf)
    return bias, bias.amax(dim=-1) <= LOWEST


def without_hidden_rows(out: Tensor, lse: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output with zeros, and the log-sum-exp with -inf, in the rows that see no key.

    Kernels differ in what they return for such rows; a log-sum-exp of 0 would count as a sum of one.
    """
    return out.masked_fill(hidden[..., None], 0.0), lse.masked_fill(hidden, -torch.inf)


def rows_of_one_call(_: object, heads: int, keys: int, bounded: bool) -> int:
    """Return how many query rows one call gets (`Kernel.max_rows`), whatever the rule is."""
    return max(1, MOST_SCORES // max(1, heads * keys))
