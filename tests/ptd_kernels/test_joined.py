"""The backend that copies a short prefix before each packed sequence's keys equals the reference, or refuses the call.

Shapes: B batch, H heads, S queries, P prefix keys, D head size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import (
    DEVICE,
    LEAVES,
    Case,
    assert_gradients_of,
    assert_same,
    offsets,
    out_and_gradients,
    relative_rms,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ptd_kernels import explain_backend, prefix_attention
from ptd_kernels.prefix_attention import joined
from ptd_kernels.prefix_attention.joined import LONGEST_PREFIX, ROWS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="a backend for CPUs")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def packed(*lengths: int, **sizes: Any) -> tuple[Case, dict[str, Any]]:
    """Return a case of sequences of these lengths, and its options."""
    return Case(**{"B": 1, "S": sum(lengths), "T": sum(lengths), **sizes}), {"cu_seqlens": offsets(*lengths)}


CASES = {
    "short": packed(33, 1, 0, 40, 16),
    "one token": packed(1),
    "one prefix key": packed(20, 7, P=1),
    "longest prefix": packed(20, 7, P=LONGEST_PREFIX),
    "around a tile": packed(ROWS - 1, ROWS, ROWS + 1, D=8, E=8),
    "several tiles": packed(3 * ROWS + 5, 4, P=30, D=8, E=8),
    "wider than the first strip": packed(1100, P=30, Hq=1, Hkv=1, D=4, E=4),
    "no padding": packed(11, 27, P=5),
    "multi-query": packed(50, 21, Hq=8, Hkv=1),
    "odd head": packed(50, 21, D=7, E=7),
    "other layout": packed(50, 21, hugging_face_layout=False),
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_equals_the_reference(name: str, causal: bool, dtype: torch.dtype, rtol: float) -> None:
    case, options = CASES[name]
    leaves = case.tensors(dtype)
    expected = out_and_gradients(leaves, backend="reference", causal=causal, **options)
    assert_same(out_and_gradients(leaves, backend="joined", causal=causal, **options), expected, rtol)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(0, 2 * ROWS + 20), min_size=1, max_size=4).filter(sum),
    P=st.integers(1, LONGEST_PREFIX),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
)
def test_equals_the_reference_everywhere(lengths: list[int], P: int, causal: bool, scale: float | None) -> None:
    case, options = packed(*lengths, P=P, D=4, E=4, Hq=2, Hkv=1)
    options |= {"causal": causal, "scale": scale}
    leaves = case.tensors()
    expected = out_and_gradients(leaves, backend="reference", **options)
    assert_same(out_and_gradients(leaves, backend="joined", **options), expected, 2e-5)


def test_gradcheck() -> None:
    case, options = packed(5, 3, Hq=2, Hkv=1, D=3, E=3, P=2)
    call = lambda *leaves: prefix_attention(*leaves, backend="joined", **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, case.tensors(torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_merge(dtype: torch.dtype) -> None:
    case, options = packed(300, 17, 64, P=30, D=32, E=32)
    leaves = case.tensors(dtype)
    leaves[3:] = [x.detach().float().requires_grad_() for x in leaves[3:]]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = out_and_gradients(exact, backend="reference", **options)
    mine = out_and_gradients(leaves, backend="joined", **options)
    theirs = out_and_gradients(leaves, backend="merge", **options)
    for name, own, other, true in zip(("out", *LEAVES), mine, theirs, expected, strict=True):
        assert own.dtype == other.dtype
        assert relative_rms(own, true) < max(1.1 * relative_rms(other, true), 1e-3), name
    assert [x.dtype for x in mine[4:]] == [torch.float32, torch.float32]


def test_a_sequence_of_nan_stays_alone() -> None:
    case, options = packed(37, 13, 10)
    clean = case.tensors()
    dirty = [x.detach().clone() for x in clean[:3]]
    for x in dirty:
        x[:, :, 37:50] = torch.nan
    dirty = [x.requires_grad_() for x in dirty] + clean[3:]
    mine, expected = (out_and_gradients(x, backend="joined", **options)[:4] for x in (dirty, clean))
    for a, b in zip(mine, expected, strict=True):
        for rows in (slice(0, 37), slice(50, 60)):
            torch.testing.assert_close(a[:, :, rows], b[:, :, rows], rtol=0, atol=0)
    assert mine[0][:, :, 37:50].isnan().all()


@pytest.mark.parametrize("wanted", [("prefix_k", "prefix_v"), ("q",), ("k",), ("prefix_v",), ("v", "prefix_k")])
def test_gradients_of_a_subset(wanted: tuple[str, ...]) -> None:
    case, options = packed(30, 9)
    assert_gradients_of(wanted, case.tensors(), "joined", **options)


def test_checkpointing_gives_the_same_bits() -> None:
    case, options = packed(ROWS + 30, 9)
    leaves = case.tensors()
    call = lambda *given: prefix_attention(*given, backend="joined", **options).square().sum()  # noqa: E731
    plain, again = call(*leaves), checkpoint(call, *leaves, use_reentrant=False)
    for a, b in zip(*(torch.autograd.grad(loss, leaves) for loss in (plain, again)), strict=True):
        assert torch.equal(a, b)


def test_what_it_keeps_for_backward() -> None:
    case, options = packed(30, 18, P=2, D=16, E=16)  # 32 and 32 joined keys
    leaves, kept = case.tensors(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        out = prefix_attention(*leaves, backend="joined", **options)
    joined_keys = case.Hkv * (32 + 32) * (case.D + case.E)
    assert sum(kept) == leaves[0].numel() + joined_keys + out.numel() + out.numel() // case.E


def test_a_pass_without_data_leaves_nothing_behind() -> None:
    """A pass without data (as in `ptd plan`) caches no mask without data, which would break the next run."""
    case, options = packed(29, 8, P=3)
    cu_seqlens = options["cu_seqlens"]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x.detach()).requires_grad_() for x in case.tensors()]
        prefix_attention(*fake, backend="joined", cu_seqlens=cu_seqlens).sum().backward()
        assert fake[3].grad is not None
        assert fake[3].grad.shape == fake[3].shape
    leaves = case.tensors()
    expected = out_and_gradients(leaves, backend="reference", **options)
    assert_same(out_and_gradients(leaves, backend="joined", **options), expected, 1e-5)


def test_what_an_inference_pass_leaves_behind_serves_training() -> None:
    """The next training step works with the plans and masks that an evaluation has cached."""
    case, options = packed(31, 6, P=7)
    leaves = case.tensors()
    with torch.inference_mode():
        prefix_attention(*(x.detach() for x in leaves), backend="joined", **options)
    expected = out_and_gradients(leaves, backend="reference", **options)
    assert_same(out_and_gradients(leaves, backend="joined", **options), expected, 1e-5)


def test_it_is_chosen_for_packed_batches_on_a_cpu() -> None:
    name, reason = explain_backend(packed=True)
    assert name == "joined"
    assert "before each sequence" in reason
    assert explain_backend()[0] == explain_backend(packed=True, virtual_tokens=LONGEST_PREFIX + 1)[0] == "merge"


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "not packed": ("needs a packed batch", {}, {"cu_seqlens": None}),
    "no prefix": ("prefixes of 1 to", {"P": 0}, {}),
    "long prefix": ("prefixes of 1 to", {"P": LONGEST_PREFIX + 1}, {}),
    "window": ("no window", {}, {"window": 3}),
    "softcap": ("no window, softcap", {}, {"softcap": 2.0}),
    "bias": ("no window, softcap or bias", {}, {"bias": torch.zeros(1, 1, 29, 29)}),
    "value heads": ("same head size", {"E": 8}, {}),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_it_refuses_goes_to_another(why: str) -> None:
    says, sizes, changed = REFUSED[why]
    case, options = packed(20, 9, **sizes)
    options |= changed
    leaves = case.tensors()
    with pytest.raises(ValueError, match=f"'joined' cannot do this: .*{says}"):
        prefix_attention(*leaves, backend="joined", **options)
    expected = out_and_gradients(leaves, backend="reference", **options)
    assert_same(out_and_gradients(leaves, **options), expected, 1e-5)


def test_sequences_beyond_the_strip_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "LONGEST_SEQUENCE", 25)
    case, options = packed(20, 26)
    with pytest.raises(ValueError, match="up to 25 tokens, the longest has 26"):
        prefix_attention(*case.tensors(), backend="joined", **options)


SEVERAL = {
    "of different lengths": ([3, 20, 1], [1, 0, 2, 1]),
    "one reads none": ([5, 0], [0, 1, 0, 1]),
    "one for all": ([4, 7], [1, 1, 1, 1]),
    "the longest": ([LONGEST_PREFIX, 9], [0, 1, 1, 0]),
}


def several(lengths: list[int], index: list[int], dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Return q, k, v of four packed sequences, then keys and values of several prefixes, and the options."""
    case, options = packed(20, 9, ROWS + 3, 1, D=8, E=8)
    leaves = case.tensors(dtype=dtype)[:3]
    for size in (case.D, case.E):
        leaves += [torch.randn(n, case.Hkv, size, dtype=dtype).transpose(0, 1).requires_grad_() for n in lengths]
    return leaves, {**options, "prefix_index": torch.tensor(index)}


