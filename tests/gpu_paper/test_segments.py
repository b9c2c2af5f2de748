"""Attention on the emulated GPU through torch's memory-efficient kernels: right numbers, and faults that are found.

The emulated kernels (kernels.py) assert what the real ones require and leave what the real ones leave undefined as NaN.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_backbone
from ptd_kernels import LayerKind, find_fault, prefix_attention
from ptd_kernels.prefix_attention import merge, trial
from ptd_kernels.prefix_attention.segments import Kernel, Need, pick, torch_efficient
from torch import Tensor

from ptd.backbone import load_model
from ptd.config import BackboneConfig
from ptd.inject import Attachment, check_supported
from ptd.types import UserError
from tests.gpu_paper.device import EMULATED
from tests.gpu_paper.kernels import KERNELS

pytestmark = pytest.mark.skipif(not EMULATED, reason="nothing is emulated; make gpu-1 tests the real kernels")
GPU = torch.device("cuda", 0)
aten = torch.ops.aten
EFFICIENT, BIASED = "torch memory-efficient", "torch memory-efficient, dense bias"
TRITON, TRITON_BIASED = "own Triton kernels", "own Triton kernels, dense bias"
KIND = LayerKind(4, 2, 16, 16, causal=True)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the kernels of the own tokens' segments, by name."""
    found: Counter[str] = Counter()

    def counted(need: Need, preferred: Kernel | None = None) -> Kernel:
        kernel = pick(need, preferred)
        found[kernel.name] += need.keys != 37 and not need.exact_keys
        return kernel

    monkeypatch.setattr(merge, "pick", counted)
    return found


@pytest.fixture(autouse=True)
def _new_trials() -> Iterator[None]:
    find_fault.cache_clear()
    yield
    find_fault.cache_clear()


