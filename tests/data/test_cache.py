"""The cache of tokenised rows: what is stored, what the key depends on, and what happens to incomplete entries."""

from __future__ import annotations

import json
import mmap
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, load_from_disk
from families import tiny_tokenizer

from ptd.config import DataConfig, TaskConfig
from ptd.data import Batches, identity, load_rows
from ptd.data.cache import CacheError, Damaged, RowsCache, default_folder
from ptd.data.collecting import InMemory, collect
from ptd.data.identity import rows_digest
from ptd.data.tokens import rows_in_both
from ptd.data.trimming import MANIFEST
from ptd.tasks import make_task, rows_key
from ptd.types import Architecture, DataReport, Examples

KEY = "0" * 32
PAIRS = [{"prompt": f"{number} times ", "completion": "ab" * (1 + number % 5), "extra": number} for number in range(30)]
CHATS = [
    {"messages": [{"role": "user", "content": f"hi {number}"}, {"role": "assistant", "content": "yes"}]}
    for number in range(5)
]
LABELLED = [{"text": f"text {number}", "label": ("up", "down")[number % 2]} for number in range(9)]
TAGGED = [{"tokens": ["Anna", "lives"], "tags": ["B-PER", "O"]}, {"tokens": ["Rome"], "tags": ["O"]}]
ASKED = [{"question": "Who?", "context": "Anna lives in the old city. " * times, "answers": "Anna"} for times in (1, 5)]
CLOZE: dict[str, Any] = {
    "kind": "classification",
    "patterns": ["{text} is {mask}"],
    "verbalizer": {"up": ["a", "bc"], "down": ["d"]},
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Architecture, list[dict[str, Any]]]] = {
    "causal_lm": ({}, {"max_length": 12}, "decoder", PAIRS),
    "seq2seq_lm": ({"kind": "seq2seq_lm"}, {}, "encoder-decoder", PAIRS),
    "head": ({"kind": "classification"}, {}, "encoder", LABELLED),
    "cloze": (CLOZE, {}, "encoder", LABELLED),
    "token_classification": ({"kind": "token_classification"}, {}, "encoder", TAGGED),
    "question_answering": ({"kind": "question_answering", "doc_stride": 4}, {"max_length": 48}, "encoder", ASKED),
}


def task_of(name: str) -> Any:
    task, data, architecture, rows = CASES[name]
    made = make_task(TaskConfig(**task), DataConfig(**data), architecture)
    return made.fit(Dataset.from_list(rows), "rows")


def written(cache: RowsCache, make: Callable[[Any], Examples], key: str = KEY) -> Examples:
    with cache.write(key) as draft:
        draft.publish(make(draft))
    found = cache.read(key, verify=True)
    assert found is not None
    return found


def arrays_of(examples: Examples, prefix: str = "") -> dict[str, np.ndarray]:
    aside = examples.aside or {}
    types = {} if examples.token_types is None else {"token_types": examples.token_types}
    own = {"tokens": examples.tokens, "labels": examples.labels, "offsets": examples.offsets, **types, **aside}
    source = {} if examples.source is None else arrays_of(examples.source, f"{prefix}source.")
    return {f"{prefix}{name}": array for name, array in own.items()} | source


def pieces(rows: int, length: int, *, types: bool = False) -> Iterator[Examples]:
    """Yield pieces of 1000 rows of ``length`` tokens; with ``types``, only the second piece has token types."""
    for first in range(0, rows, 1000):
        count = min(1000, rows - first)
        tokens = np.arange(first * length, (first + count) * length, dtype=np.int32)
        labels = np.where(tokens % 3 == 0, tokens, -100).astype(np.int32)
        given = (tokens % 2).astype(np.int8) if types and first == 1000 else None
        offsets = np.arange(count + 1, dtype=np.int64) * length
        yield Examples(tokens, labels, offsets, DataReport(count, len(tokens), 0), token_types=given)


