"""Write checkpoints in a background thread while training continues.

At a step boundary every rank copies its part of the tensors to the CPU and hands the copy to a thread, which does only
file IO. At a later boundary each rank leaves a note for rank 0 that its part is on disk. When rank 0 has the notes of
all ranks, its thread lists the parts in the manifest and renames the folder. So a checkpoint is complete or does not
exist, neither threads nor boundaries wait for another rank, and training and saving never use the network library at
the same time. All ranks learn together whether a write succeeded, before the next one begins.
"""

from __future__ import annotations

import secrets
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from ptd.checkpoint.files import make_folders, write_atomically, write_json
from ptd.checkpoint.run_state import (
    DELETED,
    FACTS,
    LATEST,
    MANIFEST,
    WRITING,
    Listing,
    checkpoints,
    file_entry,
    step_of,
)
from ptd.files import sync
from ptd.types import UserError

Files: TypeAlias = dict[str, Listing]
Outcome: TypeAlias = Files | str
"""What a rank reports to the others: the files it wrote, or why it could not write them."""


class RankGroup(Protocol):
    """The operations on the ranks of a run that saving needs."""

    @property
    def rank(self) -> int: ...
    @property
    def is_main(self) -> bool: ...
    @property
    def world_size(self) -> int: ...
    def gather(self, value: Any, /) -> list[Any]: ...
    def leave(self, name: str, value: Any) -> None: ...
    def left(self, name: str) -> list[Any] | None: ...
    def withdraw(self, name: str) -> None: ...


@dataclass
class _Write:
    """The write in flight.

    This rank's thread writes the files of ``part`` and, on rank 0, completes the folder in ``whole``. ``told``: this
    rank has left its ``note`` for rank 0. ``hold``: see `Saver.save`.
    """

    step: int
    facts: dict[str, Any]
    note: str
    part: Future[Files]
    whole: Future[Files] | None = None
    told: bool = False
    hold: int | None = None

    @property
    def work(self) -> list[Future[Files]]:
        return [self.part] if self.whole is None else [self.part, self.whole]


