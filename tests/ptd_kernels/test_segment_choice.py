"""Which kernel computes a segment: `pick`, its table of timings, and what `explain_backend` says about it.

Tensors on the CPU without data represent tensors on a GPU (`problem.stand_in`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ptd_kernels import COMPLETE, available_backends, explain_backend
from ptd_kernels.prefix_attention import merge
from ptd_kernels.prefix_attention.fused import availability
from ptd_kernels.prefix_attention.problem import check_problem, stand_in
from ptd_kernels.prefix_attention.segments import (
    CUDNN,
    EAGER,
    FLASH_ATTN_2,
    FLASH_ATTN_4,
    OWN_TRITON,
    OWN_TRITON_BIASED,
    SHARED_KEYS,
    TORCH_EFFICIENT,
    TORCH_EFFICIENT_BIASED,
    TORCH_FLASH_CPU,
    TORCH_FLASH_CUDA,
    Kernel,
    Need,
    Rule,
    cudnn,
    flash_attn_2,
    pick,
    timed,
)
from ptd_kernels.prefix_attention.segments.timed import read_timings
from torch._subclasses.fake_tensor import FakeTensorMode

GPU = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(availability, "INSTALLED", True)
    token = stand_in.set((9, 0))
    yield
    stand_in.reset(token)


def need(
    S: int = 512, T: int | None = None, D: int = 128, E: int | None = None, dtype: torch.dtype = torch.bfloat16,
    B: int = 1, H: int = 32, exact_keys: bool = False, **rule: Any,
) -> Need:  # fmt: skip
    """Return the need of a causal segment; ``offset=None`` in ``rule`` makes it bidirectional."""
    with FakeTensorMode():
        q = torch.empty(B, H, S, D, dtype=dtype)
    rule = {"offset": (T or S) - S, **rule}
    return Need(q, T or S, E or D, Rule(0.1, **rule), exact_keys)


def packed(length: int = 512) -> dict[str, Any]:
    return {"cu_seqlens": torch.tensor([0, length], dtype=torch.int32), "max_seqlen": length}


MASK, BIAS = torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.zeros(1, 1, 1, 1)
PICKED: dict[str, tuple[Need, Kernel]] = {
    "training": (need(), TORCH_FLASH_CUDA),
    "packed, window": (need(**packed(), window=9), TORCH_FLASH_CUDA),
    "a gradient in fp32": (need(exact_keys=True), EAGER),
    "a prefix's gradient": (need(offset=None, exact_keys=True), SHARED_KEYS),
    "a prefix's gradient, softcap": (need(offset=None, exact_keys=True, softcap=50.0), SHARED_KEYS),
    "a prefix's gradient in fp32": (need(offset=None, exact_keys=True, dtype=torch.float32), EAGER),
    "fp32": (need(dtype=torch.float32), TORCH_EFFICIENT),
    "fp32, packed": (need(dtype=torch.float32, **packed()), TORCH_EFFICIENT),
    "fp32, bidirectional": (need(dtype=torch.float32, offset=None), TORCH_EFFICIENT),
    "fp32, chunk": (need(S=40, T=70, dtype=torch.float32), TORCH_EFFICIENT),
    "fp32, window": (need(dtype=torch.float32, window=9), TORCH_EFFICIENT_BIASED),
    "fp32, packed, window": (need(dtype=torch.float32, window=9, **packed()), OWN_TRITON),
    "fp32, more queries than keys": (need(S=70, T=40, dtype=torch.float32), TORCH_EFFICIENT_BIASED),
    "other values": (need(D=192, E=128), TORCH_EFFICIENT),
    "mask": (need(offset=None, mask=MASK), TORCH_EFFICIENT_BIASED),
    "bias": (need(bias=BIAS.bfloat16()), TORCH_EFFICIENT_BIASED),
    "bias in fp32": (need(bias=BIAS), TORCH_EFFICIENT_BIASED),
    "packed, bias": (need(bias=BIAS, **packed()), EAGER),
    "softcap": (need(softcap=50.0, **packed()), OWN_TRITON),
    "softcap, mask": (need(softcap=50.0, offset=None, mask=MASK), OWN_TRITON_BIASED),
    "softcap, packed, bias": (need(softcap=50.0, bias=BIAS, **packed()), EAGER),
    "odd head size": (need(D=7), OWN_TRITON),
    "odd head size, mask": (need(D=7, offset=None, mask=MASK), OWN_TRITON_BIASED),
    "fp64": (need(dtype=torch.float64), EAGER),
    "softcap in fp64": (need(dtype=torch.float64, softcap=50.0), EAGER),
    "offsets of more than 32 bits": (need(S=1 << 20, D=256, dtype=torch.float32), OWN_TRITON),
}


@pytest.mark.parametrize("name", PICKED)
def test_the_kernel_of_a_segment(name: str) -> None:
    asked, kernel = PICKED[name]
    assert pick(asked).name == kernel.name


@pytest.mark.parametrize(
    ("capability", "dtype", "kernel"),
    [
        ((7, 5), torch.float16, TORCH_EFFICIENT),
        ((7, 5), torch.bfloat16, EAGER),
        ((7, 0), torch.float32, TORCH_EFFICIENT),
        ((6, 1), torch.float16, EAGER),
        ((8, 0), torch.bfloat16, TORCH_FLASH_CUDA),
    ],
)
def test_older_gpus(capability: tuple[int, int], dtype: torch.dtype, kernel: Kernel) -> None:
    token = stand_in.set(capability)
    try:
        assert pick(need(dtype=dtype)).name == kernel.name
    finally:
        stand_in.reset(token)


def test_without_triton_a_softcap_takes_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "INSTALLED", False)
    assert pick(need(softcap=50.0)) is EAGER


def test_flash_attn_2_takes_a_softcap_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attn_2, "_library", lambda: (None, None))
    assert pick(need(softcap=50.0)) is FLASH_ATTN_2
    assert pick(need()) is TORCH_FLASH_CUDA
    assert pick(need(softcap=50.0, dtype=torch.float32)) is OWN_TRITON


def test_a_torch_with_other_operators_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    from ptd_kernels.prefix_attention.segments import efficient_operator

    assert efficient_operator.unusable() is None
    known = efficient_operator._SIGNATURES
    other = known[0].replace("float? scale=None", "float? scale=None, int blocks"), known[1]
    monkeypatch.setattr(efficient_operator, "_SIGNATURES", other)
    efficient_operator.unusable.cache_clear()
    try:
        assert "other arguments" in str(TORCH_EFFICIENT.refuses(need(dtype=torch.float32)))
        assert pick(need(dtype=torch.float32)) is OWN_TRITON
    finally:
        efficient_operator.unusable.cache_clear()


def test_a_cpu_keeps_its_kernels() -> None:
    token = stand_in.set(None)
    try:
        for rule in ({}, {"mask": MASK, "offset": None}, {"window": 9}):
            assert pick(need(dtype=torch.float32, **rule)) is TORCH_FLASH_CPU
        assert pick(need(softcap=5.0)) is EAGER
    finally:
        stand_in.reset(token)


def test_cudnn_refuses_where_torch_reads_other_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CUDNN.refuses(need()) is None
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    assert "another memory layout" in str(CUDNN.refuses(need()))
    assert cudnn._sums_have_an_axis_more() in (True, False)


def test_the_complete_backends_exist_and_refuse_nothing() -> None:
    q = torch.zeros(1, 2, 3, 7, dtype=torch.float64)
    everything = check_problem(
        q, q, q, q[0], q[0], causal=False, softcap=1.0, mask=torch.ones(1, 1, 3, 3, dtype=torch.bool),
        bias=torch.zeros(1, 2, 3, 3),
    )  # fmt: skip
    assert set(COMPLETE) <= set(available_backends())
    for name in COMPLETE:
        from ptd_kernels.prefix_attention.problem import choose_backend

        assert choose_backend(everything, name).name == name


# ---- the table of timings


def write(file: Path, timings: list[dict[str, Any]], gpu: str = GPU) -> Path:
    file.write_text(json.dumps({gpu: {"evidence": {}, "timings": timings}}), encoding="utf-8")
    return file


def timing(tokens: int, ms: dict[str, float], **changed: Any) -> dict[str, Any]:
    kind = {"dtype": "bfloat16", "head_size": 128, "packed": False, "tokens": tokens}
    return {**kind, **changed, "milliseconds": ms}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the tensors' GPU the name `GPU`, and a table in which cuDNN is faster from 4,096 tokens on."""
    file = write(
        tmp_path / "timed.json",
        [
            timing(2048, {"torch flash (CUDA)": 1.0, "cuDNN": 1.5}),
            timing(4096, {"torch flash (CUDA)": 4.0, "cuDNN": 2.5, "flash-attn 4": 2.0}),
            timing(4096, {"torch flash (CUDA)": 4.0, "flash-attn 4": 2.0}, packed=True),
        ],
    )
    monkeypatch.setattr(timed, "TIMED", file)
    monkeypatch.setattr(timed, "_name", lambda q: GPU)
    yield file
    read_timings.cache_clear()


