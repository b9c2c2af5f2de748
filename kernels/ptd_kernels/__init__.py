"""Operations for frozen language models with a trained prefix. The package depends on torch only, never on ``ptd``."""

from ptd_kernels.linear_cross_entropy import linear_cross_entropy
from ptd_kernels.prefix_attention import available_backends, explain_backend, prefix_attention
from ptd_kernels.prefix_attention.problem import MAX_HEAD_SIZE, stand_in

__all__ = [
    "MAX_HEAD_SIZE",
    "available_backends",
    "explain_backend",
    "linear_cross_entropy",
    "prefix_attention",
    "stand_in",
]
