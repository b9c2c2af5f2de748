"""Run ``ptd train`` on ranks with injected faults, for test_faults.py.

    [unshare --mount] python worker_faults.py RUN.yaml FOLDER

All runs are forked from this one process. ``FOLDER/whole`` is not disturbed; ``FOLDER/faults`` meets one fault after
another and is continued after each; ``FOLDER/worlds`` is continued on different numbers of ranks. The outcome of each
start is in ``FOLDER/report.json``. If the process has its own mounts (root), the faulty run is on a small tmpfs and is
copied at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch  # noqa: F401  before the forks, as all that takes long to import
from torch.distributed.checkpoint.filesystem import FileSystem

import ptd.commands.train  # noqa: F401
from ptd.checkpoint import Saver, saver
from ptd.cli import main
from ptd.engine.loop import Loop
from ptd.engine.prompt_step import PromptStep, StepSums
from ptd.runs.metrics_log import Records

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from forked_ranks import start

TMPFS_BYTES, LEFT_BYTES = 8 << 20, 48 << 10
NAN_STEP = 10
Fault = Callable[[int], None]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Patch ``owner.name`` so that ``action`` is called with the same arguments just before it."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action(*args)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


class Now:
    """The number of the running step, counted from 1."""

    number = 0


def follow_steps() -> None:
    def note(loop: Loop, index: int, *given: Any) -> None:
        Now.number = index + 1

    before(Loop, "take_step", note)


def nan_on_one_rank(rank: int) -> None:
    """Make the loss of the last rank NaN in one step; this happens in all runs."""
    tensor = StepSums.tensor

    def spoiled(self: StepSums) -> Any:
        if Now.number == NAN_STEP:
            self.loss = self.loss * float("nan")
        return tensor(self)

    if rank == int(os.environ["WORLD_SIZE"]) - 1:
        StepSums.tensor = spoiled  # type: ignore[method-assign]


def in_step(number: int, victim: int = 1) -> Fault:
    """Kill a rank when the gradients are reduced but the optimizer has not stepped."""

    def fault(rank: int) -> None:
        if rank == victim:
            before(PromptStep, "_grad_norm", lambda step: die() if Now.number == number else None)

    return fault


def in_backward(number: int) -> Fault:
    """Kill rank 0 when the gradient has passed the backbone's last layer but not its first."""

    def fault(rank: int) -> None:
        encode = PromptStep.encode

        def hooked(self: PromptStep) -> Any:
            state = encode(self)
            if Now.number == number:
                list(state.tensors())[-1].register_hook(lambda gradient: die())
            return state

        if rank == 0:
            PromptStep.encode = hooked  # type: ignore[method-assign]

    return fault


def in_writer_thread(step: int) -> Fault:
    """Kill rank 1 when half of its tensors are in the file."""

    def fault(rank: int) -> None:
        create = FileSystem.create_stream

        @contextmanager
        def cut(self: FileSystem, path: Any, mode: str) -> Iterator[Any]:
            with create(self, path, mode) as stream:
                write = stream.write

                class Half:
                    def __getattr__(self, name: str) -> Any:
                        return getattr(stream, name)

                    def write(self, data: bytes) -> int:
                        if f"{step:06d}" in str(path):
                            write(data[: len(data) // 2])
                            stream.flush()
                            die()
                        return int(write(data))

                yield Half()

        if rank == 1:
            FileSystem.create_stream = cut  # type: ignore[method-assign,assignment]

    return fault


def before_rename(step: int) -> Fault:
    """Kill rank 0 when all files including the manifest are on disk, but the folder still has its temporary name."""

    def fault(rank: int) -> None:
        write = saver.write_json

        def written(path: Path, value: Any) -> None:
            write(path, value)
            if path.name == "manifest.json" and f"{step:06d}" in str(path):
                die()

        if rank == 0:
            saver.write_json = written

    return fault


def at_save(step: int, action: Callable[[Path], None]) -> Fault:
    """Call ``action(checkpoints)`` on rank 0 just before a checkpoint, while no rank writes."""

    def act(self: Saver, number: int, *rest: Any) -> None:
        if number == step:
            self.wait()
            if self.ranks.is_main:
                action(self.root)
            self.ranks.gather(None)

    return lambda rank: before(Saver, "save", act)


BLOCK = 4096


def at_record(step: int, output: Path) -> Fault:
    """Fill the disk to the last byte before rank 0 records a step."""

    def fill(records: Records, record: dict[str, Any]) -> None:
        if record["step"] == step:
            with records.path.open("ab") as file:  # to the end of a block, so that the record needs another block
                file.write(b" " * (-records.path.stat().st_size % BLOCK - 1) + b"\n")
            fill_disk(output / "checkpoints", 0)
            with suppress(OSError), (output / "last bytes").open("ab") as file:
                while True:
                    file.write(b"0")
                    file.flush()

    return lambda rank: before(Records, "write", fill)


def fill_disk(checkpoints: Path, left: int = LEFT_BYTES) -> None:
    free = os.statvfs(checkpoints)
    (checkpoints.parent / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - left))


def make_read_only(checkpoints: Path) -> None:
    """Make the folder read-only, for root too."""
    run("mount", "--bind", checkpoints, checkpoints)
    run("mount", "-o", "remount,ro,bind", checkpoints)


def run(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), check=True)


