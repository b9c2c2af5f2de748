"""The emulated GPU computes what the CPU computes, refuses what a GPU refuses, and detects waits of the host."""

from __future__ import annotations

import resource
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ptd.async_copy import AsyncHostCopy, to_device
from tests.gpu_paper.device import EMULATED, Dispatched, Seen, shapes_only, watched

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
emulated = pytest.mark.skipif(not EMULATED, reason="nothing is emulated")

WAITING: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda there: float(there.sum()),
    "a condition": lambda there: bool(there.any()),
    "a list": lambda there: there.tolist(),
    "a copy": lambda there: there.cpu(),
    "a copy by name": lambda there: there.to("cpu"),
    "places": lambda there: there.nonzero(),
    "a mask": lambda there: there[there > 0],
    "a mask put": lambda there: there.index_put_((there > 0,), torch.ones_like(there)[there > 0]),
    "indices of the host": lambda there: there[torch.tensor([0, 1])],
    "repeats": lambda there: torch.repeat_interleave(there.long()),
    "distinct": lambda there: there.unique(),
    "a copy of the host's": lambda there: torch.zeros(3).to(there.device),
    "a copy of the host's that asks not to": lambda there: torch.zeros(3).to(there.device, non_blocking=True),
    "a copy into": lambda there: there.copy_(torch.zeros(3)),
    "made from a list": lambda there: torch.tensor([1.0], device=there.device),
}
NOT_WAITING: dict[str, Callable[[Tensor], Any]] = {
    "an answer that stays": lambda there: (there + 1).sum() > 0,
    "a fill": lambda there: there.masked_fill(there > 0, 2.0),
    "a fill by index": lambda there: there.index_put_((there > 0,), there.new_zeros(())),
    "a number of the host": lambda there: there * torch.tensor(2.0),
    "the host's own": lambda there: (float(torch.ones(1)), torch.ones(2).nonzero(), torch.ones(2).tolist()),
    "a copy meanwhile": lambda there: to_device(torch.zeros(3), there.device) + there,
    "what was copied meanwhile": lambda there: AsyncHostCopy(there).read(),
    "known repeats": lambda there: torch.repeat_interleave(there, there.long(), output_size=6),
}


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("watch", ["the device", "the dispatcher"])
def test_what_waits_is_seen_and_nothing_else(watch: str, waits: bool) -> None:
    for name, operation in (WAITING if waits else NOT_WAITING).items():
        if name == "made from a list" and watch == "the dispatcher":  # does not pass through the dispatcher
            continue
        there = torch.ones(3, device=GPU).cumsum(0)
        seen = Seen()
        with watched() if watch == "the device" else Dispatched(seen) as context:
            operation(there)
        seen = context if isinstance(context, Seen) else seen
        assert bool(seen.waited) == waits, (name, seen.waited)


def test_what_is_launched_is_counted_but_no_view() -> None:
    there = torch.ones(4, 4, device=GPU, requires_grad=True)
    with watched() as seen:
        seen.doing = "forward"
        out = (there.t() @ there.detach().view(4, 4)).relu().sum()
        seen.doing = "backward"
        out.backward()
    assert dict(seen.launched) == {
        ("forward", "aten.mm"): 1,
        ("forward", "aten.relu"): 1,
        ("forward", "aten.sum"): 1,
        ("backward", "aten.fill_"): 1,
        ("backward", "aten.threshold_backward"): 1,
        ("backward", "aten.mm"): 1,
    }


def test_what_a_cpu_build_takes_apart_is_one_kernel() -> None:
    there = torch.linspace(-3, 3, 7, device=GPU).requires_grad_()
    with watched() as seen:
        out = torch.nn.functional.silu(there).sum()
        (found,) = torch.autograd.grad(out, there)
    host = there.detach().cpu().requires_grad_()
    (want,) = torch.autograd.grad(torch.nn.functional.silu(host).sum(), host)
    torch.testing.assert_close(found.cpu(), want)
    assert [seen.launched["", f"aten.{name}"] for name in ("silu", "silu_backward", "sigmoid")] == [1, 1, 0]


