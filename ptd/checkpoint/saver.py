"""Writing checkpoints beside the training, off its path.

At a step boundary every rank copies its part of the tensors to the CPU and hands the copy to a thread, which does
nothing but file IO. What needs the other ranks happens on the main thread, at later boundaries: when all parts are on
disk, rank 0's thread lists them in the manifest and renames the folder. So a checkpoint is there whole or not at all,
threads never wait for another rank, and training and saving never meet in the network library.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from ptd.checkpoint.files import make_folders, sync, write_atomically, write_json
from ptd.checkpoint.run_state import DELETED, FACTS, LATEST, MANIFEST, WRITING, Listing, checkpoints, listed, step_of
from ptd.types import UserError

Files: TypeAlias = dict[str, Listing]
Outcome: TypeAlias = "Files | str | None"
"""What a rank tells the others: the files it wrote, why it could not, or that it is not done yet."""


class Group(Protocol):
    """The ranks of a run, as far as a checkpoint is concerned."""

    @property
    def rank(self) -> int: ...
    @property
    def is_main(self) -> bool: ...
    @property
    def world_size(self) -> int: ...
    def gather(self, value: Any, /) -> list[Any]: ...


@dataclass(frozen=True)
class _Write:
    """The write in flight. ``work`` is this rank's thread: writing its part, then (rank 0) completing the folder."""

    step: int
    facts: dict[str, Any]
    work: Future[Files]
    completing: bool = False


