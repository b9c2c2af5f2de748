"""The saver in a single process: the files it leaves, its errors, and the detection of any damage to a checkpoint."""

from __future__ import annotations

import json
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ptd.checkpoint import Saver, latest_complete, load_tensors, saver
from ptd.checkpoint.files import write_json
from ptd.checkpoint.run_state import checkpoints, clean, read_facts, state_tensors, step_of
from ptd.distributed.ranks import Ranks
from ptd.engine.optimizers import AdamW
from ptd.types import UserError

ALONE = Ranks(0, 1, 1, torch.device("cpu"))


def make() -> tuple[nn.Module, AdamW]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    return module, AdamW(module.parameters())


def train(module: nn.Module, optimizer: AdamW) -> None:
    module(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def values(module: nn.Module, optimizer: AdamW) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state_tensors(module, optimizer).items()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two checkpoints, step-000001 and step-000002."""
    root = tmp_path_factory.mktemp("saved")
    module, optimizer = make()
    writer = Saver(root, ALONE, keep=2)
    for step in (1, 2):
        train(module, optimizer)
        writer.save(step, state_tensors(module, optimizer), {"best": {"loss": 1.5}})
    writer.wait()
    return root


def test_what_is_saved_is_what_was_there_at_the_boundary(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint holds the values of its step, although training continues before the thread writes a byte."""
    may_write = threading.Event()
    write = saver._write_part

    def held(*args: Any) -> Any:
        assert may_write.wait(60)
        return write(*args)

    monkeypatch.setattr(saver, "_write_part", held)
    module, optimizer = make()
    train(module, optimizer)
    then = values(module, optimizer)
    writer = Saver(root, ALONE, keep=2)
    writer.save(1, state_tensors(module, optimizer), {"best": {}})
    train(module, optimizer)
    writer.poll()
    assert latest_complete(root) == (None, [])
    assert not root.exists()
    may_write.set()
    writer.wait()
    loaded = state_tensors(*make())
    load_tensors(root / "step-000001", loaded)
    assert loaded.keys() == then.keys()
    assert all(torch.equal(loaded[name], then[name]) for name in then)
    assert not all(torch.equal(value, then[name]) for name, value in values(module, optimizer).items())


def test_polling_completes_a_checkpoint(root: Path) -> None:
    module, optimizer = make()
    writer = Saver(root, ALONE, keep=2)
    writer.save(3, state_tensors(module, optimizer), {"best": {"loss": 2.0}})
    for _ in range(6000):
        writer.poll()
        if (root / "latest").exists():
            break
        threading.Event().wait(0.01)
    writer.close()
    assert (root / "latest").read_text() == "step-000003\n"
    assert read_facts(root / "step-000003") == {"step": 3, "best": {"loss": 2.0}}


def test_the_newest_are_kept(root: Path) -> None:
    module, optimizer = make()
    writer = Saver(root, ALONE, keep=2)
    for step in range(1, 6):
        writer.save(step, state_tensors(module, optimizer), {})
    writer.close()  # in a single process, every save that was begun is completed
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-000004", "step-000005"]


def test_one_that_is_held_stays_beside_the_newest(root: Path) -> None:
    module, optimizer = make()
    writer = Saver(root, ALONE, keep=2)
    for step in range(1, 8):
        writer.save(step, state_tensors(module, optimizer), {}, hold=min(step, 3))
    writer.close()
    assert [step_of(path) for path in checkpoints(root)] == [7, 6, 3]
    writer.save(8, state_tensors(module, optimizer), {}, hold=6)
    writer.close()
    assert [step_of(path) for path in checkpoints(root)] == [8, 7, 6]


def test_a_failed_write_leaves_the_last_whole_one_and_says_what_to_do(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, optimizer = make()
    writer = Saver(root, ALONE, keep=1)
    writer.save(1, state_tensors(module, optimizer), {})
    writer.wait()

    def refuse(path: Path) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, "file_entry", refuse)
    writer.save(2, state_tensors(module, optimizer), {})
    with pytest.raises(UserError, match=r"step 2 .*No space left.* continues from step-000001"):
        writer.wait()
    assert latest_complete(root) == (root / "step-000001", [])
    assert not list(root.glob(".*"))
    monkeypatch.undo()
    writer.save(3, state_tensors(module, optimizer), {})
    writer.wait()
    assert latest_complete(root) == (root / "step-000003", [])


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    module, optimizer = make()
    writer = Saver(tmp_path / "file" / "checkpoints", ALONE, keep=1)
    writer.save(1, state_tensors(module, optimizer), {})
    with pytest.raises(UserError, match=r"step 1 .*File exists.*starts from the beginning"):
        writer.wait()


def test_what_a_killed_process_left_in_the_folder_is_not_taken_over(root: Path) -> None:
    (root / ".writing-000001").mkdir(parents=True)
    (root / ".writing-000001" / "shard-00002-model-00001-of-00001.safetensors").write_bytes(b"half")
    module, optimizer = make()
    writer = Saver(root, ALONE, keep=1)
    writer.save(1, state_tensors(module, optimizer), {})
    writer.wait()
    assert latest_complete(root) == (root / "step-000001", [])
    load_tensors(root / "step-000001", state_tensors(module, optimizer))


def test_a_defect_in_the_thread_is_no_users_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "_write_part", lambda *args: 1 / 0)
    module, optimizer = make()
    writer = Saver(root, ALONE, keep=1)
    writer.save(1, state_tensors(module, optimizer), {})
    with pytest.raises(ZeroDivisionError):
        writer.wait()


