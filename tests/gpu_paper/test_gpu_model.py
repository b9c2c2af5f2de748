"""The model of a step on GPUs (benchmarks/gpu_model.py): how much a step may launch, and sums that have to be right.

`LAYER` and `STEP` are upper bounds at the sizes of 7B and 8B models. A change that launches less lowers them.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ptd_kernels import prefix_attention
from torch import Tensor

from tests.gpu_paper.device import EMULATED, shapes_only, watched

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gpu_model import CELLS, comparison, report
from gpu_model_decode import CELLS as TOKENS
from gpu_model_decode import part_of, prediction_of_token, report_on_tokens, trace_token
from gpu_model_roofline import GPUS, SHORTEST, prediction, seconds
from gpu_model_trace import PARTS, Launch, Launches, launches_of, trace
from gpu_model_triton import TILE_PRODUCTS, touched

pytestmark = pytest.mark.skipif(not EMULATED, reason="nothing is emulated")

GPU = torch.device("cuda", 0)
traced = cache(trace)
P32, P512, P2048, ONE_ROW, RECOMPUTED, B8 = CELLS
LAYER = {
    P32: {"GEMMs": 14, "attention": 3, "prefix gradient": 4, "merging": 3, "autograd elementwise": 4,
          "transformers elementwise": 5, "optimizer": 2},
    P512: {"GEMMs": 14, "attention": 3, "prefix gradient": 6, "merging": 3, "autograd elementwise": 4,
           "transformers elementwise": 5, "optimizer": 2},
    P2048: {"GEMMs": 14, "attention": 3, "prefix gradient": 5, "merging": 3, "autograd elementwise": 4,
            "transformers elementwise": 5, "optimizer": 2},
    ONE_ROW: {"GEMMs": 14, "attention": 3, "prefix gradient": 4, "merging": 3, "autograd elementwise": 4,
              "transformers elementwise": 5, "optimizer": 2},
    RECOMPUTED: {"GEMMs": 20, "attention": 5, "prefix gradient": 4, "merging": 6, "autograd elementwise": 4,
                 "transformers elementwise": 9, "optimizer": 2},
    B8: {"GEMMs": 14, "attention": 3, "prefix gradient": 4, "merging": 3, "autograd elementwise": 4,
         "transformers elementwise": 5, "optimizer": 2},
}  # fmt: skip
"""Launches of a layer of the middle, forward and backward, by part; none of the parts that are missing here. The two
of the optimizer copy the gradients of keys and values into the flat gradient."""
STEP = {
    P32: {"GEMMs": 446, "attention": 95, "prefix gradient": 128, "merging": 96, "autograd elementwise": 139,
          "transformers elementwise": 171, "loss": 23, "optimizer": 111, "other": 17},
    RECOMPUTED: {"GEMMs": 642, "attention": 160, "prefix gradient": 128, "merging": 192, "autograd elementwise": 146,
                 "transformers elementwise": 299, "loss": 23, "optimizer": 111, "other": 18},
    B8: {"GEMMs": 446, "attention": 95, "prefix gradient": 128, "merging": 96, "autograd elementwise": 139,
         "transformers elementwise": 171, "loss": 39, "optimizer": 111, "other": 17},
}  # fmt: skip
"""Launches of a whole step, by part."""


def sums(launches: Counter[Launch], value: Callable[[Launch], int] = lambda launch: 1) -> dict[str, int]:
    """Return the sum of a value of the launches by part."""
    found = dict.fromkeys(PARTS, 0)
    for launch, count in launches.items():
        found[launch.part] += count * value(launch)
    return {part: total for part, total in found.items() if total}


@pytest.mark.parametrize("name", LAYER)
def test_a_layer_launches_no_more(name: str) -> None:
    found = sums(traced(CELLS[name]).layer)
    assert {part: count for part, count in found.items() if count > LAYER[name].get(part, 0)} == {}


@pytest.mark.parametrize("name", STEP)
def test_a_step_launches_no_more(name: str) -> None:
    found = sums(traced(CELLS[name]).launches())
    assert {part: count for part, count in found.items() if count > STEP[name][part]} == {}


def test_layers_of_the_middle_are_all_alike() -> None:
    """A trace of five layers has the launches, bytes and FLOPs that traces of two and three layers predict."""
    cell = replace(CELLS[P32], sizes=replace(CELLS[P32].sizes, layers=5))
    want, found = launches_of(cell), traced(CELLS[P32])._replace(cell=cell).launches()
    for value in (lambda launch: 1, lambda launch: launch.read, lambda launch: launch.written, flops):
        assert sums(found, value) == sums(want, value)


def flops(launch: Launch) -> int:
    return launch.flops


@pytest.mark.parametrize("name", [P32, P2048, ONE_ROW, B8])
def test_products_are_those_of_a_frozen_backbone(name: str) -> None:
    """A layer computes 2 FLOPs per weight and token forward and 2 backward, and reads its weights in both passes."""
    cell, step = CELLS[name], traced(CELLS[name])
    weights = cell.sizes.layer_weights
    assert sums(step.layer, flops)["GEMMs"] == 2 * 2 * weights * cell.tokens
    assert sums(step.layer, lambda launch: launch.read)["GEMMs"] >= 2 * 2 * weights  # two passes, two bytes each
    # The first layer has no gradient for its input, and the last layer computes half of the tokens.
    whole = 2 * 2 * cell.sizes.layers * weights * cell.tokens
    assert 0.97 * whole < sums(step.launches(), flops)["GEMMs"] < whole
    half = cell.tokens // 2
    assert sums(step.launches(), flops)["loss"] == 2 * 2 * half * cell.sizes.hidden * cell.sizes.vocabulary
    assert sums(step.launches(), lambda launch: launch.read)["loss"] > 2 * 2 * cell.sizes.hidden * cell.sizes.vocabulary


def test_checkpointing_computes_the_layers_again() -> None:
    cell = CELLS[RECOMPUTED]
    once = 2 * cell.sizes.layer_weights * cell.tokens
    found = sums(traced(cell).layer, flops)["GEMMs"]
    assert 2.5 * once < found <= 3 * once  # the output of the last product of a layer is not needed again


@pytest.mark.parametrize("name", [P32, P512, ONE_ROW, B8])
def test_attention_computes_its_pairs(name: str) -> None:
    """A prefix that fits into one tile takes five products in the backward pass; else two are computed twice."""
    cell, found = CELLS[name], sums(traced(CELLS[name]).layer, flops)
    own, prefix = cell.rows * cell.length * (cell.length + 1) // 2, cell.tokens * cell.virtual_tokens
    assert found["attention"] == cell.sizes.hidden * ((4 + 10) * own + 4 * prefix)
    assert found["prefix gradient"] == cell.sizes.hidden * (10 if cell.virtual_tokens == 32 else 14) * prefix


OPERATIONS: dict[str, tuple[Callable[[Tensor], Any], tuple[int, int, int]]] = {
    "elementwise": (lambda x: x * x.t(), (128, 64, 0)),
    "a tensor twice": (lambda x: x + x, (64, 64, 0)),
    "in place": (lambda x: x.add_(torch.ones(4, device=GPU)), (80, 64, 0)),
    "a copy": (lambda x: x.copy_(x[0].bfloat16()), (8, 64, 0)),
    "a fill": (lambda x: x.zero_(), (0, 64, 0)),
    "one row for all": (lambda x: x * x[:1].expand(4, 4), (80, 64, 0)),
    "picked rows": (lambda x: x.index_select(0, torch.zeros(2, dtype=torch.int64, device=GPU)), (48, 32, 0)),
    "a product": (lambda x: x[:2] @ x, (96, 32, 64)),
    "into given memory": (lambda x: torch.mm(x[:2], x, out=torch.empty(2, 4, device=GPU)), (96, 32, 64)),
}
"""Operations on a matrix [4, 4] in fp32, and what the last launch reads, writes and computes."""


@pytest.mark.parametrize("name", OPERATIONS)
def test_traffic_is_what_the_operation_needs(name: str) -> None:
    operation, want = OPERATIONS[name]
    x = torch.ones(4, 4, device=GPU)
    seen = Launches()
    with watched(seen):
        operation(x)
    last = list(seen.counts)[-1]
    assert (last.read, last.written, last.flops) == want


def test_a_triton_launch_costs_what_its_arguments_say() -> None:
    """Each tensor counts once, a tensor that is added to twice; FLOPs are those of whole tiles."""
    S, P, H, D = 70, 5, 2, 16
    q, k = (torch.ones(1, length, H, D, device=GPU, dtype=torch.bfloat16).transpose(1, 2) for length in (S, P))
    lse, dq, dout, out = torch.ones(1, H, S, device=GPU), q.clone(), q.clone(), q.clone()
    seen = Launches()
    with watched(seen):
        torch.ops.ptd_kernels.shared_keys_backward(dout, q, k, k.clone(), out, lse, dq, True, 1.0, None)
    (launch,) = (each for each in seen.counts if each.operator == "triton.short_prefix_kernel")
    rows, keys = 2 * S * H * D, 2 * P * H * D
    partial = 4 * 2 * P * H * D * 2  # two tiles of rows are two splits
    assert (launch.read, launch.written) == (4 * rows + 2 * keys + 4 * H * S, rows + partial)
    assert launch.flops == 2 * 5 * H * 128 * 32 * D  # tiles of 64 rows and 32 keys


def test_the_products_of_own_keys_are_those_of_the_tiles_that_rows_see() -> None:
    """Four packed sequences of 256 causal rows, in tiles of 64 rows and 64 keys, and a prefix of five keys."""
    q, prefix = (torch.ones(1, length, 2, 16, device=GPU).transpose(1, 2) for length in (1024, 5))
    bounds = torch.arange(0, 1025, 256, dtype=torch.int32, device=GPU)
    seen = Launches()
    with shapes_only(), watched(seen):
        k, v, prefix_v = q.clone(), q.clone(), prefix.clone()
        seen.counts.clear()
        prefix_attention(q, k, v, prefix[0], prefix_v[0], cu_seqlens=bounds, max_seqlen=256, backend="triton")
    (launch,) = (each for each in seen.counts if each.operator == "triton.forward_kernel")
    assert (launch.part, launch.rate) == ("attention", "fp32")
    tiles = (1 + 2 + 3 + 4) + 4 * 1
    assert launch.flops == 4 * 16 * (2 * 4 * tiles * 64 * 64)
    assert launch.read == q.numel() * 4 * 3 + 2 * prefix.numel() * 4 + bounds.numel() * 4


def test_a_kernel_with_unknown_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TILE_PRODUCTS, "forward_kernel")
    q = torch.ones(1, 2, 9, 16, device=GPU)
    unpriced = "no FLOPs for the Triton kernel forward_kernel"
    with pytest.raises(RuntimeError, match=unpriced), watched(Launches()):
        prefix_attention(q, q, q, None, None, backend="triton")


def liger_kernel(module: str, name: str) -> Any:
    return getattr(pytest.importorskip(f"liger_kernel.ops.{module}"), name).fn


def arguments_of(kernel: Any) -> dict[str, Any]:
    """Return tensors for the pointers of a kernel, and ones for its other parameters."""
    names = inspect.signature(kernel).parameters
    bare = ("cos", "sin", "out", "dout", "delta")
    return {name: torch.ones(1) if name in bare or name.endswith("_ptr") else 1 for name in names}


TRITON: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    "in its own memory": ("rope", "_triton_rope", {"BACKWARD_PASS": True}, "q_ptr k_ptr cos sin", "q_ptr k_ptr"),
    "pointers that move": ("swiglu", "_swiglu_backward_kernel", {}, "dc_ptr a_ptr b_ptr", "a_ptr b_ptr"),
    "branches not taken": (
        "fused_add_rms_norm", "_fused_add_rms_norm_backward_kernel",
        {"COMPUTE_DW": False, "has_dS_out": False, "casting_mode": 0}, "dY_ptr X_ptr W_ptr RSTD_ptr", "dX_ptr",
    ),
    "branches taken": (
        "fused_add_rms_norm", "_fused_add_rms_norm_backward_kernel",
        {"COMPUTE_DW": True, "has_dS_out": True}, "dY_ptr dS_out_ptr X_ptr W_ptr RSTD_ptr", "dX_ptr dW_ptr",
    ),
}  # fmt: skip
"""Kernels of Liger: arguments that decide, and what the kernel reads and writes."""


@pytest.mark.parametrize("case", TRITON)
def test_what_a_triton_kernel_reads_and_writes(case: str) -> None:
    module, name, decisive, read, written = TRITON[case]
    kernel = liger_kernel(module, name)
    assert touched(kernel, arguments_of(kernel) | decisive) == (set(read.split()), set(written.split()), False)


def test_the_accesses_of_helpers_count() -> None:
    """`delta_kernel` loads in a function that it calls."""
    from ptd_kernels.prefix_attention.fused.backward import delta_kernel

    assert touched(delta_kernel.fn, arguments_of(delta_kernel.fn)) == ({"out", "dout"}, {"delta"}, False)


def test_the_traffic_of_a_triton_kernel() -> None:
    """SwiGLU's backward pass reads three tensors and writes two, and only those change."""
    swiglu = pytest.importorskip("liger_kernel.ops.swiglu")
    a, b, dc = (torch.randn(2, 8, device=GPU) for _ in range(3))
    before = [x.clone() for x in (a, b, dc)]
    swiglu.float = Scalar
    seen = Launches()
    try:
        with watched(seen):
            swiglu.swiglu_backward(a, b, dc)
    finally:
        del swiglu.float
    (launch,) = seen.counts
    assert (launch.operator, launch.read, launch.written) == ("triton._swiglu_backward_kernel", 3 * 64, 2 * 64)
    assert [torch.equal(x, old) for x, old in zip((a, b, dc), before, strict=True)] == [False, False, True]


