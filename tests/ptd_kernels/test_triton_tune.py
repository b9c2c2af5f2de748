"""The fastest tile is stored in a file; the next process reads the file, but never trusts it blindly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ptd_kernels.prefix_attention.fused.tile_table import ALTERNATIVES, KERNELS, TABLE, Tile, tiles_for
from ptd_kernels.prefix_attention.fused.tuning import (
    Choices,
    NoTileFits,
    allowed,
    cache_file,
    choose_candidate,
    run_first,
    size_class,
)

SLOW, FAST, BROKEN = Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(256, 256, 8, 3)
TIMES = {SLOW: 2.0, FAST: 1.0, BROKEN: math.inf}


def never(tile: Tile) -> float:
    raise AssertionError(f"{tile} was measured again")


def test_the_fastest_is_chosen_once_for_all_processes(tmp_path: Path) -> None:
    file = tmp_path / "made" / "tiles.json"
    assert choose_candidate("a", [SLOW, BROKEN, FAST], TIMES.__getitem__, Choices(file)) == FAST
    assert choose_candidate("a", [SLOW, BROKEN, FAST], never, Choices(file)) == FAST
    assert list(file.parent.iterdir()) == [file]


def test_processes_keep_each_others_choices(tmp_path: Path) -> None:
    one, other = (Choices(tmp_path / "tiles.json") for _ in range(2))
    assert one.get("a") is other.get("b") is None
    one.put("a", SLOW)
    other.put("b", FAST)
    assert (Choices(one.file).get("a"), Choices(one.file).get("b")) == (SLOW, FAST)


def test_a_tile_that_is_no_candidate_any_more_is_chosen_anew(tmp_path: Path) -> None:
    choices = Choices(tmp_path / "tiles.json")
    choices.put("a", BROKEN)
    assert choose_candidate("a", [SLOW, FAST], TIMES.__getitem__, choices) == FAST


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": [1, 2]}', '{"a": null}'])
def test_a_broken_file_is_no_file(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(content)
    assert choose_candidate("a", [SLOW, FAST], TIMES.__getitem__, Choices(file)) == FAST
    assert Choices(file).get("a") == FAST


def test_a_file_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    choices = Choices(tmp_path / "taken" / "tiles.json")
    assert choose_candidate("a", [SLOW, FAST], TIMES.__getitem__, choices) == FAST
    assert choose_candidate("a", [SLOW, FAST], never, choices) == FAST


def test_the_first_is_taken_where_nothing_may_or_can_be_measured(tmp_path: Path) -> None:
    choices = Choices(tmp_path / "tiles.json")
    assert choose_candidate("a", [SLOW, FAST], never, choices, may_measure=False) == SLOW
    assert choose_candidate("a", [BROKEN], TIMES.__getitem__, choices) == BROKEN
    assert choices.get("a") is None


class TooMuch(Exception):
    pass


def asks_too_much(error: Exception) -> bool:
    return isinstance(error, TooMuch | torch.OutOfMemoryError)


def run_unless(*fails: Tile, error: Exception | None = None) -> Any:
    def run(tile: Tile) -> Tile:
        if tile in fails:
            raise error or TooMuch("shared memory, 300000 of 232448 bytes")
        return tile

    return run


def test_a_tile_that_does_not_fit_is_passed_over() -> None:
    assert run_first("forward", [BROKEN, SLOW, FAST], run_unless(BROKEN), asks_too_much) == SLOW
    assert run_first("forward", [BROKEN, SLOW, FAST], run_unless(BROKEN, SLOW), asks_too_much) == FAST


def test_where_no_tile_fits_it_says_what_was_tried() -> None:
    with pytest.raises(NoTileFits, match=r"none of .* forward fits .*128 × 64, 8 warps: shared.*64 × 64, 4 warps"):
        run_first("forward", [SLOW, FAST], run_unless(SLOW, FAST), asks_too_much)


def test_a_want_of_memory_and_every_other_error_stay_what_they_are() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        run_first("forward", [SLOW], run_unless(SLOW, error=torch.OutOfMemoryError("full")), asks_too_much)
    with pytest.raises(ValueError, match="a mistake"):
        run_first("forward", [SLOW, FAST], run_unless(SLOW, error=ValueError("a mistake")), asks_too_much)


def test_when_tiles_may_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PTD_KERNELS_TUNE", raising=False)
    assert allowed()
    monkeypatch.setenv("PTD_KERNELS_TUNE", "0")
    assert not allowed()
    monkeypatch.delenv("PTD_KERNELS_TUNE")
    torch.use_deterministic_algorithms(True)
    try:
        assert not allowed()
    finally:
        torch.use_deterministic_algorithms(False)


def test_where_the_file_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTD_KERNELS_CACHE", "/a")
    assert cache_file() == Path("/a/tiles.json")
    monkeypatch.delenv("PTD_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_file() == Path("/b/ptd_kernels/tiles.json")


def test_size_class() -> None:
    assert size_class(0, 1, 2, 3, 4096, 4097) == "0x1x2x4x4096x8192"


def test_candidates_start_with_the_tables_own() -> None:
    for architecture, half, width in TABLE:
        for kernel in KERNELS:
            tiles = tiles_for(kernel, architecture, half, width)
            assert tiles[0] == TABLE[architecture, half, width][kernel]
            assert len(set(tiles)) == len(tiles)
            assert half or len(tiles) == 1
    assert all(len(tiles_for("forward", arch, True, 64, biased=True)) > 1 for arch, _ in ALTERNATIVES)
    assert tiles_for("forward", 0, True, 64) == tiles_for("forward", 0, False, 256)