KINDS: dict[str, tuple[LayerKind, torch.dtype, set[str]]] = {
    "fp32": (KIND, torch.float32, {EFFICIENT, BIASED}),
    "fp16": (KIND, torch.float16, {"torch flash (CUDA)", EFFICIENT, BIASED}),
    "bf16": (KIND, torch.bfloat16, {"torch flash (CUDA)", EFFICIENT, BIASED}),
    "fp32, both directions": (replace(KIND, causal=False), torch.float32, {EFFICIENT, BIASED}),
    "bf16, other values": (replace(KIND, value_head_dim=24), torch.bfloat16, {EFFICIENT, BIASED}),
    "fp32, window": (replace(KIND, window=9), torch.float32, {TRITON, BIASED}),
    "bf16, softcap": (replace(KIND, softcap=3.0), torch.bfloat16, {TRITON, TRITON_BIASED}),
    "fp32, multi-head": (replace(KIND, kv_heads=4), torch.float32, {EFFICIENT, BIASED}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_trial_finds_no_fault(used: Counter[str], name: str) -> None:
    kind, dtype, kernels = KINDS[name]
    assert find_fault(kind, GPU, dtype) is None
    assert kernels - {EFFICIENT} <= {name for name, count in used.items() if count}


def shown(B: int, S: int, T: int, share: float) -> Tensor:
    return torch.rand(B, 1, S, T, generator=torch.Generator().manual_seed(S)).to(GPU) < share


ODD: dict[str, tuple[tuple[int, ...], Callable[[], dict[str, Any]], str]] = {
    "rows that see nothing, no prefix": (
        (2, 33, 40, 4, 0), lambda: {"causal": False, "mask": shown(2, 33, 40, 0.03)}, BIASED,
    ),
    "more queries than keys, no prefix": ((2, 50, 40, 4, 0), dict, BIASED),
    "a chunk": ((1, 20, 70, 4, 5), dict, EFFICIENT),
    "one row": ((3, 1, 70, 4, 5), dict, EFFICIENT),
    "one key": ((2, 9, 1, 4, 5), lambda: {"causal": False}, EFFICIENT),
    "a bias that hides": (
        (2, 33, 33, 4, 5),
        lambda: {"bias": torch.zeros(1, 4, 33, 33, device=GPU).masked_fill(shown(1, 33, 33, 0.5), -torch.inf)}, BIASED,
    ),
    "packed, of unknown length": (
        (1, 90, 90, 4, 5), lambda: {"cu_seqlens": torch.tensor([0, 33, 34, 34, 74, 90], device=GPU).int()}, EFFICIENT,
    ),
    "packed, with room": (
        (1, 90, 90, 4, 5),
        lambda: {"cu_seqlens": torch.tensor([0, 33, 90], device=GPU).int(), "max_seqlen": 2000}, EFFICIENT,
    ),
}  # fmt: skip
"""Sizes B, S, T, query heads, P; options; and the kernel of the own tokens, in fp32 with two key heads."""


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("strided", [False, True], ids=["in rows", "by columns"])
def test_odd_shapes_equal_the_reference(used: Counter[str], name: str, strided: bool) -> None:
    (B, S, T, H, P), options, kernel = ODD[name]
    drawn = torch.Generator().manual_seed(0)

    def make(batch: int, length: int, heads: int) -> Tensor:
        x = torch.randn(batch, length, heads, 16, generator=drawn).to(GPU)
        x = x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1) if strided else x
        return x.transpose(1, 2).requires_grad_()

    x = [make(B, S, H), make(B, T, 2), make(B, T, 2), *(make(1, P, 2)[0] for _ in range(2))]
    x = [y.detach().requires_grad_() for y in x]
    results = []
    for backend in ("auto", "reference"):
        out = prefix_attention(*x, backend=backend, **options())
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(GPU)
        results.append([out, *torch.autograd.grad(out, x, dout)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert used[kernel]


def test_long_masks_are_computed_in_slices(used: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ptd_kernels.prefix_attention.segments import dense_rule

    monkeypatch.setattr(dense_rule, "MOST_SCORES", 4 * 2 * 150 * 40)
    assert find_fault(KIND, GPU, torch.float32) is None
    assert used[BIASED]


def test_a_bias_more_exact_than_the_queries_is_not_rounded() -> None:
    """ALiBi's numbers in fp32, with bf16 queries: in bf16, a distance of 1,001 is 1,000."""
    q = torch.ones(1, 1, 1, 16, dtype=torch.bfloat16, device=GPU)
    k, v = q.expand(1, 1, 2, 16), torch.eye(2, 16, dtype=torch.bfloat16, device=GPU)[None, None]
    bias = torch.tensor([1000.0, 1001.0], device=GPU).view(1, 1, 1, 2)
    out = prefix_attention(q, k, v, None, None, causal=False, bias=bias)
    assert out[0, 0, 0, 1].item() == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=5e-3)


def times(place: int, factor: float) -> Callable[..., Any]:
    """Multiply one of a kernel's results."""

    def changed(kernel: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return tuple(x * factor if i == place else x for i, x in enumerate(kernel(*args, **kwargs)))

    return changed


def given(place: int, value: Any) -> Callable[..., Any]:
    """Give a kernel another argument; a number multiplies a tensor."""

    def changed(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        new = args[place] * value if isinstance(value, float) else value
        return kernel(*args[:place], new, *args[place + 1 :], **kwargs)

    return changed


def other_scale(kernel: Any, *args: Any, **kwargs: Any) -> Any:
    return kernel(*args, scale=1.1 * kwargs["scale"])


FORWARD, BACKWARD = aten._efficient_attention_forward, aten._efficient_attention_backward
FAULTS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "no result": (FORWARD, times(0, torch.nan)),
    "sums to base 2": (FORWARD, times(1, 1.4427)),
    "no bias": (FORWARD, given(3, None)),
    "no bias backward": (BACKWARD, given(4, None)),
    "no causal rule": (FORWARD, given(9, 0)),
    "no causal rule backward": (BACKWARD, given(14, 0)),
    "another scale": (BACKWARD, other_scale),
    "another output": (BACKWARD, given(5, 0.9)),
}


def put_fault(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    operator, change = FAULTS[name]
    monkeypatch.setitem(KERNELS, operator, partial(change, KERNELS[operator]))


@pytest.mark.parametrize("name", FAULTS)
def test_a_trial_finds_a_kernel_that_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_fault(monkeypatch, name)
    assert "differs by" in str(find_fault(KIND, GPU, torch.float32))


def test_a_trial_finds_rows_that_count_though_they_see_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_efficient, "without_hidden_rows", lambda out, lse, hidden: (out, lse))
    assert str(find_fault(KIND, GPU, torch.float32)).startswith("a padded batch: the output differs by")


def test_a_trial_reports_an_error_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("cutlassF: no kernel found to launch!\nmore")

    monkeypatch.setitem(KERNELS, FORWARD, fail)
    said = find_fault(KIND, GPU, torch.float32)
    assert said == "packed sequences: it raises RuntimeError: cutlassF: no kernel found to launch!"


def test_no_prompt_is_attached_where_attention_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "INTERPRETED", False)
    path = save_backbone(tmp_path / "llama", "llama", num_hidden_layers=2)
    model = load_model(BackboneConfig(path=str(path), dtype="float32"), device=GPU, check=check_supported)
    Attachment(model).remove()
    find_fault.cache_clear()
    put_fault(monkeypatch, "another scale")
    with pytest.raises(
        UserError, match=r"on emulated NVIDIA H200, attention by 'auto' computes something else .* in tor"
    ):
        Attachment(model)
    attachment = Attachment(model, backend="merge-plain-torch")
    with attachment.any_backend():
        assert {slot.backend for slot in attachment.slots} == {"merge-plain-torch"}
    attachment.remove()
    assert find_fault(KIND, GPU, torch.float32, "merge-plain-torch") is None
