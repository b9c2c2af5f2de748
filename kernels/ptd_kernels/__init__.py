"""Operations for frozen language models with a trained prefix. Depends on torch alone, never on ``ptd``."""

from ptd_kernels.prefix_attention import available_backends, explain_backend, prefix_attention

__all__ = ["available_backends", "explain_backend", "prefix_attention"]