class Saver:
    """Writes ``root/step-NNNNNN/`` and keeps the newest ``keep`` checkpoints; at most one write is in flight.

    ``records``: a file to which training appends; what it held at the boundary is on disk before the checkpoint is.

    All ranks call `save` and `wait` together. Both raise `UserError` on all ranks if a write failed on any rank (disk
    full, read-only …); a failed write does not change the complete checkpoints.
    """

    def __init__(self, root: Path, ranks: RankGroup, *, keep: int, records: Path | None = None) -> None:
        self.root, self.ranks, self.keep, self.records = root, ranks, keep, records
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._plan: SavePlan | None = None
        self._write: _Write | None = None
        self._name, self._numbers = "", count()

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], *, hold: int | None = None) -> None:
        """Copy ``tensors``, all training state (the same names and shapes in each call), and begin to write them.

        Waits for the previous write. ``hold``: in addition to the newest ``keep`` checkpoints, keep the newest one up
        to that step.
        """
        self.wait()
        planner = DefaultSavePlanner()
        planner.set_up_planner(tensors, is_coordinator=self.ranks.is_main)
        if self._plan is None:
            self._plan = self._make_plan(planner)
            self._name = self.ranks.gather(secrets.token_hex(8))[0]
        copies = {item.index: _copy(planner.resolve_data(item)) for item in self._plan.items}
        part = self._threads.submit(_write_part, self._temporary(step), self._plan, copies)
        self._write = _Write(step, facts, f"{self._name}/{next(self._numbers)}", part, hold=hold)

    def poll(self) -> None:
        """Advance the write in flight, without waiting for it or for another rank."""
        write = self._write
        if write is None or not write.part.done():
            return
        if not write.told:
            self.ranks.leave(write.note, _outcome(write.part))
            write.told = True
        if self.ranks.is_main and write.whole is None:
            outcomes = self.ranks.left(write.note)
            if outcomes is not None and not _failed(outcomes):
                write.whole = self._threads.submit(self._complete, write, _merged(outcomes))

    @property
    def failed(self) -> bool:
        """Whether a write has failed on this rank so far. `save` and `wait` report the failure to all ranks."""
        return self._write is not None and any(work.done() and work.exception() for work in self._write.work)

    def wait(self) -> None:
        """Wait until no write is in flight. Raises `UserError` if the write failed on any rank."""
        write = self._write
        if write is None:
            return
        wait_for([write.part])
        outcomes = self.ranks.gather(_outcome(write.part))
        if not _failed(outcomes):
            if self.ranks.is_main and write.whole is None:
                write.whole = self._threads.submit(self._complete, write, _merged(outcomes))
            outcomes = self.ranks.gather({} if write.whole is None else _outcome(write.whole))
        self._write = None
        failed = _failed(outcomes)
        if failed:  # the note stays: rank 0, which holds the notes, may be gone
            self._give_up(write, *failed[0])
        if write.told:
            self.ranks.withdraw(write.note)

    def close(self) -> None:
        """Leave a run that failed, without waiting for the other ranks' parts: these ranks may be gone."""
        if self._write is None:
            return
        wait_for(self._write.work)
        if self.ranks.world_size == 1:
            self.wait()

    def _give_up(self, write: _Write, rank: int, reason: str) -> NoReturn:
        """Raise the reason why ``rank`` could not write, on all ranks."""
        if self.ranks.is_main:
            shutil.rmtree(self._temporary(write.step), ignore_errors=True)
        for work in write.work:
            error = work.exception()
            if error is not None and not isinstance(error, OSError):
                raise error
        whole = checkpoints(self.root)
        then = (
            f"continues from {whole[0].name}" if whole else "starts from the beginning, as there is no checkpoint yet"
        )
        raise UserError(
            f"output_dir: the checkpoint of step {write.step} could not be written to {self.root} (rank {rank}: "
            f"{reason}); make sure that the folder has free space and is writable; the same command then {then}"
        )

    def _make_plan(self, planner: DefaultSavePlanner) -> SavePlan:
        """Plan the files: each rank writes its shards; a tensor that all ranks hold is written once, by one of them."""
        plans, _ = planner.create_global_plan(self.ranks.gather(planner.create_local_plan()))
        plans = HuggingFaceStorageWriter(str(self.root), save_distributed=True).prepare_global_plan(plans)
        return planner.finish_plan(plans[self.ranks.rank])

    def _complete(self, write: _Write, files: Files) -> Files:
        """List the files of all ranks, rename the folder, and delete old checkpoints (on rank 0, in its thread)."""
        temporary, final = self._temporary(write.step), self.root / f"step-{write.step:06d}"
        for name, (size, _) in files.items():
            if not (temporary / name).is_file() or (temporary / name).stat().st_size != size:
                raise OSError(f"{name} is not what its rank wrote; the folder has to be the same on all nodes")
        for path in set(temporary.iterdir()) - {temporary / name for name in files}:
            path.unlink()  # left by a process that was killed
        write_json(temporary / FACTS, {"step": write.step, **write.facts})
        write_json(temporary / MANIFEST, {**files, FACTS: file_entry(temporary / FACTS)})
        if self.records is not None:
            sync(self.records)
        if final.exists():  # passed over as damaged when the run continued
            self._set_aside(final)
        temporary.rename(final)
        sync(self.root)
        write_atomically(self.root / LATEST, final.name + "\n")
        # Checkpoints of later steps were passed over as damaged; if they counted, complete ones would be deleted.
        mine = [path for path in checkpoints(self.root) if step_of(path) <= write.step]
        held = [path for path in mine if write.hold is not None and step_of(path) <= write.hold]
        for old in set(checkpoints(self.root)) - set(mine[: self.keep]) - set(held[:1]):
            self._set_aside(old)
        for doomed in self.root.glob(f"{DELETED}*"):
            shutil.rmtree(doomed)
        return {}

    def _set_aside(self, folder: Path) -> None:
        """Hide the folder before it is deleted, so that no half-deleted checkpoint is ever visible."""
        folder.rename(self.root / (DELETED + folder.name))

    def _temporary(self, step: int) -> Path:
        return self.root / f"{WRITING}{step:06d}"


class _Copies(DefaultSavePlanner):
    """A planner that resolves to the copies instead of the live tensors."""

    def __init__(self, copies: dict[MetadataIndex, Tensor]) -> None:
        super().__init__()
        self.copies = copies

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.copies[write_item.index]


def _copy(tensor: Any) -> Tensor:
    return cast(Tensor, tensor).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _write_part(folder: Path, plan: SavePlan, copies: dict[MetadataIndex, Tensor]) -> Files:
    """Write this rank's tensors and force them to disk; the first rank to arrive creates the folder."""
    make_folders(folder)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    writer.per_thread_copy_ahead = 0  # the copies are on the CPU already; a stream would create a CUDA context on GPU 0
    results = writer.write_data(plan, _Copies(copies)).wait()
    return {
        name: file_entry(folder / name) for name in sorted({result.storage_data.relative_path for result in results})
    }


def _outcome(work: Future[Files]) -> Outcome:
    """Wait for ``work``; return the files it wrote, or why it failed."""
    error = work.exception()
    if error is None:
        return work.result()
    return str(error) if isinstance(error, OSError) else repr(error)


def _failed(outcomes: list[Outcome]) -> list[tuple[int, str]]:
    """Return the ranks that could not write, and why."""
    return [(rank, outcome) for rank, outcome in enumerate(outcomes) if isinstance(outcome, str)]


def _merged(outcomes: list[Outcome]) -> Files:
    return {name: listing for outcome in outcomes if not isinstance(outcome, str) for name, listing in outcome.items()}
