"""Cross-entropies of a frozen output layer, without storing the logits; README.md has the maths."""

from __future__ import annotations

from ptd_kernels.linear_cross_entropy.blocks import DTYPES, linear_cross_entropy

__all__ = ["DTYPES", "linear_cross_entropy"]
