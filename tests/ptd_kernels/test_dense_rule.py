"""A whole rule as one bias equals the rule, and rows that see no key are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ptd_kernels.prefix_attention.segments import EAGER, Rule
from ptd_kernels.prefix_attention.segments.dense_rule import ALIGNED, LOWEST, dense_bias, without_hidden_rows

S, T = 11, 13
NUMBERS = torch.tensor([0] * 4 + [1] * 7), torch.tensor([0] * 6 + [2] * 7)
RULES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"offset": T - S},
    "more queries than keys": {"offset": -3},
    "window": {"offset": 2, "window": 3},
    "mask": {"mask": torch.rand(2, 1, S, T, generator=torch.Generator().manual_seed(0)) < 0.1},
    "bias": {"bias": torch.randn(1, 4, S, T, dtype=torch.float64)},
    "everything": {
        "offset": 1, "window": 4, "bias": torch.randn(2, 1, S, T, dtype=torch.float64).masked_fill_(
            torch.rand(2, 1, S, T, generator=torch.Generator().manual_seed(1)) < 0.6, -torch.inf),
        "mask": torch.rand(1, 4, S, T, generator=torch.Generator().manual_seed(2)) < 0.7, "sequences": NUMBERS,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_the_bias_is_the_rule(name: str) -> None:
    torch.manual_seed(0)
    rule = Rule(0.3, **RULES[name])
    q, k, v = (torch.randn(2, heads, length, 8, dtype=torch.float64) for heads, length in ((4, S), (2, T), (2, T)))
    bias, hidden = dense_bias(S, T, rule, torch.float64, q.device)
    assert bias.shape[2:] == (S, T)
    assert bias.shape[0] in (1, 2)
    assert not any(stride % ALIGNED for stride in bias.stride()[:3])
    want, want_lse = EAGER.forward(q, k, v, rule)
    got, got_lse = without_hidden_rows(*EAGER.forward(q, k, v, Rule(0.3, bias=bias)), hidden)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_lse, want_lse)
    assert torch.equal(hidden.expand(2, 4, S), want_lse == -torch.inf)
    assert bool(hidden.any()) == (name in ("more queries than keys", "mask", "everything"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_numbers_hide_too(dtype: torch.dtype) -> None:
    """A mask of the lowest numbers of a dtype: times log2(e), as kernels compute, they are -inf."""
    lowest = torch.finfo(dtype).min
    bias = torch.zeros(1, 1, 2, T, dtype=dtype)
    bias[:, :, 1] = lowest
    _, hidden = dense_bias(2, T, Rule(1.0, bias=bias), dtype, bias.device)
    assert hidden.tolist() == [[[False, True]]]
    assert torch.tensor(LOWEST * 1.001).mul(1.4426950408889634).isinf()
    assert torch.tensor(LOWEST * 0.999).mul(1.4426950408889634).isfinite()


def test_what_is_loaded_beyond_the_last_key_is_finite() -> None:
    nothing = torch.zeros(1, 1, S, T, dtype=torch.bool)
    bias, _ = dense_bias(S, T, Rule(1.0, mask=nothing), torch.float32, nothing.device)
    assert torch.isfinite(bias.as_strided((S, ALIGNED - T), (ALIGNED, 1), T)).all()