def test_the_shipped_table_can_be_read() -> None:
    for timings in read_timings(timed.TIMED).values():
        assert timings
        assert all(len(each.milliseconds) > 1 for each in timings)


@pytest.mark.parametrize(
    ("asked", "kernel"),
    [
        (need(4096), CUDNN),
        (need(8000), CUDNN),
        (need(4095), TORCH_FLASH_CUDA),
        (need(2048), TORCH_FLASH_CUDA),
        (need(1024), TORCH_FLASH_CUDA),
        (need(4096, D=64), TORCH_FLASH_CUDA),
        (need(4096, dtype=torch.float16), TORCH_FLASH_CUDA),
        (need(4096, window=1000), TORCH_FLASH_CUDA),
        (need(4096, offset=None), TORCH_FLASH_CUDA),
        (need(4096, T=5000), TORCH_FLASH_CUDA),
        (need(4096, exact_keys=True), EAGER),
        (need(4096, **packed(4096)), TORCH_FLASH_CUDA),  # flash-attn 4 is not installed, and cuDNN was not timed
        (need(8192, softcap=5.0), OWN_TRITON),
    ],
)
def test_timings_decide_for_what_was_timed(table: Path, asked: Need, kernel: Kernel) -> None:
    assert pick(asked).name == kernel.name


