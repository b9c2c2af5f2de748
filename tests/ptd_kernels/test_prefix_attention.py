"""Every registered backend of `prefix_attention` equals the specification and plain SDPA.

PTD_TEST_DEVICE=cuda runs the tests on a GPU (`make gpu-1`), with Triton's compiled kernels and the GPU libraries.

Shapes: B batch, H heads, S queries, T own keys, P prefix keys, D and E head sizes of keys and values.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from attention_cases import (
    DEVICE,
    LEAVES,
    LIBRARIES,
    Case,
    assert_gradients_of,
    assert_same,
    here,
    incoming,
    offsets,
    on_device,
    out_and_gradients,
    prefix_attention,
    relative_rms,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ptd_kernels import available_backends, explain_backend
from ptd_kernels import prefix_attention as attend
from ptd_kernels.prefix_attention import merge, merge_decode, segments
from ptd_kernels.prefix_attention.problem import stand_in
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# On a CPU, Triton's kernels run only in its interpreter, in a separate process that test_triton_backend.py starts.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Backends for special calls have their own tests: test_joined.py, and test_triton_backend.py for `decode`.
NOT_HERE = ("joined", "decode") if INTERPRETED or DEVICE != "cpu" else ("joined", "decode", "triton")
BACKENDS = [
    name for name in available_backends() if name not in (NOT_HERE if DEVICE != "cpu" else (*NOT_HERE, *LIBRARIES))
]
FAST = [name for name in BACKENDS if name != "reference"]
# Triton's interpreter needs several milliseconds per tile.
EXAMPLES = {"triton": int(os.environ.get("PTD_TRITON_EXAMPLES", "5"))}


@pytest.fixture(autouse=True)
def _seeded_on_the_device() -> Iterator[None]:
    torch.manual_seed(0)
    with on_device():
        yield


def skip_if_refused(backend: str, dtype: torch.dtype = torch.float32, options: dict[str, Any] | None = None) -> None:
    """Skip the test if the backend refuses the call on purpose; the refusals have their own tests."""
    try:
        explain_backend(device=DEVICE, dtype=dtype, masked="mask" in (options or {}), backend=backend)
    except ValueError as refusal:
        pytest.skip(str(refusal))


def expand_concat_sdpa(leaves: list[Tensor], own: Tensor) -> Tensor:
    """Compute attention in plain PyTorch: expand the prefix over the batch, concatenate it, use a boolean mask."""
    q, k, v, prefix_k, prefix_v = leaves
    k = torch.cat([prefix_k.to(q.dtype).expand(q.shape[0], -1, -1, -1), k], dim=2)
    v = torch.cat([prefix_v.to(q.dtype).expand(q.shape[0], -1, -1, -1), v], dim=2)
    full = torch.nn.functional.pad(own, (prefix_k.shape[1], 0), value=True)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=full, enable_gqa=True)


def causal_mask(S: int, T: int) -> Tensor:
    return torch.ones(S, T, dtype=torch.bool).tril(T - S)[None, None]


FIXED = {
    "causal": Case(),
    "one prefix key": Case(P=1),
    "no prefix": Case(P=0),
    "multi-query": Case(Hq=8, Hkv=1),
    "bidirectional": Case(options={"causal": False}),
    "cross": Case(S=5, T=9, options={"causal": False}),
    "decode": Case(S=1, T=70),
    "decode, window": Case(S=1, T=70, options={"window": 9}),
    "long, decode": Case(B=1, S=1, T=1500, Hq=8, Hkv=2, P=300),
    "decode, nothing to see": Case(S=1, T=0, P=0),
    "decode, multi-query": Case(S=1, T=70, Hq=8, Hkv=1, D=8, E=24),
    "decode, softcap": Case(S=1, T=70, options={"softcap": 2.0, "window": 40}),
    "decode, mask": Case(S=1, T=70, options={"causal": False, "mask": (torch.arange(70) % 3 > 0)[None, None, None]}),
    "decode, bias a group": Case(S=1, T=70, options={"bias": torch.randn(2, 4, 1, 70)}),
    "decode three": Case(S=3, T=70, options={"window": 20}),
    "decode three, bias": Case(S=3, T=70, options={"bias": torch.randn(1, 4, 3, 70)}),
    "decode three, more than keys": Case(S=3, T=2, P=0),
    "chunked prefill": Case(S=40, T=70),
    "chunked prefill, window": Case(S=40, T=70, options={"window": 30}),
    "more queries than keys": Case(S=50, T=40),
    "more queries than keys, no prefix": Case(S=50, T=40, P=0),
    "no own keys": Case(T=0),
    "window": Case(S=45, T=45, options={"window": 7}),
    "long, window": Case(B=1, S=600, T=600, D=8, E=8, options={"window": 100}),
    "long, chunked prefill": Case(B=1, S=300, T=500, D=8, E=8),
    "window of one": Case(options={"window": 1}),
    "softcap": Case(options={"softcap": 1.5, "window": 4}),
    "value heads differ": Case(D=8, E=24),
    "head 256": Case(D=256, E=256),
    "odd head": Case(D=7, E=7),
    "other layout": Case(hugging_face_layout=False, S=40, T=40),
    "scale": Case(options={"scale": 0.3}),
    "rows to pad": Case(S=37, T=37, P=30),
    "packed": Case(B=1, S=90, T=90, options={"cu_seqlens": offsets(33, 1, 0, 40, 16)}),
    "packed, window": Case(B=1, S=90, T=90, options={"cu_seqlens": offsets(33, 1, 0, 40, 16), "window": 12}),
    "packed, bidirectional": Case(B=1, S=90, T=90, options={"cu_seqlens": offsets(50, 40), "causal": False}),
    "mask": Case(S=40, T=35, options={"causal": False, "mask": (torch.arange(35) % 3 > 0)[None, None, None]}),
    "bias": Case(S=40, T=35, options={"bias": torch.randn(1, 4, 40, 35), "causal": False}),
    "bias, causal": Case(S=37, T=37, options={"bias": torch.randn(1, 4, 37, 37)}),
    "bias, chunked prefill": Case(S=20, T=37, options={"bias": torch.randn(2, 1, 20, 37)}),
    "bias, more queries": Case(S=37, T=20, options={"bias": torch.randn(2, 4, 37, 20)}),
    "bias, window, softcap": Case(S=40, T=40, options={"bias": torch.randn(1, 1, 40, 40), "window": 9, "softcap": 2.0}),
    "bias, mask": Case(
        S=40, T=35, options={"causal": False, "mask": torch.rand(2, 1, 40, 35) < 0.7, "bias": torch.randn(1, 4, 40, 35)}
    ),
    "bias, packed": Case(
        B=1, S=90, T=90, options={"cu_seqlens": offsets(33, 1, 0, 40, 16), "bias": torch.randn(1, 4, 90, 90)}
    ),
    "long, bias": Case(B=1, S=600, T=600, D=8, E=8, options={"bias": torch.randn(1, 1, 600, 600)}),
    "bias, decode": Case(S=1, T=70, options={"bias": torch.randn(1, 4, 1, 70)}),
}


def fixed(name: str) -> tuple[Case, dict[str, Any]]:
    """Return a case of `FIXED` and its options, with the mask expanded to its full shape."""
    case = FIXED[name]
    options = dict(case.options)
    if "mask" in options:
        options["mask"] = options["mask"].expand(-1, -1, case.S, case.T)
    return case, options


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_equals_the_reference(backend: str, name: str, dtype: torch.dtype, rtol: float) -> None:
    case, options = fixed(name)
    skip_if_refused(backend, dtype, options)
    if INTERPRETED and backend == "triton" and name.startswith("long"):
        pytest.skip("long rows test how merge cuts its calls; slow in Triton's interpreter")
    leaves = case.tensors(dtype)
    expected = out_and_gradients(leaves, backend="reference", **options)
    assert_same(out_and_gradients(leaves, backend=backend, **options), expected, rtol)


KINDS = ("causal", "bidirectional", "window", "mask", "packed", "packed window")


@st.composite
def cases(draw: st.DrawFn, kinds: tuple[str, ...]) -> tuple[Case, dict[str, Any]]:
    Hkv = draw(st.sampled_from([1, 2, 3]))
    kind = draw(st.sampled_from(kinds))
    S, T = draw(st.integers(1, 48)), draw(st.integers(1, 48))
    options: dict[str, Any] = {"softcap": draw(st.sampled_from([None, None, 2.0]))}
    B = draw(st.integers(1, 3))
    if "packed" in kind:
        lengths = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(sum))
        B, S, T = 1, sum(lengths), sum(lengths)
        options["cu_seqlens"] = offsets(*lengths)
    if "window" in kind:
        options["window"] = draw(st.integers(1, 20))
    D = draw(st.sampled_from([4, 8, 16, 20]))
    Hq = Hkv * draw(st.integers(1, 4))
    generator = torch.Generator(DEVICE).manual_seed(draw(st.integers(0, 99)))

    def scattered() -> Tensor:
        rows = (draw(st.sampled_from([1, B])), draw(st.sampled_from([1, Hq])), S, T)
        return torch.rand(rows, generator=generator)

    if kind == "mask":
        options["mask"] = scattered() < draw(st.sampled_from([0.02, 0.5, 0.95]))
    if draw(st.sampled_from([False, False, True])):
        hidden = draw(st.sampled_from([-1.0, 0.5, 0.95]))
        bias = scattered()
        options["bias"] = (2 * bias - 1).masked_fill(bias < hidden, -torch.inf)
    options["causal"] = kind not in ("bidirectional", "mask")
    E = draw(st.sampled_from([D, D, D, 12]))
    P = draw(st.integers(0, 40))
    return Case(B, S, T, Hq, Hkv, D, E, P, draw(st.booleans())), options


@pytest.mark.parametrize("backend", FAST)
def test_equals_the_reference_everywhere(backend: str) -> None:
    skip_if_refused(backend)
    kinds = tuple(kind for kind in KINDS if backend != "triton" or kind != "mask")

    @settings(
        max_examples=EXAMPLES.get(backend, 250), deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck), database=None,
    )  # fmt: skip
    @given(drawn=cases(kinds))
    def holds(drawn: tuple[Case, dict[str, Any]]) -> None:
        case, options = drawn
        leaves = case.tensors()
        expected = out_and_gradients(leaves, backend="reference", **options)
        assert_same(out_and_gradients(leaves, backend=backend, **options), expected, 2e-5)

    holds()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"window": 3, "softcap": 2.0}, {"causal": False}, {"cu_seqlens": offsets(2, 3)}])
def test_gradcheck(backend: str, options: dict[str, Any]) -> None:
    skip_if_refused(backend, torch.float64)
    leaves = Case(B=1, S=5, T=5, Hq=2, Hkv=1, D=3, E=3, P=2).tensors(torch.float64)
    assert torch.autograd.gradcheck(lambda *x: prefix_attention(*x, backend=backend, **options), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_concatenation_and_sdpa(backend: str) -> None:
    skip_if_refused(backend)
    case = Case(S=40, T=64, Hq=8, P=30)
    leaves = case.tensors()
    out = expand_concat_sdpa(leaves, causal_mask(40, 64))
    dout = incoming(out)
    assert_same(out_and_gradients(leaves, backend=backend), [out, *torch.autograd.grad(out, leaves, dout)], 1e-5)


@dataclass(frozen=True)
class Prefixes:
    """Several prefixes of these lengths, and which sequence reads which. Equal lengths are passed as one tensor."""

    lengths: tuple[int, ...]
    index: tuple[int, ...]
    case: Case = field(default_factory=lambda: Case(B=4, S=21, T=21))

    def own(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return self.case.tensors(dtype)[:3]

    def prefixes(self, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
        case = self.case
        return [
            [torch.randn(P, case.Hkv, size).to(dtype).transpose(0, 1).requires_grad_() for P in self.lengths]
            for size in (case.D, case.E)
        ]

    def call(self, own: list[Tensor], prefixes: list[list[Tensor]], **options: Any) -> Tensor:
        given: list[Any] = list(prefixes)
        if len(set(self.lengths)) == 1:
            given = [torch.stack(some) for some in prefixes]
        index = options.pop("prefix_index", torch.tensor(self.index))
        return prefix_attention(*own, *given, prefix_index=index, **self.case.options, **options)


SEVERAL = {
    "equal": Prefixes((5, 5, 5), (2, 0, 1, 0)),
    "ragged": Prefixes((3, 70, 0, 21), (3, 1, 2, 1)),
    "one": Prefixes((9,), (0, 0, 0, 0)),
    "some unused": Prefixes((4, 30, 8), (1, 1, 1, 0)),
    "all empty": Prefixes((0, 0), (1, 0, 0, 1)),
    "decode": Prefixes((3, 40), (1, 0, 1, 1), Case(B=4, S=1, T=50)),
    "no own keys": Prefixes((3, 0), (1, 0, 1, 1), Case(B=4, S=7, T=0, options={"causal": False})),
    "mask and bias": Prefixes(
        (3, 40, 0), (1, 0, 2, 2),
        Case(
            B=4, S=20, T=30,
            options={"causal": False, "mask": torch.rand(4, 1, 20, 30) < 0.2, "bias": torch.randn(1, 4, 20, 30)},
        ),
    ),
    "bias": Prefixes((3, 40), (1, 0, 0, 1), Case(B=4, S=20, T=20, options={"bias": torch.randn(4, 1, 20, 20)})),
    "softcap, window": Prefixes((3, 40), (1, 0, 0, 1), Case(B=4, S=40, T=40, options={"softcap": 2.0, "window": 9})),
    "packed": Prefixes(
        (40, 3), (1, 0, 0, 1, 0), Case(B=1, S=90, T=90, options={"cu_seqlens": offsets(33, 1, 0, 40, 16)})
    ),
    "packed, equal": Prefixes(
        (6, 6, 6), (2, 2, 0), Case(B=1, S=60, T=60, options={"cu_seqlens": offsets(10, 30, 20), "causal": False})
    ),
    "packed, bias": Prefixes(
        (40, 3), (1, 0),
        Case(B=1, S=60, T=60, options={"cu_seqlens": offsets(20, 40), "bias": torch.randn(1, 1, 60, 60)}),
    ),
}  # fmt: skip


def gradients_of(out: Tensor, own: list[Tensor], prefixes: list[list[Tensor]]) -> list[Tensor]:
    dout = incoming(out)
    leaves = [*own, *prefixes[0], *prefixes[1]]
    return list(torch.autograd.grad(out, leaves, dout, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SEVERAL)
def test_several_prefixes_equal_separate_calls(backend: str, name: str) -> None:
    several = SEVERAL[name]
    skip_if_refused(backend, options=several.case.options)
    own, prefixes = several.own(), several.prefixes()
    out = several.call(own, prefixes, backend=backend)
    options = dict(several.case.options)
    cu_seqlens = options.pop("cu_seqlens", None)
    outs = []
    for i, prefix in enumerate(several.index):
        rows = slice(None) if cu_seqlens is None else slice(*cu_seqlens[i : i + 2].tolist())
        batch = slice(i, i + 1) if cu_seqlens is None else slice(None)
        mine = dict(options)
        for score in ("mask", "bias"):
            if score in mine:
                own_entry = batch if mine[score].shape[0] > 1 else slice(None)
                mine[score] = mine[score][own_entry, :, rows, rows if cu_seqlens is not None else slice(None)]
        alone = [x[batch, :, rows] if x is own[0] or cu_seqlens is not None else x[batch] for x in own]
        outs.append(prefix_attention(*alone, *(some[prefix] for some in prefixes), backend="reference", **mine))
    expected = torch.cat(outs, dim=0 if cu_seqlens is None else 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for actual, exact in zip(gradients_of(out, own, prefixes), gradients_of(expected, own, prefixes), strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["equal", "ragged", "packed"])
def test_prefixes_may_be_numbered_in_any_order(backend: str, name: str) -> None:
    skip_if_refused(backend)
    several = SEVERAL[name]
    own, prefixes = several.own(), several.prefixes()
    order = torch.randperm(len(several.lengths))
    # Prefix order[i] is now prefix i.
    index = torch.argsort(order)[torch.tensor(several.index)].int()
    shuffled = replace(several, lengths=tuple(several.lengths[i] for i in order))
    out = several.call(own, prefixes, backend=backend)
    again = shuffled.call(own, [[some[i] for i in order] for some in prefixes], backend=backend, prefix_index=index)
    torch.testing.assert_close(again, out, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients_of(again, own, prefixes), gradients_of(out, own, prefixes), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["equal", "packed"])
def test_identical_prefixes_are_a_shared_one(backend: str, name: str) -> None:
    skip_if_refused(backend)
    several = replace(SEVERAL[name], lengths=(20,) * len(SEVERAL[name].lengths))
    own, (keys, values) = several.own(), several.prefixes()
    shared = [keys[0], values[0]]
    expected = prefix_attention(*own, *shared, backend=backend, **several.case.options)
    out = several.call(own, [[x] * len(several.lengths) for x in shared], backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    gradients = (gradients_of(x, own, [[y] for y in shared]) for x in (out, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["some unused", "ragged", "packed, equal"])
def test_an_unread_prefix_has_a_zero_gradient(backend: str, name: str) -> None:
    skip_if_refused(backend)
    several = SEVERAL[name]
    own, prefixes = several.own(), several.prefixes()
    gradients = gradients_of(several.call(own, prefixes, backend=backend), own, prefixes)[3:]
    number = len(several.lengths)
    assert set(several.index) != set(range(number)) or 0 in several.lengths
    for i, gradient in enumerate(gradients):
        read = i % number in several.index and several.lengths[i % number] > 0
        assert bool(gradient.count_nonzero()) == read


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # numpy, in Triton's interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["ragged", "equal", "packed", "packed, bias", "decode", "mask and bias"])
def test_values_that_are_not_finite_stay_in_the_sequences_that_read_them(backend: str, name: str) -> None:
    """NaN in a prefix, or in the tokens of its readers, changes no bit of other sequences and of other prefixes."""
    several = SEVERAL[name]
    skip_if_refused(backend, options=several.case.options)
    own, prefixes = several.own(), several.prefixes()
    bad = several.index[0]
    bounds = several.case.options.get("cu_seqlens", torch.arange(several.case.B + 1)).tolist()
    at = 2 if several.case.B == 1 else 0  # where sequences lie: packed along the tokens, or in the batch
    reads_bad = torch.tensor(several.index).eq(bad).repeat_interleave(torch.tensor(bounds).diff())
    readers, others = (
        reads_bad.nonzero()[:, 0].to(own[0].device),
        reads_bad.logical_not().nonzero()[:, 0].to(own[0].device),
    )

    def outputs(own: list[Tensor], prefixes: list[list[Tensor]]) -> list[Tensor]:
        out = several.call(own, prefixes, backend=backend)
        gradients = gradients_of(out, own, prefixes)
        of_prefixes = [x for i, x in enumerate(gradients[3:]) if i % len(several.lengths) != bad]
        return [*(x.index_select(at, others) for x in (out, *gradients[:3])), *of_prefixes]

    want = outputs(own, prefixes)
    poisoned = [[torch.full_like(x, torch.nan) if i == bad else x for i, x in enumerate(some)] for some in prefixes]
    poisoned = [[x.detach().requires_grad_() for x in some] for some in poisoned]
    bad_own = [x.detach().index_fill(at, readers, torch.nan).requires_grad_() for x in own]
    for poison in ((own, poisoned), (bad_own, prefixes)):
        for one, other in zip(outputs(*poison), want, strict=True):
            assert torch.isfinite(one).all()
            assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prefix_dtype", [torch.float32, torch.float16])
def test_several_prefixes_in_half_precision(backend: str, prefix_dtype: torch.dtype) -> None:
    skip_if_refused(backend, torch.float16)
    several = SEVERAL["ragged"]
    own, prefixes = several.own(torch.float16), several.prefixes(prefix_dtype)
    out = several.call(own, prefixes, backend=backend)
    assert out.dtype == torch.float16
    exact = [[x.detach().double().requires_grad_() for x in some] for some in (own, *prefixes)]
    expected = several.call(exact[0], exact[1:], backend="reference")
    assert relative_rms(out, expected) < 2e-3
    actual, gradients = gradients_of(out, own, prefixes), gradients_of(expected, exact[0], exact[1:])
    assert [x.dtype for x in actual] == [torch.float16] * 3 + [prefix_dtype] * 8
    for a, b in zip(actual, gradients, strict=True):
        assert not b.count_nonzero() or relative_rms(a, b) < 4e-3


# If a backend reads the index on the host, the graph breaks, and dynamo reads the leaves' .grad to resume.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_prefixes_under_torch_compile(backend: str) -> None:
    skip_if_refused(backend)
    several = SEVERAL["some unused"]
    own, prefixes = several.own(), several.prefixes()

    def layer(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        several_prefixes = [list(rest[:3]), list(rest[3:])]
        return several.call([q, k, v], several_prefixes, backend=backend).square()

    leaves = [*own, *prefixes[0], *prefixes[1]]
    compiled = torch.compile(layer, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(*leaves).sum(), leaves) for f in (compiled, layer)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_several_prefixes(backend: str) -> None:
    skip_if_refused(backend, torch.float64)
    several = Prefixes((2, 1), (1, 0, 1), Case(B=3, S=3, T=3, Hq=2, Hkv=1, D=3, E=3))
    own, (keys, values) = several.own(torch.float64), several.prefixes(torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v, k0, k1, v0, v1: several.call([q, k, v], [[k0, k1], [v0, v1]], backend=backend),
        [*own, *keys, *values],
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_prefixes_rerun_bit_identically(backend: str) -> None:
    skip_if_refused(backend)
    several = SEVERAL["packed"]
    own, prefixes = several.own(), several.prefixes()
    first, second = (gradients_of(several.call(own, prefixes, backend=backend), own, prefixes) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix_dtype", [torch.float32, None], ids=["prefix fp32", "prefix half"])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=["plain", "softcap"])
def test_half_precision_loses_no_more_than_twice_what_pytorch_does(
    backend: str, dtype: torch.dtype, prefix_dtype: torch.dtype | None, options: dict[str, Any]
) -> None:
    skip_if_refused(backend, dtype)
    low = [x.detach().to(dtype) for x in Case(B=4, S=96, T=96, P=30, D=32, E=32).tensors()]
    low[3:] = [x.to(prefix_dtype or dtype) for x in low[3:]]
    low = [x.requires_grad_() for x in low]
    exact = out_and_gradients([x.detach().double().requires_grad_() for x in low], backend="reference", **options)
    actual = out_and_gradients(low, backend=backend, **options)
    assert [x.dtype for x in actual] == [dtype] * 4 + [prefix_dtype or dtype] * 2
    plain = [x.detach().requires_grad_() for x in low]
    out = expand_concat_sdpa(plain, causal_mask(96, 96))
    dout = incoming(out)
    loss = out_and_gradients([x.detach().double().requires_grad_() for x in low], backend="reference")
    yardstick = [
        relative_rms(a, b) for a, b in zip([out.detach(), *torch.autograd.grad(out, plain, dout)], loss, strict=True)
    ]
    for name, a, b, bound in zip(("out", *LEAVES), actual, exact, yardstick, strict=True):
        assert relative_rms(a, b) <= 2 * bound + 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prefix_gradient_is_summed_in_fp32(backend: str, dtype: torch.dtype) -> None:
    skip_if_refused(backend, dtype)
    rows = 1500 if backend == "triton" else 6000
    low = [x.detach().to(dtype) for x in Case(B=1, S=rows, T=1, Hq=2, Hkv=1, P=4).tensors()]
    low[3:] = [x.float() for x in low[3:]]
    low = [x.requires_grad_() for x in low]
    exact = out_and_gradients([x.detach().double().requires_grad_() for x in low], backend="reference", causal=False)
    actual = out_and_gradients(low, backend=backend, causal=False)
    # Each addend is off by about 2^-9 (bf16); a sum in bf16 would be off by several percent after this many addends.
    for gradient, expected in zip(actual[4:], exact[4:], strict=True):
        assert relative_rms(gradient, expected) < 4e-3
        assert not torch.equal(gradient, gradient.to(dtype).float()), "rounded on the way"


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_permutation(backend: str) -> None:
    skip_if_refused(backend)
    leaves = Case(B=3, P=9).tensors()
    order = torch.tensor([2, 0, 1])
    out = prefix_attention(*leaves, backend=backend)
    shuffled = prefix_attention(*(x[order] for x in leaves[:3]), *leaves[3:], backend=backend)
    torch.testing.assert_close(shuffled, out[order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_splitting_a_batch_sums_prefix_gradients(backend: str) -> None:
    skip_if_refused(backend)
    q, k, v, *prefix = Case(B=4, S=40, T=40).tensors()
    prefix_attention(q, k, v, *prefix, backend=backend).square().sum().backward()
    whole = [x.grad.clone() for x in prefix]
    for x in prefix:
        x.grad = None
    halves = [prefix_attention(q[i : i + 2], k[i : i + 2], v[i : i + 2], *prefix, backend=backend) for i in (0, 2)]
    sum(half.square().sum() for half in halves).backward()
    for x, expected in zip(prefix, whole, strict=True):
        torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 6])
def test_packed_equals_padded(backend: str, window: int | None) -> None:
    skip_if_refused(backend)
    lengths, longest = [3, 40, 17], 40
    *padded, prefix_k, prefix_v = Case(B=3, S=longest, T=longest).tensors()
    packed = [torch.cat([x[i, :, :n] for i, n in enumerate(lengths)], dim=1)[None] for x in padded]
    out = prefix_attention(
        *packed, prefix_k, prefix_v, cu_seqlens=offsets(*lengths), max_seqlen=longest, window=window, backend=backend
    )
    expected = prefix_attention(*padded, prefix_k, prefix_v, window=window, backend=backend)
    expected = torch.cat([expected[i, :, :n] for i, n in enumerate(lengths)], dim=1)[None]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(o.square().sum(), (prefix_k, prefix_v)) for o in (out, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_window_never_hides_the_prefix(backend: str) -> None:
    skip_if_refused(backend)
    q, k, v, prefix_k, prefix_v = (x.detach() for x in Case(S=50, T=50, P=4).tensors())
    one = torch.zeros_like(prefix_v)
    one[:, 0] = 1000.0
    moved = prefix_attention(q, k, v, prefix_k, prefix_v + one, window=3, backend=backend)
    still = prefix_attention(q, k, v, prefix_k, prefix_v, window=3, backend=backend)
    assert ((moved - still).abs().amax(dim=-1) > 1e-2).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["causal", "packed", "window", "mask", "bias", "softcap"])
def test_reruns_are_bit_identical(backend: str, name: str) -> None:
    case, options = fixed(name)
    skip_if_refused(backend, options=options)
    leaves = case.tensors()
    first, second = (out_and_gradients(leaves, backend=backend, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("P", [0, 5])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("additive", [False, True])
def test_rows_that_see_no_own_key(backend: str, P: int, softcap: float | None, additive: bool) -> None:
    skip_if_refused(backend, options={} if additive else {"mask": True})
    leaves = Case(S=40, T=33, P=P).tensors()
    mask = torch.rand(2, 1, 40, 33) < 0.5
    mask[0, :, 7:20] = False
    alone = prefix_attention(
        leaves[0][:1, :, 7:20], leaves[1][:1, :, :0], leaves[2][:1, :, :0], *leaves[3:], softcap=softcap,
        backend="reference",
    )  # fmt: skip
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    out, *gradients = out_and_gradients(
        leaves, causal=False, softcap=softcap, backend=backend, **({"bias": bias} if additive else {"mask": mask})
    )
    torch.testing.assert_close(out[:1, :, 7:20], alone.detach(), rtol=1e-5, atol=1e-6)
    assert P or not out[:1, :, 7:20].any()
    assert all(torch.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("garbage", [1e4, -1e4])
def test_padding_does_not_leak(backend: str, garbage: float) -> None:
    skip_if_refused(backend, options={"mask": True})
    clean = Case(S=40, T=40).tensors()
    mask = causal_mask(40, 40).repeat(2, 1, 1, 1)
    mask[1, :, :, 29:] = False
    dirty = [x.detach().clone() for x in clean]
    for x in dirty[1:3]:
        x[1, :, 29:] = garbage
    dirty = [x.requires_grad_() for x in dirty]
    first, second = (out_and_gradients(x, causal=False, mask=mask, backend=backend) for x in (clean, dirty))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("backend", FAST)
def test_a_packed_sequence_of_nan_stays_alone(backend: str) -> None:
    skip_if_refused(backend)
    if DEVICE != "cpu" and backend == "merge":
        pytest.skip("fp32 on a GPU gets plain torch, which multiplies hidden keys by 0")
    clean = Case(B=1, S=60, T=60).tensors()
    dirty = [x.detach().clone() for x in clean[:3]]
    for x in dirty:
        x[:, :, 37:50] = torch.nan
    options = {"cu_seqlens": offsets(37, 13, 10), "backend": backend}
    out, expected = prefix_attention(*dirty, *clean[3:], **options), prefix_attention(*clean, **options)
    for rows in (slice(0, 37), slice(50, 60)):
        torch.testing.assert_close(out[:, :, rows], expected[:, :, rows], rtol=1e-6, atol=1e-6)
    assert out[:, :, 37:50].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "wanted", [("prefix_k", "prefix_v"), ("q",), ("k",), ("prefix_v",), ("q", "prefix_k"), ("v", "prefix_k")]
)
def test_gradients_of_a_subset(backend: str, wanted: tuple[str, ...]) -> None:
    skip_if_refused(backend)
    assert_gradients_of(wanted, Case().tensors(), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("P", [None, 0])
def test_without_a_prefix(backend: str, P: int | None) -> None:
    skip_if_refused(backend)
    q, k, v, *prefix = Case(P=0).tensors()
    given_prefix = [None, None] if P is None else prefix
    out = prefix_attention(q, k, v, *given_prefix, backend=backend)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert q.grad is not None
    assert all(x is None or x.grad.shape == x.shape for x in given_prefix)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing_and_a_prefix_used_twice(backend: str) -> None:
    skip_if_refused(backend)
    leaves = Case().tensors()

    def two_layers(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, name: str = backend) -> Tensor:
        first = prefix_attention(q, k, v, prefix_k, prefix_v, backend=name)
        return prefix_attention(first, k, v, prefix_k, prefix_v, backend=name)

    plain = torch.autograd.grad(two_layers(*leaves).square().sum(), leaves)
    again = torch.autograd.grad(checkpoint(two_layers, *leaves, use_reentrant=False).square().sum(), leaves)
    exact = torch.autograd.grad(two_layers(*leaves, name="reference").square().sum(), leaves)
    for a, b, c in zip(plain, again, exact, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype(backend: str, dtype: torch.dtype) -> None:
    skip_if_refused(backend, dtype)
    leaves = Case().tensors()
    with torch.autocast(DEVICE, dtype):
        out = prefix_attention(*leaves, backend=backend)
    assert out.dtype == dtype
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(out.float().sum(), leaves))


def test_backward_keeps_only_inputs_output_and_lse() -> None:
    leaves, kept = Case(B=1, S=64, T=64).tensors(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        out = prefix_attention(*leaves, backend="merge")
    assert sum(kept) == sum(x.numel() for x in leaves) + out.numel() + out.numel() // out.shape[3]


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"causal": False}, {"softcap": 2.0}])
@pytest.mark.parametrize("rows", [7, 10**6])
@pytest.mark.parametrize("longest", [None, 32, 40])
def test_packing_whose_offsets_stay_on_the_device(options: dict[str, Any], rows: int, longest: int | None) -> None:
    case, cu_seqlens = Case(B=1, S=53, T=53, P=0), offsets(20, 1, 0, 32)
    q, k, v, *_ = leaves = case.tensors(torch.float64)
    expected = out_and_gradients(leaves, backend="reference", cu_seqlens=cu_seqlens, **options)
    kernel = replace(segments.EAGER, max_rows=lambda *_: rows)
    offset = 0 if options.get("causal", True) else None
    rule = segments.Rule(0.25, options.get("softcap"), offset, options.get("window"), None, None, cu_seqlens, longest)
    cut = merge.tiles(kernel, q, k, rule, None)
    if longest is not None and rows == 7:
        assert min(tile.k1 - tile.k0 for tile in cut) < longest + 7  # never all keys of the pack
    out, lse = merge.segment_forward(kernel, q, k, v, cut)
    dout = incoming(out)
    gradients = merge.segment_backward(kernel, dout, q, k, v, out, lse, cut)
    for a, b in zip((out, *gradients), expected, strict=False):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("packed", [False, True])
def test_cuda_adapter_fits_the_installed_schema(packed: bool) -> None:
    q, k = torch.empty(1, 10, 8, 64, device="meta"), torch.empty(1, 10, 2, 64, device="meta")
    q, k = (x.bfloat16().transpose(1, 2) for x in (q, k))
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta") if packed else None
    rule = segments.Rule(0.1, None, 0, 4, cu_seqlens=cu_seqlens, max_seqlen=6 if packed else None)
    out, lse = segments.TORCH_FLASH_CUDA.forward(q, k, k, rule)
    assert (out.shape, lse.shape) == (q.shape, (1, 8, 10))
    gradients = segments.TORCH_FLASH_CUDA.backward(out, q, k, k, out, lse, rule)
    assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape]


def test_cudnn_adapter_fits_the_installed_schema() -> None:
    q, k, v = (torch.empty(2, 10, *size, device="meta").transpose(1, 2) for size in ((8, 64), (2, 64), (2, 32)))
    rule = segments.Rule(0.1, None, 0)
    out, lse = segments.CUDNN.forward(q, k, v, rule)
    assert (out.shape, lse.shape) == ((2, 8, 10, 32), (2, 8, 10))
    gradients = segments.CUDNN.backward(out, q, k, v, out, lse, rule)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("backend", [name for name in LIBRARIES if name != "merge-plain-torch"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_gpu_libraries_refuse_the_cpu_with_a_reason(backend: str) -> None:
    with pytest.raises(ValueError, match=rf"backend='{backend}' cannot do this: .*: it needs an NVIDIA GPU.* on cpu"):
        attend(*Case().tensors(), backend=backend)


@pytest.mark.parametrize("kernel", [x for x in segments.ON_REQUEST if x is not segments.EAGER], ids=lambda x: x.name)
def test_a_refused_kernel_is_not_picked(kernel: segments.Kernel) -> None:
    need = segments.Need(torch.zeros(1, 2, 3, 8), 3, 8, segments.Rule(1.0, softcap=2.0))
    assert kernel.refuses(need)
    assert segments.pick(need, kernel) is segments.EAGER


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("T", [1, 64, 100, 150])
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("kernel", [segments.EAGER, segments.TORCH_FLASH_CPU], ids=lambda kernel: kernel.name)
def test_keys_split_for_decoding(kernel: segments.Kernel, parts: int, T: int, scored: bool) -> None:
    q, k, v, *_ = (x.detach() for x in Case(B=1, S=1, T=T, Hq=4, Hkv=2, P=0).tensors())
    if kernel.refuses(segments.Need(q, T, v.shape[3], segments.Rule(0.3))):
        pytest.skip("not on this device")
    mask = torch.rand(1, 1, 1, T) < 0.4 if scored else None
    bias = torch.randn(1, 4, 1, T) if scored else None
    rule = segments.Rule(0.3, mask=mask, bias=bias)
    out, lse = merge_decode.decode_forward(kernel, q, k, v, rule, parts)
    expected, total = segments.EAGER.forward(q, k, v, rule)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, total, rtol=1e-5, atol=1e-6)


def test_slices_of_plain_torch_depend_on_the_device() -> None:
    """On a CPU 4 M scores; for a GPU of 80 GB, whose place CPU tensors take in a plan, twenty times as many."""
    of = lambda: segments.EAGER.max_rows(torch.device("cpu"), 32, 1 << 12, False)  # noqa: E731
    assert of() == 32
    token = stand_in.set((9, 0))
    try:
        assert of() == 20 * 32
    finally:
        stand_in.reset(token)


def test_explain_backend() -> None:
    name, reason = explain_backend()
    assert name in FAST
    assert "flash" in reason
    assert "plain torch" in explain_backend(softcap=30.0)[1]
    assert explain_backend(backend="reference")[0] == "reference"
    assert explain_backend(masked=True, packed=False)[0] in FAST
    assert "plain torch" in explain_backend(packed=True, dtype=torch.bfloat16, value_head_dim=32)[1]


DOUBLE = torch.zeros(2, 5, 16, dtype=torch.float64)
TWO_PREFIXES: dict[str, Any] = {
    **dict.fromkeys(("prefix_k", "prefix_v"), torch.zeros(2, 2, 5, 16)),
    "prefix_index": torch.zeros(1, dtype=torch.int64),
}


def _bad(**changes: Any) -> dict[str, Any]:
    return dict(zip(LEAVES, Case(B=1).tensors(), strict=True)) | here(changes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("says", "changes"),
    [
        ("q: expected", {"q": torch.zeros(4, 13, 16)}),
        ("q: got torch.int64", {"q": torch.zeros(1, 4, 13, 16, dtype=torch.int64)}),
        ("k: got torch.float64", {"k": torch.zeros(1, 2, 13, 16, dtype=torch.float64)}),
        ("k: got .*meta", {"k": torch.zeros(1, 2, 13, 16, device="meta")}),
        ("k: got", {"k": torch.zeros(2, 2, 13, 16)}),
        ("k: got", {"k": torch.zeros(1, 2, 13, 8)}),
        ("v: got", {"v": torch.zeros(1, 2, 12, 16)}),
        ("multiple", {"k": torch.zeros(1, 3, 13, 16), "v": torch.zeros(1, 3, 13, 16)}),
        ("head sizes", {n: torch.zeros(1, 2, 13, 257) for n in ("q", "k", "v")}),
        ("prefix_k: got", {"prefix_k": torch.zeros(4, 5, 16)}),
        ("prefix_k: got torch.int32", {"prefix_k": torch.zeros(2, 5, 16, dtype=torch.int32)}),
        ("prefix_v: got", {"prefix_v": torch.zeros(5, 2, 16)}),
        ("virtual tokens", {"prefix_v": torch.zeros(2, 6, 16)}),
        ("together", {"prefix_v": None}),
        ("window: got 0", {"window": 0}),
        ("window: got 1.5", {"window": 1.5}),
        ("window needs causal", {"window": 2, "causal": False}),
        ("softcap", {"softcap": 0.0}),
        ("whole rule", {"mask": torch.ones(1, 1, 13, 13, dtype=torch.bool)}),
        ("mask: got", {"mask": torch.ones(13, 13, dtype=torch.bool), "causal": False}),
        ("mask: got", {"mask": torch.ones(1, 2, 13, 13, dtype=torch.bool), "causal": False}),
        ("mask: got torch.int64", {"mask": torch.ones(1, 1, 13, 13, dtype=torch.int64), "causal": False}),
        ("mask: got torch.float32", {"mask": torch.ones(1, 1, 13, 13), "causal": False}),
        ("bias: got", {"bias": torch.zeros(1, 3, 13, 13)}),
        ("bias: got .*meta", {"bias": torch.zeros(1, 1, 13, 13, device="meta")}),
        ("bias: got torch.bool", {"bias": torch.ones(1, 1, 13, 13, dtype=torch.bool)}),
        ("bias requires", {"bias": torch.zeros(1, 1, 13, 13, requires_grad=True)}),
        ("cu_seqlens: got", {"cu_seqlens": offsets(13).long()}),
        ("cu_seqlens: got", {"cu_seqlens": torch.zeros(1, dtype=torch.int32)}),
        ("ascend from 0 to the 13", {"cu_seqlens": offsets(12)}),
        ("ascend from 0 to the 13", {"cu_seqlens": torch.tensor([0, 9, 4, 13], dtype=torch.int32)}),
        ("exclude", {"cu_seqlens": offsets(13), "causal": False, "mask": torch.ones(1, 1, 13, 13).bool()}),
        ("batch 1", {"cu_seqlens": offsets(13), "q": torch.zeros(1, 4, 12, 16)}),
        ("longest packed", {"cu_seqlens": offsets(8, 5), "max_seqlen": 7}),
        ("max_seqlen: got", {"max_seqlen": 7.5}),
        ("prefix_k: got .*with a prefix_index", {"prefix_index": torch.zeros(1).int()}),
        ("prefix_k: got .*need a prefix_index", {"prefix_k": torch.zeros(3, 2, 5, 16)}),
        ("give prefix_k", {"prefix_k": None, "prefix_v": None, "prefix_index": torch.zeros(1).int()}),
        ("prefix_index: got .*float32", TWO_PREFIXES | {"prefix_index": torch.zeros(1)}),
        ("prefix_index: got 2 entries for 1", TWO_PREFIXES | {"prefix_index": torch.zeros(2).int()}),
        ("prefix_index: got values from 2 to 2", TWO_PREFIXES | {"prefix_index": torch.tensor([2], device="cpu")}),
        ("prefix_index: got values from -1", TWO_PREFIXES | {"prefix_index": torch.tensor([-1], device="cpu")}),
        ("prefix_index: got a tensor on meta", TWO_PREFIXES | {"prefix_index": torch.zeros(1, device="meta").int()}),
        (r"prefix_k\[1\]: got", TWO_PREFIXES | {"prefix_k": [torch.zeros(2, 5, 16), torch.zeros(2, 5, 8)]}),
        (r"prefix_k\[1\]: got torch.float64", TWO_PREFIXES | {"prefix_k": [torch.zeros(2, 5, 16), DOUBLE]}),
        ("virtual tokens", TWO_PREFIXES | {"prefix_v": [torch.zeros(2, 5, 16), torch.zeros(2, 4, 16)]}),
        ("prefix_v: got", TWO_PREFIXES | {"prefix_v": []}),
    ],
)
def test_bad_input_is_refused(backend: str, says: str, changes: dict[str, Any]) -> None:
    if DEVICE != "cpu" and says.startswith(("ascend", "longest")):
        pytest.skip("values on a GPU are not read")
    with pytest.raises(ValueError, match=says):
        prefix_attention(**_bad(**changes), backend=backend)


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'tritn' is unknown; expected 'auto' or one of"):
        prefix_attention(**_bad(), backend="tritn")