class Scalar(float):
    """A Python number with Triton's ``to``, which the interpreter passes instead of a scalar."""

    def to(self, dtype: Any) -> Scalar:
        return self


def test_a_launch_takes_as_long_as_its_slowest_limit() -> None:
    rates = {"bf16": 1e12, "memory": 1e9}
    memory = Launch("GEMMs", "aten.mm", "bf16", 5_000_000, 1_000_000, 10**9, "")
    assert seconds(memory, rates) == pytest.approx(6e-3)
    assert seconds(memory._replace(flops=10**10), rates) == pytest.approx(1e-2)
    assert seconds(memory._replace(read=10, written=10, flops=0), rates) == SHORTEST


def test_a_prediction_is_the_sum_of_its_parts() -> None:
    found = {name: prediction(traced(CELLS[P32]), gpu) for name, gpu in GPUS.items()}
    for name, each in found.items():
        assert sum(part["milliseconds"] for part in each["parts"].values()) == pytest.approx(
            each["milliseconds"], abs=0.01
        )
        assert 0 < each["share_of_floor"] < 1, name
        assert each["tokens_per_second"] == pytest.approx(1e3 * 4096 / each["milliseconds"], rel=1e-3)
    # 4 · N · tokens at 620 TFLOP/s, for the N = 6.61 billion weights of a Llama-2-7B without its embeddings
    assert found["H100"]["share_of_floor"] * found["H100"]["milliseconds"] == pytest.approx(174.6, rel=2e-3)
    assert found["H200"]["milliseconds"] < found["H100"]["milliseconds"] < found["A100"]["milliseconds"]


