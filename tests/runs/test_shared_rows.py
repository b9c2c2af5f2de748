"""Ranks share tokenised rows: one copy per node, the same batches as in memory, and a fallback for every fault.

The ranks and the full and read-only disks are in worker_shared_rows.py; the disks need mounts of one's own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import tiny_tokenizer
from reporting import Notes

from ptd.config import DataConfig, TaskConfig, parse_config
from ptd.data.cache import CacheError
from ptd.distributed.ranks import Ranks
from ptd.runs import build
from ptd.runs.metrics_log import read_records
from ptd.runs.shared_rows import Tokenising, cache_of, share_examples
from ptd.tasks import make_task
from ptd.types import Examples

WORKER = Path(__file__).with_name("worker_shared_rows.py")
ALONE = Ranks(0, 1, 1, torch.device("cpu"))
ROWS = Dataset.from_list([{"prompt": f"{number} is ", "completion": "ab" * (1 + number % 7)} for number in range(2500)])
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


class Counted:
    """Tokenises `ROWS` and counts how often."""

    def __init__(self) -> None:
        self.times = 0
        self.task, self.tokenizer = make_task(TaskConfig(), DataConfig(), "decoder"), tiny_tokenizer()

    def make(self, columns: Any) -> Examples:
        self.times += 1
        return self.task.tokenize(ROWS, self.tokenizer, what="rows", columns=columns)

    def share(self, folder: Path | str, identify: Callable[[], str] = lambda: "a" * 32) -> tuple[Examples, list[str]]:
        notes = Notes()
        return share_examples(
            Tokenising(self.make, identify), cache_of(DataConfig(cache=str(folder))), ALONE, notes
        ), notes.lines


def test_the_second_start_does_not_tokenise(tmp_path: Path) -> None:
    rows = Counted()
    (first, said), (second, again) = rows.share(tmp_path / "new" / "rows"), rows.share(tmp_path / "new" / "rows")
    assert (rows.times, said, again) == (1, [], [])
    memory, _ = rows.share("none")
    assert first.digest() == second.digest() == memory.digest()
    assert first.report == second.report == memory.report
    assert memory.known is None


@pytest.mark.parametrize("how", ["truncated", "changed", "emptied"])
def test_a_damaged_entry_is_made_again(how: str, tmp_path: Path) -> None:
    rows = Counted()
    wanted = rows.share(tmp_path)[0].digest()
    labels = tmp_path / ("a" * 32) / "labels.bin"
    content = labels.read_bytes()
    labels.write_bytes({"truncated": content[:-1], "changed": b"\7" + content[1:], "emptied": b""}[how])
    found, (said,) = rows.share(tmp_path)
    assert re.match(
        r"data\.cache: the tokenised rows are damaged \(.*labels\.bin has .*\); tokenising them again", said
    )
    assert (rows.times, found.digest()) == (2, wanted)
    assert rows.share(tmp_path)[1] == []
    assert rows.times == 2


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found, (said,) = Counted().share(tmp_path / "file" / "rows")
    assert said.startswith(f"data.cache: {tmp_path}/file/rows cannot hold the tokenised rows (")
    assert said.endswith("set data.cache to a folder on a disk with free space that you may write to, or to none")
    assert found.known is None
    assert len(found) == 2500


def test_rows_without_a_key_stay_in_memory(tmp_path: Path) -> None:
    def fail() -> str:
        raise CacheError("no digest")

    found, (said,) = Counted().share(tmp_path, fail)
    assert "cannot hold the tokenised rows (no digest), so every rank holds them in memory" in said
    assert len(found) == 2500


def test_full_and_read_only_disks(tmp_path: Path) -> None:
    """On a tmpfs: a disk that fills up leaves no file; an entry on a disk that is read-only now is used."""
    if subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("this machine lets no process create mounts of its own")
    done = subprocess.run(
        [*UNSHARE, sys.executable, WORKER, "disks", tmp_path], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["full"]["files"] == []
    (said,) = found["full"]["notes"]
    assert ".bin: No space left on device), so every rank holds them in memory" in said
    (said,) = found["read-only, empty"]["notes"]
    assert "Read-only file system), so every rank holds them in memory" in said
    assert found["read-only, written before"] == {"notes": [], "files": ["a" * 32], "times": 1}
    assert found["digests"] == 1


@pytest.fixture(scope="module")
def shared(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("shared")
    launch(4, WORKER, "ranks", folder)
    return [json.loads((folder / f"found.{rank}").read_text()) for rank in range(4)]


def test_ranks_of_two_nodes_map_the_same_rows(shared: list[dict[str, Any]]) -> None:
    assert len({case["digest"] for here in shared for case in here.values()}) == 1
    for rank, here in enumerate(shared):
        times = {name: case["times"] for name, case in here.items()}
        assert times == dict.fromkeys(times, 0) | ({"one folder": 1} if rank == 0 else {})
        everywhere = ("one folder", "own folders", "own folders again", "damaged on node 1")
        assert all(here[name]["mapped"] for name in everywhere)
        assert here["unusable on node 1"]["mapped"] == (rank < 2)
        assert here["none"]["mapped"] is False


def test_a_node_gets_the_files_once(shared: list[dict[str, Any]]) -> None:
    sent = {name: [here[name]["sent"] for here in shared] for name in shared[0]}
    assert sent["one folder"] == sent["own folders again"] == [0] * 4
    assert sent["own folders"][0] == sent["damaged on node 1"][0] > 0
    assert shared[2]["own folders"]["files"] == shared[0]["own folders"]["files"]


def test_notes_say_which_ranks_hold_the_rows_in_memory(shared: list[dict[str, Any]]) -> None:
    (said,) = shared[0]["unusable on node 1"]["notes"]
    assert re.match(r"data\.cache: ranks 2-3 cannot map the tokenised rows \(.*Not a directory\)", said)
    assert all(not case["notes"] for name, case in shared[0].items() if name not in ("unusable on node 1",))


LEARNED: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]] = {
    "classification": (
        {"task": {"kind": "classification", "class_weights": "balanced"}},
        [{"text": "ab", "label": "x"}, {"text": "cd", "label": "y"}, {"text": "ef", "label": "y"}],
        {"labels": ["x", "y"], "class_weights": {"x": 1.5, "y": 0.75}},
    ),
    "token_classification": (
        {"task": {"kind": "token_classification"}},
        [{"tokens": ["Anna", "lives"], "tags": ["B-PER", "O"]}, {"tokens": ["Rome"], "tags": ["B-LOC"]}],
        {"labels": ["B-LOC", "B-PER", "O"]},
    ),
    "messages": (
        {"data": {"format": "messages"}},
        [
            {
                "messages": [
                    {"role": "system", "content": "be brief"},
                    {"role": "user", "content": f"{number}?"},
                    {"role": "assistant", "content": "yes"},
                ]
            }
            for number in range(3)
        ],
        {"system": "be brief"},
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_the_second_start_does_not_learn_again(
    name: str, backbone_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections, rows, wanted = LEARNED[name]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = str(tmp_path / "rows.jsonl")
    data = {"train": file, "eval": file, "max_length": 64, **sections.get("data", {})}
    trained = "p_tuning_v2" if "task" in sections else "prefix"
    raw = {"backbone": {"path": str(backbone_dir)}, "method": {"name": trained}, "output_dir": str(tmp_path / "out")}
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for each in messages %}<s>{{ each.role }}: {{ each.content }}</s>{% endfor %}"
    monkeypatch.setattr(build, "load_tokenizer", lambda backbone: tokenizer)

    def start(cache: Path | str) -> build.RunMaterial:
        config = parse_config({**raw, **sections, "data": {**data, "cache": str(cache)}})
        return build.read_material(config, ALONE, Notes())

    memory, first = start("none"), start(tmp_path / "cache")
    monkeypatch.setattr(type(first.task), "fit", lambda *_: pytest.fail("fits again"))
    second = start(tmp_path / "cache")
    for each in (memory, first, second):
        assert {key: each.task.facts()[key] for key in wanted} == wanted
        assert each.examples.digest() == memory.examples.digest()
        assert each.task.facts() == memory.task.facts()
    rows[1] = rows[0]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(pytest.fail.Exception, match="fits again"):
        start(tmp_path / "cache")


def test_a_run_is_the_same_with_and_without_the_cache(
    train_here: Any, backbone_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    losses, notes = [], []
    for name, cache in (("memory", "none"), ("first", tmp_path / "rows"), ("second", tmp_path / "rows")):
        raw = {
            "backbone": {"path": str(backbone_dir)},
            "method": {"name": "prefix", "num_virtual_tokens": 4},
            "data": {"train": str(rows_file), "eval": str(rows_file), "max_length": 64, "cache": str(cache)},
            "train": {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "eval_steps": 2},
            "output_dir": str(tmp_path / name),
        }
        notes.append([line for line in train_here(raw) if line.startswith("data.")])
        records = list(read_records(tmp_path / name))
        losses.append([[each.get("loss"), each.get("eval_loss")] for each in records])
        described = json.loads((tmp_path / name / "adapter" / "adapter_config.json").read_text())
        assert "cache" not in json.dumps(described)
    assert losses[0] == losses[1] == losses[2]
    assert notes[0] == notes[1] == notes[2]
    (entry,) = (path for path in (tmp_path / "rows").iterdir() if path.is_dir())  # both files have the same content
    assert (entry / "tokens.bin").exists()
    run = json.loads((tmp_path / "first" / "run.json").read_text())
    assert run["config"]["data"]["cache"] == str(tmp_path / "rows")
