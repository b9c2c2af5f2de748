"""Entries beyond the limit of the cache are removed, those in use are not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ptd.data import trimming
from ptd.data.cache import LEARNED, RowsCache
from ptd.data.collecting import collect
from ptd.data.trimming import MANIFEST, MONTH, USED
from ptd.types import DataReport, Examples

KEYS = ("a" * 32, "b" * 32, "c" * 32)
DAY = 86400.0


def entry(cache: RowsCache, key: str, last_use: float) -> None:
    """Write an entry of about 8 kB that was used ``last_use`` seconds ago, by this machine."""
    tokens = np.arange(1000, dtype=np.int32)
    with cache.write(key) as draft:
        draft.publish(collect([Examples(tokens, tokens, np.array([0, 1000]), DataReport(1, 1000, 1000))], draft))
    assert cache.read(key, verify=True) is not None
    used = time.time() - last_use
    for path in (*(cache.folder / key).iterdir(), cache.folder / key):
        os.utime(path, (used, used))


@pytest.fixture
def cache(tmp_path: Path) -> RowsCache:
    found = RowsCache(tmp_path, limit=1)
    for key, last_use in zip(KEYS, (1 * DAY, 3 * DAY, 2 * DAY), strict=True):
        entry(found, key, last_use)
    return found


def left(cache: RowsCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()}


def test_the_entries_that_were_used_last_stay(cache: RowsCache) -> None:
    size = sum(path.stat().st_size for path in (cache.folder / KEYS[0]).iterdir())
    cache.limit = 3.5 * size
    cache.trim(keep=KEYS[0])
    assert left(cache) == set(KEYS)
    cache.limit = 2.5 * size
    cache.trim(keep=KEYS[0])
    assert left(cache) == {KEYS[0], KEYS[2]}
    cache.read(KEYS[2], verify=False)  # used again
    cache.limit = 1.5 * size
    cache.trim(keep="none of them")
    assert left(cache) == {KEYS[2]}


def test_what_is_no_entry_stays(cache: RowsCache) -> None:
    """The user may have named a folder that holds other things as well."""
    others = (cache.folder / "results" / MANIFEST, cache.folder / ("d" * 32) / "data.bin", cache.folder / f"a{LEARNED}")
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("of great value")
        os.utime(path, (0, 0))
    cache.trim(keep="none")
    assert left(cache) == {"results", "d" * 32, f"a{LEARNED}"}
    assert all(path.read_text() == "of great value" for path in others)


def test_the_entry_to_keep_stays(cache: RowsCache) -> None:
    cache.trim(keep=KEYS[1])
    assert left(cache) == {KEYS[1]}


def test_an_entry_stays_as_long_as_its_arrays_are_used(cache: RowsCache) -> None:
    mapped = cache.read(KEYS[1], verify=False)
    assert mapped is not None
    tokens = mapped.tokens[10:]
    del mapped
    cache.trim(keep="none")
    assert left(cache) == {KEYS[1]}
    assert tokens[0] == 10
    del tokens
    cache.trim(keep="none")
    assert left(cache) == set()


def test_an_entry_that_another_process_uses_stays(cache: RowsCache) -> None:
    code = (
        "import sys; from pathlib import Path; from ptd.data.cache import RowsCache\n"
        f"found = RowsCache(Path({str(cache.folder)!r})).read({KEYS[1]!r}, verify=False)\n"
        "print('mapped', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"mapped\n"
        cache.trim(keep="none")
        assert left(cache) == {KEYS[1]}
        other.communicate()
    cache.trim(keep="none")
    assert left(cache) == set()


def test_an_entry_of_another_machine_stays_for_a_month(cache: RowsCache) -> None:
    """Locks of another machine may be invisible here, so the time of its last use decides."""
    for key, ago in ((KEYS[1], MONTH - DAY), (KEYS[2], MONTH + DAY)):
        mark = cache.folder / key / f"{USED}another"
        mark.touch()
        os.utime(mark, (time.time() - ago,) * 2)
    cache.trim(keep="none")
    assert left(cache) == {KEYS[1]}


def test_an_entry_that_is_removed_while_it_is_opened(cache: RowsCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process removes the entry after its manifest was read; the reader finds no entry."""
    mapped_file = trimming.mapped_file

    def late(path: Path, dtype: np.dtype) -> np.ndarray:
        found = mapped_file(path, dtype)
        if path.name == "supervised.bin":
            trimming.discard(path.parent)
        return found

    monkeypatch.setattr("ptd.data.cache.mapped_file", late)
    assert cache.read(KEYS[0], verify=False) is None


def test_what_a_task_has_learned_is_stored(tmp_path: Path) -> None:
    cache, times = RowsCache(tmp_path / "new"), []

    def learn() -> dict[str, object]:
        times.append(1)
        return {"labels": ["a", "b"], "class_weights": {"a": 0.1 + 0.2}}

    first = cache.learned(KEYS[0], learn)
    assert first == cache.learned(KEYS[0], learn) == learn()
    path = tmp_path / "new" / f"{KEYS[0]}{LEARNED}"
    assert len(times) == 2
    content = path.read_text()
    for damaged in (content.replace('"b"', '"c"'), content[:20], "[]", ""):
        path.write_text(damaged)
        assert cache.learned(KEYS[0], learn) == first
    assert len(times) == 6
    path.rename(path.with_name(f"{KEYS[1]}{LEARNED}"))
    cache.learned(KEYS[1], learn)
    assert len(times) == 7
    (tmp_path / "file").touch()
    assert RowsCache(tmp_path / "file" / "rows").learned(KEYS[0], learn) == first
    os.utime(tmp_path / "new" / f"{KEYS[1]}{LEARNED}", (0, 0))
    cache.trim(keep="none")
    assert left(cache) == set()
