"""Provide what the tests of `prefix_attention` share: the inputs of a call, its results, and their comparison.

``from attention_cases import …`` works in every test (tests/conftest.py registers this file under that name).
With PTD_TEST_DEVICE=cuda, the inputs are created on a GPU. The variable affects only these inputs: torch's default
device, which other tests of the process share, does not change, except inside `on_device`.

Shapes: B batch, H heads, S queries, T own keys, P prefix keys, D and E head sizes of keys and values.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from ptd_kernels import available_backends
from ptd_kernels import prefix_attention as attend
from torch import Tensor

DEVICE = os.environ.get("PTD_TEST_DEVICE", "cpu")
# On a GPU, the adapters to GPU libraries are also tested; they refuse the calls that they do not support.
LIBRARIES = [name for name in available_backends() if name.startswith("merge-")]
LEAVES = ("q", "k", "v", "prefix_k", "prefix_v")


def on_device() -> AbstractContextManager[Any]:
    """Return a context in which new tensors are created on `DEVICE` unless they name another device."""
    return nullcontext() if DEVICE == "cpu" else torch.device(DEVICE)


def here(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with their tensors on `DEVICE`; `prefix_index` is not moved, because it may be on the CPU."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type == "cpu":
            return value.to(DEVICE).detach().requires_grad_(value.requires_grad)
        return [moved(each) for each in value] if isinstance(value, list) else value

    return {name: value if name == "prefix_index" else moved(value) for name, value in options.items()}


def prefix_attention(*args: Any, backend: str = "auto", **kwargs: Any) -> Tensor:
    """Call the function under test; skip the test if an optional library has no kernel for the call."""
    try:
        return attend(*args, backend=backend, **kwargs)
    except ValueError as refusal:
        if backend in LIBRARIES and "cannot do this" in str(refusal):
            pytest.skip(str(refusal))
        raise


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; `tensors` creates its inputs."""

    B: int = 2
    S: int = 13
    T: int = 13
    Hq: int = 4
    Hkv: int = 2
    D: int = 16
    E: int = 16
    P: int = 5
    hugging_face_layout: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", here(self.options))

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        def make(batch: int, length: int, heads: int, size: int) -> Tensor:
            if self.hugging_face_layout:
                return torch.randn(batch, length, heads, size, device=DEVICE).transpose(1, 2)
            return torch.randn(batch, heads, size, length, device=DEVICE).mT

        prefix = [torch.randn(self.P, self.Hkv, size, device=DEVICE).transpose(0, 1) for size in (self.D, self.E)]
        own = [
            make(self.B, self.S, self.Hq, self.D),
            make(self.B, self.T, self.Hkv, self.D),
            make(self.B, self.T, self.Hkv, self.E),
        ]
        return [x.to(dtype).requires_grad_() for x in own + prefix]


def out_and_gradients(leaves: list[Tensor], **kwargs: Any) -> list[Tensor]:
    """Return the output and all leaves' gradients; the incoming gradient is the same for every dtype and layout."""
    out = prefix_attention(*leaves, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, incoming(out))]


def incoming(out: Tensor) -> Tensor:
    """Return a gradient for `out` that is the same for every dtype and layout."""
    dout = torch.randn(out.shape, generator=torch.Generator(DEVICE).manual_seed(7), device=DEVICE)
    return dout.to(out.dtype)


def assert_same(actual: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    for name, a, b in zip(("out", *LEAVES), actual, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        assert torch.isfinite(a).all(), f"{name} is not finite"
        # The error of a gradient that cancels to zero is relative to its addends, which are of order one.
        error, size = (a - b).norm().item(), max(b.norm().item(), 0.1 * b.numel() ** 0.5)
        assert error <= rtol * size, f"{name}: relative error {error / size:.2e}"


def relative_rms(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


def assert_gradients_of(wanted: tuple[str, ...], leaves: list[Tensor], backend: str, **kwargs: Any) -> None:
    """Assert that, if only these leaves require gradients, they get the reference's, and the others get none."""
    expected = dict(zip(LEAVES, out_and_gradients(leaves, backend="reference", **kwargs)[1:], strict=True))
    some = {name: x.detach().requires_grad_(name in wanted) for name, x in zip(LEAVES, leaves, strict=True)}
    out = prefix_attention(*some.values(), backend=backend, **kwargs)
    out.backward(incoming(out))
    for name, x in some.items():
        assert (x.grad is not None) == (name in wanted)
        if x.grad is not None:
            torch.testing.assert_close(x.grad, expected[name], rtol=1e-5, atol=1e-5)


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
