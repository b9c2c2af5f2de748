"""Products with a frozen weight in 8-bit floating point (experimental); README.md has the maths."""

from __future__ import annotations

from ptd_kernels.fp8_linear.product import E4M3, MULTIPLE, fp8_linear, to_fp8

__all__ = ["E4M3", "MULTIPLE", "fp8_linear", "to_fp8"]