def attend_several(leaves: list[torch.Tensor], count: int, backend: str, options: dict[str, Any]) -> list[torch.Tensor]:
    """Return the output and all gradients."""
    for leaf in leaves:
        leaf.grad = None
    prefixes = leaves[3 : 3 + count], leaves[3 + count :]
    out = prefix_attention(*leaves[:3], *prefixes, backend=backend, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    return [out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
def test_several_prefixes_equal_the_reference(name: str, causal: bool, dtype: torch.dtype, rtol: float) -> None:
    lengths, index = SEVERAL[name]
    leaves, options = several(lengths, index, dtype)
    options["causal"] = causal
    mine, want = (attend_several(leaves, len(lengths), backend, options) for backend in ("joined", "reference"))
    for one, other in zip(mine, want, strict=True):
        largest = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=rtol * max(1.0, largest))


def test_a_prefix_of_nan_reaches_no_sequence_that_does_not_read_it() -> None:
    """Not in the output, nor in the gradients of other sequences and prefixes, bit for bit."""
    lengths, index = SEVERAL["of different lengths"]
    leaves, options = several(lengths, index, torch.float32)
    clean = attend_several(leaves, len(lengths), "joined", options)
    with torch.no_grad():
        for place in (3, 3 + len(lengths)):
            leaves[place].fill_(torch.nan)
    dirty = attend_several(leaves, len(lengths), "joined", options)
    bounds = options["cu_seqlens"].tolist()
    read = slice(bounds[1], bounds[2])  # the sequence that reads the first prefix
    for number, (one, other) in enumerate(zip(dirty, clean, strict=True)):
        if number < 4:
            assert torch.equal(one[:, :, : read.start], other[:, :, : read.start])
            assert torch.equal(one[:, :, read.stop :], other[:, :, read.stop :])
            assert one[:, :, read].isnan().any()
        elif number not in (4, 4 + len(lengths)):
            assert torch.equal(one, other)