def test_a_comparison_shows_what_changed_and_what_it_lacks() -> None:
    parts = {"GEMMs": {"milliseconds": 100.0, "launches": 1}, "loss": {"milliseconds": 10.0, "launches": 1}}
    row = {"cell": P32, "gpu": "H100", "outcome": "predicted", "milliseconds": 110.0, "parts": parts}
    other = {"cell": P512, "gpu": "H100", "outcome": "predicted", "milliseconds": 1.0, "parts": {}}
    measured = {"GEMMs": {"milliseconds": 120.0}, "copies": {"milliseconds": 3.0}}
    before = {**row, "outcome": "measured", "milliseconds": 123.0, "parts": measured}
    shown = comparison([row, other], [before])
    assert "| step | 123.00 | 110.00 | -13.00 | -10.6% |" in shown
    assert "| GEMMs | 120.00 | 100.00 | -20.00 | -16.7% |" in shown
    assert "| loss | – | 10.00 | +10.00 | – |" in shown
    assert "| copies | 3.00 | – | -3.00 | – |" in shown
    assert f"Not compared: {P512} (H100)" in shown
    only_total = {key: value for key, value in before.items() if key != "parts"}
    assert "GEMMs" not in comparison([row], [only_total])
    with pytest.raises(SystemExit, match="no row with the cell"):
        comparison([other], [before])