def test_leftovers_are_cleaned_and_nothing_else(saved: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    whole = sorted(path.name for path in root.iterdir())
    for name in (".writing-000007", ".deleted-step-000000"):
        (root / name).mkdir()
        (root / name / "state.json").write_text("{")
    (root / ".latest.tmp").write_text("step")
    clean(root)
    assert sorted(path.name for path in root.iterdir()) == whole


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "shard-00001-model-00001-of-00001.safetensors"])
def test_every_damage_is_seen(saved: Path, tmp_path: Path, name: str) -> None:
    """The older checkpoint is used if one file of the newest is damaged.

    The file is emptied, cut at 20 places, extended by a byte, changed by one bit at 200 places, or removed.
    """
    root = Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    path = root / "step-000002" / name
    whole = path.read_bytes()
    draw = random.Random(name)
    damaged = [b"", *(whole[: draw.randrange(1, len(whole))] for _ in range(20)), whole + b" "]
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        found, skipped = latest_complete(root)
        assert found == root / "step-000001"
        assert len(skipped) == 1
        assert skipped[0].startswith("step-000002: ")
    path.unlink()
    assert latest_complete(root)[0] == root / "step-000001"
    path.write_bytes(whole)
    assert latest_complete(root) == (root / "step-000002", [])


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", "null", "7", '{"state.json": 3}', '{"state.json": [1]}', '{"../x": [0, ""]}', "\xff"]
)
def test_a_manifest_that_is_none(saved: Path, tmp_path: Path, manifest: str) -> None:
    root = Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    (root / "step-000002" / "manifest.json").write_text(manifest, encoding="latin-1")
    found, skipped = latest_complete(root)
    assert found == root / "step-000001"
    assert skipped[0].startswith("step-000002: ")


def test_a_shard_of_another_checkpoint_is_not_read(saved: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    shard = next((root / "step-000001").glob("*.safetensors"))
    shutil.copy(shard, root / "step-000002" / "shard-00002-model-00001-of-00001.safetensors")
    found, skipped = latest_complete(root)
    assert found == root / "step-000001"
    assert "does not belong to the checkpoint" in skipped[0]


def test_a_manifest_without_shards_is_not_whole(saved: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    newest = root / "step-000002"
    manifest = json.loads((newest / "manifest.json").read_text())
    write_json(newest / "manifest.json", {"state.json": manifest["state.json"]})
    assert latest_complete(root)[0] == root / "step-000001"


def test_a_file_in_the_place_of_a_checkpoint(saved: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    (root / "step-000009").write_text("")
    found, skipped = latest_complete(root)
    assert found == root / "step-000002"
    assert skipped[0].startswith("step-000009: unreadable")
