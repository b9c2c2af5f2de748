"""The Triton kernels compile for sm_80 and sm_90, fit in shared memory and do not spill; the tests need no GPU.

PTD_COMPILE_ALL=1 compiles every kernel × head size × dtype × variant (1.5 hours on one core) instead of a selection.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ALL = os.environ.get("PTD_COMPILE_ALL") == "1"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.timeout(4 * 3600 if ALL else 600),
]
HEAD_SIZES = ("32,32", "64,64", "80,80", "96,96", "128,128", "192,192", "192,128", "256,256")
VARIANTS = ("bidirectional", "causal", "packed", "window", "softcap", "bias", "several", "all", "merge")
# Head sizes, dtypes and variants compiled together; other head sizes are padded to one of these.
SELECTION = (
    [(HEAD_SIZES, ("bf16", "fp16", "fp32"), VARIANTS)]
    if ALL
    else [
        (("64,64", "128,128"), ("bf16",), ("causal", "all", "merge")),
        (("80,80", "256,256"), ("fp16",), ("all",)),
        (("128,128",), ("fp32",), ("causal",)),
    ]
)
# The maximum per block, in bytes (CUDA C++ programming guide, compute capabilities). sm_80 itself has 163 KiB, but its
# tiles are also used on 8.6, 8.9 and 12.0, which have 99 KiB.
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}
NO_SPILLS_UP_TO = 128
# The tiles were chosen with Triton 3.7, with which nothing may spill. The compilers of other versions allocate some
# registers differently: 3.6 spills 8 or 16 bytes per thread (two to four registers) in kernels that use all 255.
CHOSEN_WITH, SPILLED_ELSEWHERE = "3.7.", 16


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Return one row per kernel. A separate process compiles, because Triton does not compile while it interprets."""
    return [row for selection in SELECTION for row in _compile(*selection)]


def _compile(heads: tuple[str, ...], dtypes: tuple[str, ...], variants: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    script = Path(__file__).with_name("compile_triton_kernels.py")
    command = [
        sys.executable,
        str(script),
        "--candidates",
        "--head",
        *heads,
        "--dtype",
        *dtypes,
        "--variant",
        *variants,
    ]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    for line in done.stdout.splitlines():
        yield json.loads(line)


def test_shared_memory_fits(compiled: list[dict[str, Any]]) -> None:
    assert len({row["kernel"] for row in compiled}) == 9
    too_much = [row for row in compiled if row["shared"] > SHARED_MEMORY[row["arch"]]]
    assert not too_much


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    most = 0 if compiled[0]["triton"].startswith(CHOSEN_WITH) else SPILLED_ELSEWHERE
    spilled = [row for row in compiled if row["local"] > most and max(row["D"], row["E"]) <= NO_SPILLS_UP_TO]
    assert not spilled


def test_tensor_cores_are_used(compiled: list[dict[str, Any]]) -> None:
    half = [
        row for row in compiled if row["dtype"] != "fp32" and row["kernel"] not in ("delta", "merge", "merge_splits")
    ]
    # wgmma needs at least 64 rows of a product; a decoding call has fewer rows, and a short prefix fewer keys.
    wide = [row for row in half if row["kernel"] not in ("decode", "short_prefix")]
    assert all(row["wgmma"] and not row["mma"] for row in wide if row["arch"] == 90)
    assert all(row["mma"] or row["wgmma"] for row in half)


def test_fp32_is_ieee(compiled: list[dict[str, Any]]) -> None:
    single = [row for row in compiled if row["dtype"] == "fp32"]
    assert single
    assert not any(row["mma"] or row["wgmma"] for row in single), "a tensor core would round the inputs to tf32"