def test_the_fastest_that_can_run_is_taken(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ptd_kernels.prefix_attention.segments import flash_attn_4

    monkeypatch.setattr(flash_attn_4, "_library", lambda: (None, None))
    assert pick(need(4096)) is FLASH_ATTN_4
    assert pick(need(8192, **packed(4096))) is FLASH_ATTN_4
    assert pick(need(8192, **packed(4000))) is TORCH_FLASH_CUDA, "the sequences count, not the pack"
    assert pick(need(4096), preferred=CUDNN) is CUDNN


@pytest.mark.parametrize("change", ["another GPU", "an older GPU", "deterministic"])
def test_without_an_entry_it_stays_torchs_flash(table: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    if change == "another GPU":
        monkeypatch.setattr(timed, "_name", lambda q: "NVIDIA H200")
    if change == "an older GPU":
        stand_in.set((8, 9))
    if change == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert pick(need(4096)) is TORCH_FLASH_CUDA


def test_the_explanation_names_what_timings_decided(table: Path) -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "head_dim": 128, "virtual_tokens": 30}
    said = explain_backend(tokens=4096, **options)[1]
    assert "own tokens: cuDNN (timed on this GPU: flash-attn 4 < cuDNN < torch flash (CUDA)); prefix: torch" in said
    assert "own tokens: torch flash (CUDA); prefix" in explain_backend(**options)[1]
    assert "own tokens: cuDNN; prefix" in explain_backend(tokens=4096, backend="merge-cudnn", **options)[1]


def test_a_decision_holds_for_forward_and_backward(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two passes of one call ask for the same need, so the backward pass runs in the kernel of the forward pass."""
    asked: list[str] = []

    def recording(need: Need, preferred: Kernel | None = None) -> Kernel:
        asked.append(pick(need, preferred).name)
        return EAGER

    monkeypatch.setattr(merge, "pick", recording)
    monkeypatch.setattr(timed, "SHORTEST", 16)
    write(table, [timing(16, {"torch flash (CUDA)": 1.0, "cuDNN": 0.5}, head_size=8)])
    read_timings.cache_clear()
    x = [torch.randn(1, 2, 20, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    merge.merge_attention(check_problem(*x, None, None)).sum().backward()
    assert asked == ["cuDNN", "cuDNN"]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"a": {}}', '{"a": {"timings": [{}]}}', '{"a": {"timings": [1]}}', None, 0.0, -1.0, 1e400]
)
def test_a_broken_table_is_refused(tmp_path: Path, content: str | float | None) -> None:
    file = tmp_path / "timed.json"
    if isinstance(content, float):
        write(file, [timing(2048, {"cuDNN": content})])
    elif content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=r"timed.json is no table of timed kernels"):
        read_timings(file)
