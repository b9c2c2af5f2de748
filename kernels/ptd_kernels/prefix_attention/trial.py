"""Compare what a backend computes on this device with the specification, before a model relies on it.

Libraries, drivers and GPUs are more than any test suite has run on. A trial takes milliseconds on a GPU: small random
problems of each kind that a model's layers pose, output and gradients, against `reference`. Legend: problem.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptd_kernels.prefix_attention import prefix_attention
from ptd_kernels.prefix_attention.fused.availability import INTERPRETED
from ptd_kernels.prefix_attention.segments.timed import SHORTEST, timed_gpu

ALLOWED = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest error of an output or a gradient, relative to its norm. fp32: products may be in TF32."""
NAMES = ("output", "gradient of q", "gradient of k", "gradient of v", "gradient of the prefix's keys",
         "gradient of the prefix's values")  # fmt: skip
_PREFIX, _WINDOW = 37, 50
_PACK = (70, 1, 129, 56)


@dataclass(frozen=True)
class LayerKind:
    """What is alike in the calls of a layer. `window` and `softcap` as in `prefix_attention`."""

    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    causal: bool
    window: int | None = None
    softcap: float | None = None


def trials_tell(device: torch.device) -> bool:
    """Return whether trials on this device tell something: on a GPU, but not with Triton's kernels interpreted, and not
    on a CPU, whose kernels the tests cover."""
    return device.type == "cuda" and not INTERPRETED


@functools.cache
def find_fault(kind: LayerKind, device: torch.device, dtype: torch.dtype, backend: str = "auto") -> str | None:
    """Return how results of `backend` differ from the specification's, as text for people; None if they do not.

    What the backend refuses is not tried. The random state stays as it was. Each kind is tried once per process.
    """
    generator = torch.Generator(device).manual_seed(0)
    for name, batch, queries, keys, options in _problems(kind, device, dtype, generator):
        prefixes = 2 if "prefix_index" in options else 1
        x, dout = _tensors(kind, batch, queries, keys, prefixes, device, dtype, generator)
        try:
            found = _results(x, dout, backend, options)
        except ValueError as refusal:
            if "cannot do this" in str(refusal):
                continue
            raise
        except Exception as error:
            return f"{name}: it raises {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        exact = [y.to(torch.promote_types(dtype, torch.float32)) for y in (*x, dout)]
        wanted = _results(exact[:-1], exact[-1], "reference", options)
        for what, a, b in zip(NAMES, found, wanted, strict=False):
            apart = ((a.to(b.dtype) - b).norm() / b.norm().clamp_min(1e-30)).item()
            if not apart <= ALLOWED[dtype]:
                return f"{name}: the {what} differs by {apart:.1%}"
    return None


def _problems(
    kind: LayerKind, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, int, int, int, dict[str, Any]]]:
    """Yield name, batch size, queries, own keys and options of each problem."""
    window = None if kind.window is None else min(kind.window, _WINDOW)
    rule: dict[str, Any] = {"causal": kind.causal, "window": window, "softcap": kind.softcap}
    whole = {"causal": False, "softcap": kind.softcap}
    bounds = torch.tensor([0, *_PACK], device=device).cumsum(0).int()
    packed = {**rule, "cu_seqlens": bounds, "max_seqlen": max(_PACK)}
    yield "packed sequences", 1, sum(_PACK), sum(_PACK), packed
    several = torch.tensor([place % 2 for place in range(len(_PACK))])
    yield "packed sequences with two prefixes", 1, sum(_PACK), sum(_PACK), {**packed, "prefix_index": several}
    yield "a batch", 2, 150, 150, rule
    if kind.causal:
        yield "a later part of a sequence", 1, 40, 150, rule
    row, key = torch.arange(150, device=device)[:, None], torch.arange(150, device=device)
    padded = torch.stack([key >= 0, key >= 30])[:, None, None].expand(2, 1, 150, 150)
    shown = padded & (key <= row) if kind.causal else padded
    yield "a padded batch", 2, 150, 150, {**whole, "mask": shown}
    yield "a generated token of a padded batch", 2, 1, 150, {**whole, "mask": shown[:, :, -1:]}
    bias = torch.randn(1, kind.heads, 150, 150, generator=generator, device=device).to(dtype)
    yield "a padded batch with a bias", 2, 150, 150, {**whole, "mask": shown, "bias": bias}
    if timed_gpu(device) and kind.causal and window is None:
        bounds = torch.tensor([0, SHORTEST], device=device, dtype=torch.int32)
        yield "a long sequence", 1, SHORTEST, SHORTEST, rule
        yield "a long packed sequence", 1, SHORTEST, SHORTEST, {**rule, "cu_seqlens": bounds, "max_seqlen": SHORTEST}


def _tensors(
    kind: LayerKind, batch: int, queries: int, keys: int, prefixes: int, device: torch.device, dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Return q, k, v and the prefix in the memory layout of Hugging Face models, and a gradient for the output.

    ``prefixes``: the number of prefixes; of several, the tensors have a first axis for them.
    """
    count: tuple[int, ...] = () if prefixes == 1 else (prefixes,)
    shapes = [
        (batch, queries, kind.heads, kind.head_dim), (batch, keys, kind.kv_heads, kind.head_dim),
        (batch, keys, kind.kv_heads, kind.value_head_dim), (*count, _PREFIX, kind.kv_heads, kind.head_dim),
        (*count, _PREFIX, kind.kv_heads, kind.value_head_dim), (batch, queries, kind.heads, kind.value_head_dim),
    ]  # fmt: skip
    *x, dout = (torch.randn(each, generator=generator, device=device).to(dtype).transpose(-3, -2) for each in shapes)
    return x, dout


def _results(x: list[Tensor], dout: Tensor, backend: str, options: dict[str, Any]) -> list[Tensor]:
    """Return the output and, of more than one query, the gradients of all of x."""
    leaves = [y.detach().requires_grad_() for y in x]
    if x[0].shape[2] == 1:
        with torch.no_grad():
            return [prefix_attention(*leaves, backend=backend, **options)]
    with torch.enable_grad():
        out = prefix_attention(*leaves, backend=backend, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]
