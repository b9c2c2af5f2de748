"""Triton's kernels for the prefix in `merge`: its gradient, its output, and the merge of two segments.

A process with TRITON_INTERPRET=1 runs them on a CPU (test_triton_backend.py starts it); with PTD_TEST_DEVICE=cuda they
are compiled. bf16 is compared with the exact gradient of the rounded inputs: both factors of a product are rounded.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from attention_cases import DEVICE, on_device, relative_rms
from ptd_kernels.prefix_attention import merge_outputs
from ptd_kernels.prefix_attention.segments import EAGER, SHARED_KEYS, Need, Rule
from ptd_kernels.prefix_attention.segments.shared_keys import merge_segments
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="needs a GPU or Triton's interpreter, in a process of its own"
)
EXACT = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""Highest relative error (RMS) against fp64. A factor rounded to bf16 is off by up to 2^-9."""


@pytest.fixture(autouse=True)
def _seeded_on_the_device() -> Iterator[None]:
    torch.manual_seed(0)
    with on_device():
        yield


class Sizes(NamedTuple):
    P: int
    S: int = 37
    Hq: int = 4
    Hkv: int = 2
    D: int = 16
    E: int = 16
    softcap: float | None = None
    hugging_face_layout: bool = True


CASES = {
    "one key": Sizes(1),
    "one tile": Sizes(32),
    "one tile and a half": Sizes(45, S=75, Hq=2, Hkv=2),
    "several tiles": Sizes(71, Hq=2, Hkv=1),
    "multi-query": Sizes(20, Hq=6, Hkv=1),
    "softcap": Sizes(5, softcap=1.5),
    "several tiles, softcap": Sizes(67, Hq=2, Hkv=1, softcap=1.5),
    "values differ": Sizes(9, D=20, E=40),
    "several tiles, values differ": Sizes(70, Hq=2, Hkv=1, D=24, E=8),
    "head 256": Sizes(7, Hq=2, Hkv=1, D=256, E=256),
    "other layout": Sizes(9, hugging_face_layout=False),
    "one row": Sizes(9, S=1),
}


