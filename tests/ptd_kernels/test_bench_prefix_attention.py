"""The smallest grid of the prefix-attention benchmark runs on any machine, and its counts are right."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    output = tmp_path_factory.mktemp("bench") / "quick.json"
    command = [sys.executable, str(BENCHMARKS / "bench_prefix_attention.py"), "--grid", "quick", "--device", "cpu"]
    done = subprocess.run([*command, "--repeats", "1", "--output", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert output.with_suffix(".png").stat().st_size > 1000
    with output.with_suffix(".csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_cell_has_every_rival(rows: list[dict[str, str]]) -> None:
    for name in ("P 8", "P 128", "packed"):
        found = {(row["who"], row["direction"]) for row in rows if row["name"] == name}
        who = ["merge", "expand + concat + SDPA", "no prefix", *["joined"] * (name == "packed")]
        assert {(w, d) for w in who for d in ("forward", "backward")} <= found
    assert {row["direction"] for row in rows if row["name"] == "decode"} == {"forward"}
    assert all(float(row["ms"]) > 0 and float(row["teraflops_per_second"]) > 0 for row in rows)


def test_merge_keeps_no_expanded_prefix(rows: list[dict[str, str]]) -> None:
    kept = {row["who"]: int(row["kept"]) for row in rows if row["name"] == "P 128"}
    sizes = next(row for row in rows if row["name"] == "P 128")
    B, S, Hq, Hkv, D, P = (int(sizes[x]) for x in ("B", "S", "Hq", "Hkv", "D", "P"))
    assert kept["merge"] == 4 * B * S * Hq * (D + 1)  # the output and the log-sum-exp, in fp32
    assert kept["expand + concat + SDPA"] >= kept["merge"] + 2 * 4 * B * P * Hkv * D


def test_pairs_are_counted_as_the_rule_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from bench_prefix_attention import FULL, Cell

    assert Cell("", 2, 5, 3, T=7).pairs() == (2 * int(torch.ones(5, 7).tril(2).sum()), 2 * 5 * 3)
    assert Cell("", 2, 5, 3, causal=False).pairs() == (2 * 25, 30)
    assert Cell("", 1, 7, 3, lengths=(3, 4)).pairs() == (6 + 10, 21)
    assert len({cell.name for cell in FULL}) == len(FULL)


def test_one_rivals_failure_is_not_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A rival that is refused, or fails while it is tried out or timed, does not remove the others' rows of a cell."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_prefix_attention as bench
    from rows import Rows, read

    cpu, calls = torch.device("cpu"), []
    plain = bench.rivals

    def rivals(cell: bench.Cell, device: torch.device) -> dict[str, Any]:
        named = plain(cell, device)
        merge = named["merge"]

        def breaks_later(*x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            if len(calls) > 2:
                raise RuntimeError("an illegal memory access")
            return merge(*x)

        def breaks(*x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("a gigabyte")

        return {"breaks": breaks, "breaks later": breaks_later, "wrong": lambda *x: 2 * merge(*x), **named}

    monkeypatch.setattr(bench, "rivals", rivals)
    rows = Rows(tmp_path / "f.json", ("name", "who"), program="bench_prefix_attention")
    decode = bench.QUICK[-1]
    bench.measure(decode, cpu, torch.float32, 2, rows)
    rows.close()
    found = {row["who"]: row for row in read(tmp_path / "f.json")[0]}
    assert {who for who, row in found.items() if row["outcome"] == "measured"} == {"merge", bench.CONCAT, "no prefix"}
    assert found["breaks"]["reason"] == "OutOfMemoryError: a gigabyte"
    assert found["breaks later"]["reason"] == "RuntimeError: an illegal memory access"
    assert found["wrong"]["reason"].startswith("ArithmeticError: its output is off by")
    assert found["merge-cudnn"]["outcome"] == "skipped"
