"""Test the adapters to GPU libraries without a GPU: what they refuse, and what they pass to a library.

Tensors on the CPU represent tensors on a Hopper GPU (`problem.stand_in`). The package flash-attn-4 need not be
installed, and is of no use without a GPU; a recorder with the parameters of its two functions replaces it and computes
their results.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from ptd_kernels import explain_backend, prefix_attention
from ptd_kernels.prefix_attention import merge
from ptd_kernels.prefix_attention.fused import availability
from ptd_kernels.prefix_attention.fused.availability import INSTALLED, INTERPRETED
from ptd_kernels.prefix_attention.problem import stand_in
from ptd_kernels.prefix_attention.segments import CUDNN, EAGER, FLASH_ATTN_4, Kernel, Need, Rule, flash_attn_4
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

LENGTHS = (3, 40, 17)
SIZE = 64


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    token = stand_in.set((9, 0))
    yield
    stand_in.reset(token)


def tensors(B: int = 1, S: int = sum(LENGTHS), T: int | None = None, P: int = 5, E: int = SIZE) -> list[Tensor]:
    sizes = [(B, S, 4, SIZE), (B, T or S, 2, SIZE), (B, T or S, 2, E), (P, 2, SIZE), (P, 2, E)]
    return [torch.randn(size).transpose(-3, -2).bfloat16().requires_grad_() for size in sizes]


def need(S: int, T: int, **rule: Any) -> Need:
    return Need(torch.empty(2, 4, S, SIZE, dtype=torch.bfloat16), T, SIZE, Rule(0.1, **rule))


@pytest.mark.parametrize(("S", "T"), [(1, 64), (64, 1), (1, 1)])
def test_cudnn_takes_no_single_row_and_no_single_key(S: int, T: int) -> None:
    assert CUDNN.refuses(need(S, T)) == "it supports no single query row and no single key"
    assert CUDNN.refuses(need(2, 2)) is None


def test_a_backend_is_explained_by_what_a_training_step_asks() -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "head_dim": SIZE, "backend": "merge-cudnn"}
    assert explain_backend(virtual_tokens=30, **options)[1].count("cuDNN") == 2
    assert "prefix: torch flash (CUDA)" in explain_backend(virtual_tokens=1, **options)[1]


@pytest.mark.skipif(INTERPRETED or not INSTALLED, reason="what is said where Triton compiles")
def test_why_the_prefix_gradient_is_plain_torch_is_explained() -> None:
    """Triton cannot launch a kernel on tensors on the CPU, which here represent those on a GPU."""
    said = explain_backend(dtype=torch.bfloat16, head_dim=SIZE, backend="merge")[1]
    assert "gradient of the prefix: plain torch (Triton cannot be used: Triton needs a GPU" in said
    assert "Triton cannot compile a kernel on this machine (" in str(availability._trial(torch.device("cpu")))


def test_a_plan_for_a_gpu_has_its_triton_kernels() -> None:
    with FakeTensorMode():
        said = explain_backend(dtype=torch.bfloat16, head_dim=SIZE, backend="merge")[1]
        x = tensors()
        found = out_and_gradients(x, backend="merge")
    assert ("gradient of the prefix: own Triton kernels" in said) == INSTALLED
    assert [(y.shape, y.dtype) for y in found[1:]] == [(y.shape, y.dtype) for y in x]


def test_of_several_prefixes_the_shortest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest prefix counts: cuDNN is not called for a prefix of one key only because another prefix has more."""
    asked: list[int] = []
    monkeypatch.setattr(merge, "pick", lambda need, preferred: asked.append(need.keys) or EAGER)
    q, k, v, *_ = tensors(B=2, S=8)
    prefixes = [[torch.randn(2, P, SIZE, dtype=torch.bfloat16) for P in (9, 1)] for _ in range(2)]
    prefix_attention(q, k, v, *prefixes, prefix_index=torch.tensor([0, 1]), backend="merge").sum().backward()
    assert asked == [8, 1, 1, 8]  # own keys and prefix, in the backward pass in reverse


