"""Operations for frozen language models with a trained prefix. The package depends on torch only, never on ``ptd``."""

from ptd_kernels.linear_cross_entropy import linear_cross_entropy
from ptd_kernels.prefix_attention import COMPLETE, available_backends, explain_backend, prefix_attention
from ptd_kernels.prefix_attention.problem import MAX_HEAD_SIZE, stand_in
from ptd_kernels.prefix_attention.trial import LayerKind, find_fault, trials_tell

__all__ = [
    "COMPLETE",
    "MAX_HEAD_SIZE",
    "LayerKind",
    "available_backends",
    "explain_backend",
    "find_fault",
    "linear_cross_entropy",
    "prefix_attention",
    "stand_in",
    "trials_tell",
]
