"""benchmarks/gpu_segments.py: what is timed is right, and the table that `auto` reads comes from the measured rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ptd_kernels.prefix_attention.segments import EAGER, TORCH_FLASH_CPU, Kernel
from ptd_kernels.prefix_attention.segments.timed import Timing, read_timings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_segments  # noqa: E402
import rows  # noqa: E402
from gpu_segments import QUICK, Kind, check, table_entry, write_table  # noqa: E402

CPU = torch.device("cpu")


def row(kernel: str, ms: float, outcome: str = "measured", **changed: Any) -> dict[str, Any]:
    kind = {"dtype": "bfloat16", "head_size": 128, "packed": False, "tokens": 4096}
    return {"kind": "…", "kernel": kernel, "outcome": outcome, **kind, "ms": ms, **changed}


ROWS = [
    row("torch flash (CUDA)", 4.0), row("cuDNN", 2.5), row("flash-attn 2", 1.0, "failed"),
    row("torch flash (CUDA)", 9.0, packed=True), {"kind": "…", "kernel": "cuDNN", "outcome": "skipped", "reason": "…"},
]  # fmt: skip


def test_the_table_has_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "timed.json"
    for gpu, scale in (("one", 1.0), ("two", 2.0), ("one", 3.0)):
        found = [{**each, "ms": scale * each["ms"]} if "ms" in each else each for each in ROWS]
        write_table(file, gpu, table_entry(found, {"commit": gpu}))
    table = read_timings(file)
    read_timings.cache_clear()
    assert set(table) == {"one", "two"}
    assert table["one"] == (Timing("bfloat16", 128, False, 4096, {"cuDNN": 7.5, "torch flash (CUDA)": 12.0}),)
    assert table["two"][0].milliseconds == {"cuDNN": 5.0, "torch flash (CUDA)": 8.0}
    assert json.loads(file.read_text())["one"]["evidence"] == {"commit": "one"}


def test_nothing_is_written_without_a_comparison(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no kind of segment has two measured kernels on one; measure first"):
        write_table(tmp_path / "timed.json", "one", table_entry(ROWS[:1], {}))
    assert not (tmp_path / "timed.json").exists()


def test_a_wrong_kernel_is_not_timed() -> None:
    def backward(*args: Any) -> Any:
        found = EAGER.backward(*args)
        return found._replace(k=0.9 * found.k)

    wrong = Kernel("wrong", EAGER.forward, backward, lambda need: None, max_rows=None)
    assert check(TORCH_FLASH_CPU, QUICK[0], CPU, torch.bfloat16) < 1e-2
    with pytest.raises(ArithmeticError, match=r"off by 1\.0e-01"):
        check(wrong, QUICK[0], CPU, torch.bfloat16)
    with pytest.raises(ArithmeticError, match="off by"):  # it does not keep packed sequences apart
        check(TORCH_FLASH_CPU, Kind(16, True, 30), CPU, torch.bfloat16)


def test_rows_become_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, table = tmp_path / "segments.json", tmp_path / "timed.json"

    def run(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["gpu_segments.py", "--output", str(output), *options])
        gpu_segments.main()

    with pytest.raises(SystemExit, match="has no rows; measure first"):
        run("--write-table", "--table", str(table))
    with pytest.raises(SystemExit) as end:
        run("--quick")
    assert not end.value.code
    before = output.read_text()
    with pytest.raises(SystemExit):
        run("--quick")
    assert rows.read(output)[0] == json.loads(before)["records"], "finished rows stay"
    run("--write-table", "--table", str(table))
    (timings,) = read_timings(table).values()
    read_timings.cache_clear()
    assert [each.tokens for each in timings] == [kind.tokens for kind in QUICK]
    assert all(set(each.milliseconds) == {"plain torch", "torch flash (CPU)"} for each in timings)