def test_the_report_has_every_predicted_row() -> None:
    row = {"cell": P32, "gpu": "H100", "outcome": "predicted", **prediction(traced(CELLS[P32]), GPUS["H100"])}
    failed = {"cell": P512, "gpu": "H100", "outcome": "failed", "reason": "…"}
    shown = report([row, failed])
    assert f"| {P32} | H100 | {row['milliseconds']:.0f} | {row['tokens_per_second']:,} |" in shown
    assert P512 not in shown


# ---- a generated token

OF_TOKEN = {"GEMMs": 7, "attention": 2, "cache": 2, "transformers": 5}
"""Launches of a layer for a generated token, by part."""
SINGLE, PADDED, STATIC = list(TOKENS)[:3]


@pytest.mark.parametrize(("name", "more"), [(SINGLE, {}), (PADDED, {}), (STATIC, {"cache": 5})])
def test_a_token_launches_no_more(name: str, more: dict[str, int]) -> None:
    cell = TOKENS[name]
    found, layer = trace_token(cell)
    launches = Counter[str]()
    for launch, count in layer.items():
        launches[part_of(launch)] += count
    most = OF_TOKEN | more
    assert {part: count for part, count in launches.items() if count > most[part]} == {}
    attention = [launch for launch in layer if part_of(launch) == "attention"]
    assert {launch.operator for launch in attention} == {"triton.decode_kernel", "triton.merge_splits_kernel"}
    # Keys and values in bf16, once; queries, results and partial results are small beside them.
    keys = 2 * 2 * cell.sizes.hidden * (cell.rows * (cell.context + 128 * (cell.cache == "static")) + 32)
    assert keys <= sum(launch.read for launch in attention) < 1.02 * keys
    row = {"cell": name, "gpu": "H100", "outcome": "predicted"}
    row |= prediction_of_token(cell, found, layer, GPUS["H100"])
    assert row["launches_per_layer"] == sum(launches.values())
    assert row["floor_milliseconds"] < row["milliseconds"]
    assert f"| {name} | H100 | {row['milliseconds']:.2f} |" in report_on_tokens([row])