@pytest.mark.parametrize("name", CASES)
def test_an_entry_is_the_same_as_in_memory(name: str, tmp_path: Path) -> None:
    task, rows, tokenizer = task_of(name), Dataset.from_list(CASES[name][3]), tiny_tokenizer()
    wanted = task.tokenize(rows, tokenizer, what="rows")
    found = written(RowsCache(tmp_path), lambda columns: task.tokenize(rows, tokenizer, what="rows", columns=columns))
    ours, theirs = arrays_of(found), arrays_of(wanted)
    assert list(ours) == list(theirs)
    for array in ours:
        assert ours[array].dtype == theirs[array].dtype
        assert ours[array].tolist() == theirs[array].tolist()
        assert not ours[array].flags.writeable
    assert (found.report, found.group) == (wanted.report, wanted.group)
    assert found.source is None or found.source.report == wanted.source.report
    for side, other in ((found, wanted), (found.source, wanted.source)):
        if side is not None:
            assert side.known is not None
            assert side.known.supervised.tolist() == other.summary.supervised.tolist()
            assert side.known.highest_token == other.tokens.max()
            assert side.known.highest_label == max(other.labels.max(), -1)
    assert found.digest() == wanted.digest()
    options: dict[str, Any] = {"rank": 0, "world_size": 1, "per_device_batch_size": 4, "packing": found.source is None}
    for one, other in zip(Batches(found, **options).step(0), Batches(wanted, **options).step(0), strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()


def test_types_of_only_some_pieces() -> None:
    found = collect(pieces(3000, 2, types=True))
    assert found.token_types is not None
    assert found.token_types.tolist() == [0] * 2000 + [0, 1] * 1000 + [0] * 2000
    assert collect(pieces(3000, 2)).token_types is None


def anonymous_kib() -> int:
    (found,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found)


@pytest.mark.parametrize(("rows", "length"), [(160_000, 100), (3_000_000, 2)])
def test_memory_does_not_grow_with_the_rows(rows: int, length: int, tmp_path: Path) -> None:
    """The arrays have at least 84 MB, of which 36 MB per row; writing and reading them, and making batches, needs less.

    An array with one number per row (24 MB) would exceed the limit.
    """
    cache, before = RowsCache(tmp_path), anonymous_kib()
    found = written(cache, lambda columns: collect(pieces(rows, length), columns))
    assert sum(array.nbytes for array in arrays_of(found).values()) > 70e6
    assert found.longest == found.longest_sequence == length
    for max_tokens in (None, 10_000):
        batches = Batches(found, rank=0, world_size=2, per_device_batch_size=8, max_tokens=max_tokens)
        for step in (0, 77, batches.steps_in_epoch(0) - 1, batches.steps_in_epoch(0)):
            assert batches.supervised_tokens(step) > 0
            batches.step(step)
    assert rows_in_both(found, collect(pieces(1000, length))) == 1000
    assert anonymous_kib() - before < 22 * 1024
    assert isinstance(base_of(found.tokens), mmap.mmap)
    assert str(tmp_path / KEY / "tokens.bin") in Path("/proc/self/maps").read_text()


def base_of(array: Any) -> Any:
    while isinstance(array, np.ndarray):
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


def key(rows: Any = None, tokenizer: Any = None, task: dict[str, Any] | None = None, **data: Any) -> str:
    rows = Dataset.from_list(PAIRS) if rows is None else rows
    made = make_task(TaskConfig(**(task or {})), DataConfig(**data), "decoder")
    return rows_key(made, rows_digest(rows), tiny_tokenizer() if tokenizer is None else tokenizer)


def test_the_key_depends_on_the_rows_and_not_on_their_file(tmp_path: Path) -> None:
    base, rows = key(), Dataset.from_list(PAIRS)
    changed = [{**row, "completion": "ac"} if number == 17 else row for number, row in enumerate(PAIRS)]
    others = [
        Dataset.from_list(changed),
        rows.select(range(29)),
        rows.select([1, 0, *range(2, 30)]),
        rows.rename_column("extra", "other"),
        Dataset.from_list([{**row, "completion": f"{row['completion']} "} for row in PAIRS]),
    ]
    assert len({base, *(key(other) for other in others)}) == 6
    rows.select(range(15)).to_json(tmp_path / "half.jsonl")
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    loaded = [load_rows(str(tmp_path / name), "train", what="data.train") for name in ("a.jsonl", "b.jsonl")]
    assert key(loaded[0]) == key(loaded[1])
    rows.save_to_disk(tmp_path / "saved", num_shards=3)
    assert key(load_from_disk(str(tmp_path / "saved"))) == base
    assert key(Dataset.from_list([*PAIRS, *PAIRS]).select(range(30, 60))) == base


def test_the_key_depends_on_the_names_of_labels() -> None:
    numbered = Dataset.from_list([{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    task = {"kind": "classification", "labels": ["x", "y"]}
    named = [numbered.cast_column("label", ClassLabel(names=names)) for names in (["x", "y"], ["y", "x"])]
    assert key(named[0], task=task) != key(named[1], task=task)


def test_the_key_depends_on_the_tokenizer() -> None:
    chat, other_chat, added, left, special = (tiny_tokenizer() for _ in range(5))
    chat.chat_template, other_chat.chat_template = "{{ messages[0].content }}", "{{ messages[0].content }} "
    added.add_tokens(["abc"])
    left.truncation_side = "left"
    special.eos_token = "<mask>"
    tokenizers = (tiny_tokenizer(), chat, other_chat, added, left, special)
    assert len({key(tokenizer=tokenizer) for tokenizer in tokenizers}) == 6
    used = tiny_tokenizer()
    used(["some words", "ab"], truncation=True, max_length=2, padding=True)
    assert key(tokenizer=used) == key()


def test_the_key_depends_on_the_day_if_the_template_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    dated = tiny_tokenizer()
    dated.chat_template = "{{ strftime_now('%d %b') }} {{ messages[0].content }}"

    class Tomorrow(identity.date):
        @classmethod
        def today(cls) -> Any:
            return cls(2999, 1, 1)

    before = key(tokenizer=dated), key()
    monkeypatch.setattr(identity, "date", Tomorrow)
    assert key(tokenizer=dated) != before[0]
    assert key() == before[1]


def test_the_key_depends_on_settings_that_matter() -> None:
    template = {"prompt_template": "{extra}: {prompt}"}
    words = {"patterns": ["{prompt} {mask}"], "verbalizer": {"up": ["a"], "down": ["b"]}, "kind": "classification"}
    labels = {"kind": "classification", "labels": ["up", "down"]}
    found = [
        key(),
        key(max_length=13),
        key(columns={"prompt": "completion", "completion": "prompt"}),
        key(**template),
        key(format="text", columns={"text": "completion"}),
        key(task=labels),
        key(task={**labels, "labels": ["down", "up"]}),
        key(task=words),
        key(task={"kind": "question_answering"}),
        key(task={"kind": "question_answering", "doc_stride": 5}),
        key(task={"kind": "token_classification", "labels": ["O", "X"]}),
    ]
    assert len(set(found)) == len(found)
    assert (
        key(packing=False) == key(max_tokens=5000) == key(train="a.csv", eval="b.csv", cache="x", cache_gb=9) == key()
    )


def test_the_key_depends_on_code_and_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = key()
    with monkeypatch.context() as patch:
        patch.setattr(identity, "version", lambda package: "99")
        assert key() != before
    package = tmp_path / "ptd"
    for name in ("data/a.py", "tasks/b.py", "types.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(f"# {name}\n")
    monkeypatch.setattr(identity, "__file__", str(package / "data" / "identity.py"))
    codes = [identity.code_digest([])]
    (package / "tasks" / "b.py").write_text("# changed\n")
    codes.append(identity.code_digest([]))
    (package / "runs.py").write_text("# does not tokenise\n")
    codes.append(identity.code_digest([]))
    assert codes[0] != codes[1] == codes[2]


def test_a_tokenizer_that_cannot_be_saved_has_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *_: exec("raise NotImplementedError('no files')"))
    with pytest.raises(CacheError, match="cannot be saved to compute its digest: no files"):
        key(tokenizer=tokenizer)


def damage(place: Path, how: str) -> None:
    tokens, manifest = place / "tokens.bin", place / MANIFEST
    if how == "truncated":
        os.truncate(tokens, tokens.stat().st_size - 4)
    elif how == "one bit":
        content = bytearray(tokens.read_bytes())
        content[5] ^= 1
        tokens.write_bytes(content)
    elif how == "missing":
        tokens.unlink()
    elif how == "half a manifest":
        manifest.write_text(manifest.read_text()[:100])
    elif how == "a changed manifest":
        manifest.write_text(manifest.read_text().replace('"group": 1', '"group": 2'))
    elif how == "no manifest":
        manifest.unlink()


DAMAGES = ("truncated", "one bit", "missing", "half a manifest", "a changed manifest", "no manifest")


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_found(how: str, tmp_path: Path) -> None:
    cache = RowsCache(tmp_path)
    written(cache, lambda columns: collect(pieces(10, 4), columns))
    damage(tmp_path / KEY, how)
    with pytest.raises(Damaged):
        cache.read(KEY, verify=True)
    cache.remove(KEY)
    assert cache.read(KEY, verify=True) is None
    assert list(tmp_path.iterdir()) == []


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a fork; return its exit status: 0, 1 after an exception, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def interrupted(columns: Any) -> Examples:
    def some() -> Iterator[Examples]:
        for number, piece in enumerate(pieces(3000, 50)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield piece

    return collect(some(), columns)


def test_a_crash_while_writing_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    cache = RowsCache(tmp_path)
    assert in_child(lambda: written(cache, interrupted) and None) == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert cache.read(KEY, verify=False) is None
    written(cache, lambda columns: collect(pieces(10, 4), columns))  # the leftover may be that of a live writer
    assert leftover.exists()
    for path in (leftover, *leftover.iterdir()):
        os.utime(path, (0, 0))
    with cache.write("1" * 32) as live:
        for path in (live.place, *live.place.iterdir()):
            os.utime(path, (0, 0))
        written(cache, lambda columns: collect(pieces(10, 4), columns), "2" * 32)
        assert live.place.exists()  # old, but locked
    assert {path.name for path in tmp_path.iterdir()} == {KEY, "2" * 32}


def test_a_file_size_limit_stops_writing_and_the_files_are_removed(tmp_path: Path) -> None:
    cache = RowsCache(tmp_path)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        with pytest.raises(CacheError, match=r"tokens\.bin: File too large"):
            written(cache, lambda columns: collect(pieces(50_000, 50), columns))

    assert in_child(limited) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_error_of_a_row_removes_the_files(tmp_path: Path) -> None:
    def failing(columns: Any) -> Examples:
        collect(pieces(10, 4), columns)
        raise ValueError("row 11")

    with pytest.raises(ValueError, match="row 11"):
        written(RowsCache(tmp_path), failing)
    assert list(tmp_path.iterdir()) == []


def test_two_writers_at_once(tmp_path: Path) -> None:
    """Both have written all arrays before either publishes; the first rename wins, and both read the same entry."""
    cache = RowsCache(tmp_path)
    with cache.write(KEY) as one, cache.write(KEY) as two:
        first, second = (collect(pieces(10, 4), draft) for draft in (one, two))
        one.publish(first)
        two.publish(second)
        assert cache.read(KEY, verify=True) is not None
    assert [path.name for path in tmp_path.iterdir()] == [KEY]
    gate = os.pipe()

    def start() -> None:
        os.read(gate[0], 1)
        for number in range(20):
            found = written(cache, lambda columns: collect(pieces(1000, 4), columns), f"a{number:031x}")
            assert found.tokens.tolist() == list(range(4000))

    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                start()
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(child)
    os.write(gate[1], b"....")
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert len(list(tmp_path.iterdir())) == 21


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/ptd/rows")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_folder() == Path("/home/someone/.cache/ptd/rows")


def test_in_memory_columns_take_empty_arrays() -> None:
    column = InMemory("tokens", np.int32)
    column.append(np.empty(0, dtype=np.int32))
    column.append(np.array([3, 4]))
    assert column.array().tolist() == [3, 4]