class Call(NamedTuple):
    """Arguments of a kernel's backward: the prefix is one of two segments of the softmax behind `out` and `lse`."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor

    def exact(self) -> Call:
        return Call(*(x.double() for x in self))


def call(sizes: Sizes, dtype: torch.dtype) -> tuple[Call, Rule]:
    def made(length: int, heads: int, size: int) -> Tensor:
        if sizes.hugging_face_layout:
            return torch.randn(1, length, heads, size).to(dtype).transpose(1, 2)
        return torch.randn(1, heads, size, length).to(dtype).mT

    q, dout = made(sizes.S, sizes.Hq, sizes.D), made(sizes.S, sizes.Hq, sizes.E)
    k, v = made(sizes.P, sizes.Hkv, sizes.D), made(sizes.P, sizes.Hkv, sizes.E)
    rule = Rule(sizes.D**-0.5, sizes.softcap)
    prefix_out, prefix_lse = EAGER.forward(q.double(), k.double(), v.double(), rule)
    own_lse = torch.randn(prefix_lse.shape).double() + 2
    out, lse = merge_outputs.merge_outputs(
        made(sizes.S, sizes.Hq, sizes.E).double(), own_lse, prefix_out, prefix_lse, torch.float64
    )
    return Call(dout, q, k, v, out.to(dtype), lse.float()), rule


IN_ALL = ("one tile and a half", "several tiles, softcap")
RUNS = [*((name, torch.bfloat16) for name in CASES), *itertools.product(IN_ALL, (torch.float32, torch.float16))]


@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
def test_triton_gradient_is_the_exact_share_of_the_prefix(name: str, dtype: torch.dtype) -> None:
    given, rule = call(CASES[name], dtype)
    exact = EAGER.backward(*given.exact(), rule)
    found = SHARED_KEYS.backward(*given, rule)
    assert [x.dtype for x in found] == [dtype, torch.float32, torch.float32]
    for actual, expected in zip(found, exact, strict=True):
        assert relative_rms(actual, expected) < EXACT[dtype]
    assert SHARED_KEYS.add_backward is not None
    total = torch.randn_like(given.q) if name == "one key" else torch.randn_like(given.q).float()
    before = total.double()
    dk, dv = SHARED_KEYS.add_backward(*given, rule, total)
    assert relative_rms(total, before + exact.q) < EXACT[dtype]
    assert torch.equal(dk, found.k)
    assert torch.equal(dv, found.v)
    dk, dv = SHARED_KEYS.add_backward(*given, rule, None)
    for actual, expected in ((dk, exact.k), (dv, exact.v)):
        assert relative_rms(actual, expected) < EXACT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["one key", "several tiles, softcap", "values differ"])
def test_triton_output_of_the_prefix(name: str, dtype: torch.dtype) -> None:
    given, rule = call(CASES[name], dtype)
    expected = EAGER.forward(*(x.double() for x in given[1:4]), rule)
    for actual, exact in zip(SHARED_KEYS.forward(*given[1:4], rule), expected, strict=True):
        assert relative_rms(actual, exact) < EXACT[dtype]


def test_triton_sums_the_gradient_of_the_prefix_in_fp32() -> None:
    """Over 500 rows, rounding dk and dv to bf16 on the way would be visible: they do not fit into bf16."""
    given, rule = call(Sizes(4, S=500, Hq=2, Hkv=1), torch.bfloat16)
    for actual, exact in zip(
        SHARED_KEYS.backward(*given, rule)[1:], EAGER.backward(*given.exact(), rule)[1:], strict=True
    ):
        assert relative_rms(actual, exact) < 4e-3
        assert not torch.equal(actual, actual.bfloat16().float())


@pytest.mark.parametrize("name", ["one tile", "several tiles"])
def test_triton_gradient_reruns_bit_identically(name: str) -> None:
    given, rule = call(CASES[name], torch.bfloat16)
    first, second = (SHARED_KEYS.backward(*given, rule) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("folded", [False, True])
def test_triton_merge_is_that_of_plain_torch(dtypes: tuple[torch.dtype, torch.dtype], folded: bool) -> None:
    """Outputs of two dtypes and log-sum-exps of any strides merge; rows that see no key of one or of both are right."""
    B, H, S, E = 2, 3, 41, 24
    outs = [torch.randn(B, S, H, E).transpose(1, 2).to(dtype) for dtype in dtypes]
    sums = [torch.randn(B, S, H).transpose(1, 2) if folded else torch.randn(B, H, S) for _ in range(2)]
    sums[0][:, :, :9] = -torch.inf
    sums[1][:, 1:, 5:20] = -torch.inf
    for out, lse in zip(outs, sums, strict=True):
        out.masked_fill_((lse == -torch.inf)[..., None], 0.0)
    out, lse = merge_segments(outs[0], sums[0], outs[1], sums[1], torch.bfloat16)
    doubles = [x.double() for pair in zip(outs, sums, strict=True) for x in pair]
    want, want_lse = merge_outputs.merge_outputs(*doubles, torch.float64)
    assert (out.dtype, lse.dtype, lse.is_contiguous()) == (torch.bfloat16, torch.float32, True)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out.double(), want, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)
    assert not out[:, 1:, 5:9].any()
    assert not lse[:, 1:, 5:9].any()


@pytest.mark.parametrize("call", ["shared_keys", "shared_keys_backward", "merge_segments"])
def test_triton_operators_of_merge_are_well_behaved(call: str) -> None:
    q, k = torch.randn(1, 9, 2, 16).transpose(1, 2), torch.randn(1, 3, 1, 16).transpose(1, 2)
    lse = torch.randn(1, 2, 9)
    arguments: dict[str, tuple[Any, ...]] = {
        "shared_keys": (q, k, k, 0.3, 2.0),
        "shared_keys_backward": (q, q, k, k, q, lse, q.clone(), True, 0.3, None),
        "merge_segments": (q, lse, q, lse, torch.float32),
    }
    torch.library.opcheck(getattr(torch.ops.ptd_kernels, call).default, arguments[call])


@pytest.mark.parametrize(
    ("says", "changes", "dtype"),
    [
        ("all rows see", {"offset": 0}, torch.bfloat16),
        ("all rows see", {"bias": torch.zeros(1, 1, 1, 1)}, torch.bfloat16),
        ("tensor cores", {}, torch.float32),
    ],
)
def test_what_triton_refuses_in_merge(says: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    need = Need(torch.zeros(1, 2, 3, 8, dtype=dtype), 3, 8, Rule(1.0)._replace(**changes), exact_keys=True)
    assert says in str(SHARED_KEYS.refuses(need))