class Story:
    """Starts of ``ptd train`` and their outcomes."""

    def __init__(self, run_file: str, folder: Path) -> None:
        self.run_file, self.folder, self.report = run_file, folder, {}  # type: ignore[var-annotated]

    def train(self, title: str, name: str, ranks: int, fault: Fault | None = None) -> None:
        output = self.folder / name

        def work(rank: int) -> None:
            follow_steps()
            nan_on_one_rank(rank)
            if fault is not None:
                fault(rank)
            # A run fails this often only in this test; without --retry it would wait for a person.
            sys.argv = ["ptd", "train", "--retry", self.run_file, f"output_dir={output}"]
            if ranks == 1:  # the same rows per step
                sys.argv.append("train.per_device_train_batch_size=4")
            main()

        job = start(ranks, work, self.folder / "logs" / title.replace(" ", "-"))
        codes = job.wait(timeout=120)
        kept = sorted(path.name for path in (output / "checkpoints").glob("*")) if output.exists() else []
        self.report[title] = {"codes": codes, "log": job.log(0), "other_log": job.log(ranks - 1), "checkpoints": kept}

    def whole(self) -> None:
        self.train("whole", "whole", 2)

    def faults(self, mounts: bool) -> None:
        output = self.folder / "faults"
        output.mkdir()
        if mounts:
            run("mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", output)
        self.train("mid-step", "faults", 2, in_step(5))
        self.train("mid-backward", "faults", 2, in_backward(8))
        self.train("mid-save", "faults", 2, in_writer_thread(9))
        self.train("before the rename", "faults", 2, before_rename(9))
        for leftover in (".writing-000004", ".deleted-step-000001"):
            (output / "checkpoints" / leftover).mkdir()
            (output / "checkpoints" / leftover / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
        if mounts:
            self.train("disk full for a record", "faults", 2, at_record(11, output))
            for name in ("filler", "last bytes"):
                (output / name).unlink(missing_ok=True)
            self.train("disk full", "faults", 2, at_save(12, fill_disk))
            (output / "filler").unlink()
            self.train("read-only", "faults", 2, at_save(12, make_read_only))
            run("umount", output / "checkpoints")
            run("mount", "-o", "remount,ro", output)
            self.train("read-only from the start", "faults", 2)
            run("mount", "-o", "remount,rw", output)
        self.train("late", "faults", 2, in_step(14))
        self.train("last", "faults", 2)
        if mounts:
            copy = shutil.copytree(output, self.folder / "copy")
            run("umount", output)
            output.rmdir()
            copy.rename(output)

    def worlds(self) -> None:
        self.train("on one", "worlds", 1, in_step(7, victim=0))
        self.train("on two", "worlds", 2, in_step(10))
        self.train("on four", "worlds", 4, in_step(13))
        self.train("on one again", "worlds", 1)


def tell(run_file: str, folder: Path) -> None:
    story = Story(run_file, folder)
    story.whole()
    story.faults(mounts="--mounts" in sys.argv)
    story.worlds()
    (folder / "report.json").write_text(json.dumps(story.report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    tell(sys.argv[1], Path(sys.argv[2]))
