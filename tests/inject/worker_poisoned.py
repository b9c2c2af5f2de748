"""Run batches with several prefixes through the Triton kernels in the interpreter, and poison one prefix at a time."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from ptd_kernels import prefix_attention

LENGTHS, SIZES, READS = (9, 4, 6, 5), (5, 0, 18), (0, 2, 1, 0)


def run(keys: list[torch.Tensor], values: list[torch.Tensor], bad: int) -> list[torch.Tensor]:
    """Return the outputs of the rows that do not read prefix ``bad``, and the gradients of the other prefixes."""
    torch.manual_seed(1)
    q = torch.randn(1, sum(LENGTHS), 4, 16).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(1, sum(LENGTHS), 2, 16).transpose(1, 2) for _ in range(2))
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    out = prefix_attention(q, k, v, keys, values, cu_seqlens=bounds, prefix_index=torch.tensor(READS), backend="triton")
    rows = [row for row, read in zip(out.split(LENGTHS, dim=2), READS, strict=True) if read != bad]
    others = [x for some in (keys, values) for number, x in enumerate(some) if number != bad]
    return [*rows, *torch.autograd.grad(out.square().sum(), others)]


def main() -> None:
    torch.manual_seed(0)
    keys, values = ([torch.randn(2, size, 16, requires_grad=True) for size in SIZES] for _ in range(2))
    for bad in (0, 2):
        want = run(keys, values, bad)
        poison = [[torch.full_like(x, torch.nan, requires_grad=True) if n == bad else x for n, x in enumerate(some)]
                  for some in (keys, values)]  # fmt: skip
        got = run(*poison, bad)
        assert all(torch.isfinite(x).all() for x in want)
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True)), f"prefix {bad} leaks"
    print("2 prompts poisoned, no bit changed")


main()