@emulated
def test_without_numbers_only_shapes_are_right() -> None:
    """Operations launch, and results have the right shapes, dtypes and strides, in memory that is never touched."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with watched() as seen, shapes_only():
        there = torch.zeros(1 << 14, 1 << 15, device=GPU)  # 2 GiB
        product = there.bfloat16() @ there.t().bfloat16()
        grown = torch.mm(product, product[:, :3], out=torch.empty(0, device=GPU, dtype=torch.bfloat16))
        pairs = product.max(dim=1)
        there[0, :2] = torch.ones(2)
        copied = there[0, :2].cpu()
    assert (product.shape, product.dtype, product.stride()) == ((1 << 14, 1 << 14), torch.bfloat16, (1 << 14, 1))
    assert grown.shape == (1 << 14, 3)
    assert [part.dtype for part in pairs] == [torch.bfloat16, torch.int64]
    assert copied.tolist() == [1.0, 1.0]  # copies between host and GPU do copy
    assert [seen.launched["", f"aten.{name}"] for name in ("zero_", "mm", "max")] == [1, 2, 1]
    assert len(seen.waited) == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB
    assert torch.ones(3, device=GPU).sum().item() == 3  # outside, numbers are computed again


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "a tensor of the host": lambda there: there + torch.ones(3),
    "indices of the host": lambda there: torch.nn.functional.embedding(torch.tensor([0]), there[:, None]),
    "a number where none is taken": lambda there: torch.cat([there, torch.ones(()).view(1)]),
    "an optimizer's count of steps": lambda there: torch._fused_adamw_(
        [there], [there.clone()], [there.clone()], [there.clone()], [], [torch.zeros(())], lr=1e-3, beta1=0.9,
        beta2=0.9, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_tensors_of_two_devices_are_refused(what: str) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        REFUSED[what](torch.ones(3, device=GPU))


def test_random_numbers_come_from_a_generator_of_the_device() -> None:
    drawn = []
    for seed in (1, 1, 2):
        generator = torch.Generator(GPU).manual_seed(seed)
        drawn.append([torch.rand(3, device=GPU, generator=generator).tolist() for _ in range(2)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.rand(3, device=GPU, generator=torch.Generator())


def leaves(device: torch.device, dtype: torch.dtype, keys: int = 9, queries: int = 9) -> list[Tensor]:
    """Return queries of 4 heads, and keys and values of 2 heads, packed as ``[S, H, D]``."""
    drawn = torch.Generator().manual_seed(0)
    shapes = ((queries, 4, 16), (keys, 2, 16), (keys, 2, 16))
    return [torch.randn(shape, generator=drawn).to(device, dtype).requires_grad_() for shape in shapes]


def expected(q: Tensor, k: Tensor, v: Tensor, starts: list[int], window: int | None) -> Tensor:
    """Return torch's own attention of each sequence, in fp64."""
    found = []
    for begin, end in pairwise(starts):
        rows = torch.arange(end - begin)
        seen = rows <= rows[:, None]
        if window is not None:
            seen &= rows > rows[:, None] - window
        parts = [x[begin:end].double().transpose(0, 1)[None] for x in (q, k, v)]
        found.append(scaled_dot_product_attention(*parts, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(found)


@emulated
@pytest.mark.parametrize("window", [None, 3])
def test_its_flash_attention_is_attention(window: int | None) -> None:
    starts = [0, 4, 9]
    q, k, v = leaves(GPU, torch.float16)
    bounds = torch.tensor(starts, dtype=torch.int32, device=GPU)
    sides: dict[str, Any] = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    out, lse, *_ = aten._flash_attention_forward(q, k, v, bounds, bounds, 5, 5, 0.0, True, False, **sides)
    given = torch.ones_like(out)
    state = torch.empty(2, dtype=torch.uint64, device=GPU)
    gradients = aten._flash_attention_backward(
        given, q, k, v, out, lse, bounds, bounds, 5, 5, 0.0, True, state, state, **sides
    )
    host = [x.detach().cpu().requires_grad_() for x in (q, k, v)]
    want = expected(*host, starts, window)
    torch.testing.assert_close(out.cpu().double(), want, atol=2e-3, rtol=2e-3)
    for found, wanted in zip(gradients, torch.autograd.grad(want, host, torch.ones_like(want)), strict=True):
        torch.testing.assert_close(found.cpu(), wanted, atol=4e-3, rtol=4e-3)


@emulated
def test_its_lstm_is_an_lstm() -> None:
    """Its gradients equal a CPU's; forward and backward of its cells run in kernels that a CPU does not have."""
    torch.manual_seed(0)
    module = torch.nn.LSTM(4, 3, num_layers=2, bidirectional=True)
    x = torch.randn(5, 2, 4)
    want = torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
    module.to(GPU)
    found = torch.autograd.grad(module(x.to(GPU))[0].square().sum(), list(module.parameters()))
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one.cpu(), other)