class Saver:
    """Writes ``root/step-NNNNNN/`` and keeps the newest ``keep``; at most one write is in flight.

    ``records``: a file that is appended to beside the training; what it held at the boundary is on disk before the
    checkpoint is.

    All ranks call `save`, `poll` and `wait` together; each raises `UserError` on all of them if a write failed on any
    (disk full, read-only …), which leaves the checkpoints that were whole as they are.
    """

    def __init__(self, root: Path, ranks: Group, *, keep: int, records: Path | None = None) -> None:
        self.root, self.ranks, self.keep, self.records = root, ranks, keep, records
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._plan: SavePlan | None = None
        self._write: _Write | None = None

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Copy ``tensors``, all that is trained (the same names and shapes each time), and begin to write them.

        Waits for the write before this one.
        """
        self.wait()
        planner = DefaultSavePlanner()
        planner.set_up_planner(tensors, is_coordinator=self.ranks.is_main)
        if self._plan is None:
            self._plan = self._make_plan(planner)
        copies = {item.index: _copy(planner.resolve_data(item)) for item in self._plan.items}
        work = self._threads.submit(_write_part, self._temporary(step), self._plan, copies)
        self._write = _Write(step, facts, work)

    def poll(self) -> None:
        """Move the write in flight on, without waiting for it."""
        self._advance(wait=False)

    def wait(self) -> None:
        """Return when nothing is in flight."""
        self._advance(wait=True)

    def close(self) -> None:
        """Leave a run that failed. Other ranks may be gone, so their part of the write in flight is not waited for."""
        if self._write is None:
            return
        wait_for([self._write.work])
        if self.ranks.world_size == 1:
            self.wait()

    def _advance(self, *, wait: bool) -> None:
        while self._write is not None:
            write = self._write
            if wait:
                wait_for([write.work])
            outcomes = self.ranks.gather(self._outcome(write.work))
            self._check(outcomes)
            if any(outcome is None for outcome in outcomes):
                return
            if write.completing:
                self._write = None
                return
            files = {name: listing for outcome in outcomes for name, listing in outcome.items()}
            complete = self._threads.submit(self._complete, write, files)
            self._write = _Write(write.step, write.facts, complete, completing=True)
            if not wait:
                return

    def _outcome(self, work: Future[Files]) -> Outcome:
        if not work.done():
            return None
        error = work.exception()
        return work.result() if error is None else _reason(error)

    def _check(self, outcomes: list[Outcome]) -> None:
        """Raise on all ranks if the write failed on any, when no rank writes any more."""
        failed = [(rank, outcome) for rank, outcome in enumerate(outcomes) if isinstance(outcome, str)]
        if not failed or self._write is None:
            return
        write, self._write = self._write, None
        wait_for([write.work])
        self.ranks.gather(None)
        if self.ranks.is_main:
            shutil.rmtree(self._temporary(write.step), ignore_errors=True)
        error = write.work.exception()
        if error is not None and not isinstance(error, OSError):
            raise error
        rank, reason = failed[0]
        whole = checkpoints(self.root)
        then = (
            f"continues from {whole[0].name}" if whole else "starts from the beginning, for there is no checkpoint yet"
        )
        raise UserError(
            f"output_dir: the checkpoint of step {write.step} could not be written to {self.root} (rank {rank}: "
            f"{reason}); see that the folder has space and is writable, then the same command {then}"
        )

    def _make_plan(self, planner: DefaultSavePlanner) -> SavePlan:
        """Who writes what: shards where they are, what all ranks hold once, spread over them."""
        plans, _ = planner.create_global_plan(self.ranks.gather(planner.create_local_plan()))
        plans = HuggingFaceStorageWriter(str(self.root), save_distributed=True).prepare_global_plan(plans)
        return planner.finish_plan(plans[self.ranks.rank])

    def _complete(self, write: _Write, files: Files) -> Files:
        """List the files of all ranks, rename the folder, and delete what is not kept (rank 0; a thread)."""
        if not self.ranks.is_main:
            return {}
        temporary, final = self._temporary(write.step), self.root / f"step-{write.step:06d}"
        for name, (size, _) in files.items():
            if not (temporary / name).is_file() or (temporary / name).stat().st_size != size:
                raise OSError(f"{name} is not as its rank wrote it; the folder has to be the same on all nodes")
        for path in set(temporary.iterdir()) - {temporary / name for name in files}:
            path.unlink()  # of a process that was killed
        write_json(temporary / FACTS, {"step": write.step, **write.facts})
        write_json(temporary / MANIFEST, {**files, FACTS: listed(temporary / FACTS)})
        if self.records is not None:
            sync(self.records)
        if final.exists():  # passed over as damaged when the run continued
            self._set_aside(final)
        temporary.rename(final)
        sync(self.root)
        write_atomically(self.root / LATEST, final.name + "\n")
        # One of a later step was passed over as damaged; if it counted among the kept, it would push out whole ones.
        mine = [path for path in checkpoints(self.root) if step_of(path) <= write.step]
        for old in set(checkpoints(self.root)) - set(mine[: self.keep]):
            self._set_aside(old)
        for doomed in self.root.glob(f"{DELETED}*"):
            shutil.rmtree(doomed)
        return {}

    def _set_aside(self, folder: Path) -> None:
        """Out of sight before it is deleted, so that none is ever seen half deleted."""
        folder.rename(self.root / (DELETED + folder.name))

    def _temporary(self, step: int) -> Path:
        return self.root / f"{WRITING}{step:06d}"


class _Copies(DefaultSavePlanner):
    """Hands out the copies instead of the live tensors."""

    def __init__(self, copies: dict[MetadataIndex, Tensor]) -> None:
        super().__init__()
        self.copies = copies

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.copies[write_item.index]


def _copy(tensor: Any) -> Tensor:
    return cast(Tensor, tensor).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _write_part(folder: Path, plan: SavePlan, copies: dict[MetadataIndex, Tensor]) -> Files:
    """Write this rank's tensors and force them to disk; whichever rank is first makes the folder."""
    make_folders(folder)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    writer.per_thread_copy_ahead = 0  # the copies are on the CPU already; a stream would make a context on GPU 0
    results = writer.write_data(plan, _Copies(copies)).wait()
    return {name: listed(folder / name) for name in sorted({result.storage_data.relative_path for result in results})}


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, OSError) else repr(error)