class Recorder(ModuleType):
    """The part of flash_attn.cute.interface that the adapter calls, in plain torch; ``calls``: the bounds it got."""

    def __init__(self) -> None:
        super().__init__("flash_attn.cute.interface")
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def _flash_attn_fwd(
        self, q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None, seqused_q: Tensor | None = None, seqused_k: Tensor | None = None,
        max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, softmax_scale: float | None = None,
        causal: bool = False, return_lse: bool = False,
    ) -> tuple[Tensor, Tensor, None]:  # fmt: skip
        assert return_lse
        bounds = self.note("forward", q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        q, k, v = (self.laid_out(x) for x in (q, k, v))
        out, lse = EAGER.forward(q, k, v, self.rule(softmax_scale, causal, q, k, bounds))
        return self.back(out.bfloat16(), bounds), lse if bounds is None else lse[0], None

    def _flash_attn_bwd(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor,
        softmax_scale: float | None = None, causal: bool = False, cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        bounds = self.note("backward", q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        q, k, v, out, dout = (self.laid_out(x) for x in (q, k, v, out, dout))
        lse = lse if bounds is None else lse[None]
        found = EAGER.backward(dout, q, k, v, out, lse, self.rule(softmax_scale, causal, q, k, bounds))
        return tuple(self.back(x.bfloat16(), bounds) for x in found)

    def note(self, what: str, q: Tensor, *bounds: Any) -> Tensor | None:
        given = dict(zip(("cu_q", "cu_k", "max_q", "max_k"), bounds, strict=True))
        self.calls.append((what, {name: x.tolist() if isinstance(x, Tensor) else x for name, x in given.items()}))
        assert (q.dim() == 3) == (given["cu_q"] is not None), "a pack has no batch axis"
        cu_seqlens: Tensor | None = given["cu_q"]
        return cu_seqlens

    def rule(self, scale: float | None, causal: bool, q: Tensor, k: Tensor, bounds: Tensor | None) -> Rule:
        assert scale is not None
        offset = k.shape[2] - q.shape[2] if causal else None
        if bounds is None:
            return Rule(scale, offset=offset)
        number = torch.searchsorted(bounds, torch.arange(q.shape[2]), right=True)
        return Rule(scale, offset=offset, sequences=(number, number))

    def laid_out(self, x: Tensor) -> Tensor:
        return (x if x.dim() == 4 else x[None]).transpose(1, 2)

    def back(self, x: Tensor, bounds: Tensor | None) -> Tensor:
        x = x.transpose(1, 2)
        return x if bounds is None else x[0]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    packages = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")
    for name, module in zip(packages, (ModuleType("flash_attn"), ModuleType("flash_attn.cute"), recorder), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    flash_attn_4._library.cache_clear()
    yield recorder
    flash_attn_4._library.cache_clear()


def out_and_gradients(x: list[Tensor], **options: Any) -> list[Tensor]:
    out = prefix_attention(*x, **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    return [out, *torch.autograd.grad(out, x, dout)]


@pytest.mark.parametrize("longest", [None, 40])
def test_flash_attn_4_is_told_how_long_a_packed_sequence_may_be(library: Recorder, longest: int | None) -> None:
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    x, options = tensors(), {"cu_seqlens": cu_seqlens, "max_seqlen": longest}
    got = out_and_gradients(x, backend="merge-flash-attn-4", **options)
    packed = [(what, given) for what, given in library.calls if given["cu_q"] is not None]
    most = longest or sum(LENGTHS)
    bounds = {"cu_q": [0, 3, 43, 60], "cu_k": [0, 3, 43, 60], "max_q": most, "max_k": most}
    assert packed == [("forward", bounds), ("backward", bounds)]
    assert all(given == dict.fromkeys(bounds) for _, given in library.calls if given["cu_q"] is None)
    exact = [y.detach().double().requires_grad_() for y in x]
    for a, b in zip(got, out_and_gradients(exact, backend="reference", **options), strict=True):
        assert (a.double() - b).norm() <= 2e-2 * b.norm()


def test_a_flash_attn_4_without_these_parameters_is_refused(library: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_flash_attn_bwd", lambda q, k, v, out, dout, lse, cu_seqlens_q=None: None)
    assert "has no parameter max_seqlen_q" in str(FLASH_ATTN_4.refuses(need(64, 64)))


@pytest.mark.parametrize(("capability", "taken"), [((8, 0), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)])
def test_flash_attn_4_is_for_hopper_and_blackwell(library: Recorder, capability: tuple[int, int], taken: bool) -> None:
    token = stand_in.set(capability)
    try:
        assert (FLASH_ATTN_4.refuses(need(64, 64)) is None) == taken
    finally:
        stand_in.reset(token)


CALLS: dict[str, tuple[dict[str, int], dict[str, Any], str | None]] = {
    "training": ({"S": 60}, {}, None),
    "packed": ({"S": 60}, {"cu_seqlens": torch.tensor([0, 3, 43, 60]).int()}, "neither packing nor windows"),
    "decode": ({"S": 1, "T": 64}, {}, "single query row"),
    "one token": ({"S": 1}, {}, "single query row"),
    "one key": ({"S": 60, "T": 1}, {"causal": False}, "single key"),
    "chunk": ({"S": 20, "T": 64}, {}, "as many queries as keys"),
    "softcap": ({"S": 60}, {"softcap": 5.0}, "no softcap"),
    "bias": ({"S": 60}, {"bias": torch.zeros(1, 4, 60, 60)}, "no mask or bias"),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_cudnn_is_asked_it_can_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that reaches cuDNN has enough rows and keys; every other call is refused with the reason."""
    seen: list[tuple[int, int]] = []

    def forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        seen.append((q.shape[2], k.shape[2]))
        return EAGER.forward(q, k, v, rule)

    recording = Kernel("cuDNN", forward, EAGER.backward, CUDNN.refuses, max_rows=None)
    sizes, options, refusal = CALLS[name]
    x = tensors(**sizes)
    from ptd_kernels.prefix_attention.problem import check_problem

    problem = check_problem(*x, **options)
    reason = merge._refuses(problem, recording)
    assert (reason is None) == (refusal is None)
    assert refusal is None or refusal in str(reason)
    if reason is None:
        merge.merge_attention(problem, recording).sum().backward()
        assert seen == [(60, 60), (60, 5)]
