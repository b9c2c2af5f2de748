"""Check before a run that all ranks have the same settings and that the run can write its files.

`ptd.distributed.rendezvous` has already compared versions and GPUs and run the self-test. Each check returns what it
found, or raises `UserError` on all ranks together; `ptd doctor` shows a table of the checks that one machine can run.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from ptd.config import RunConfig
from ptd.distributed.ranks import Ranks
from ptd.distributed.rendezvous import ranks_as_text
from ptd.files import check_writable, existing
from ptd.types import UserError
from ptd.values import decimal_size, flattened

PER_NODE = ("backbone.offload_folder", "data.cache", "data.cache_gb")
"""Keys that may differ between ranks: the path and the size of a local disk may differ between nodes."""
FLOAT = 4
"""Bytes per trained number, in a checkpoint and in an adapter."""
ADAPTERS = 3
"""Adapters on disk at the same time: ``adapter/``, ``best/``, and one that is being written."""
PATIENCE = 30.0
"""Seconds within which the other nodes have to see a new file: a shared folder may show it late."""


def check_before_run(config: RunConfig, ranks: Ranks) -> None:
    """Run all checks that do not need the backbone. Every rank calls this together."""
    check_same_config(config, ranks)
    check_output(config.output_dir, ranks)
    if config.backbone.offload_folder is not None:
        check_writable(config.backbone.offload_folder, "backbone.offload_folder")


def check_same_config(config: RunConfig, ranks: Ranks) -> None:
    """Raise `UserError` unless the resolved configuration is the same on all ranks."""
    if ranks.world_size == 1:
        return
    everywhere = [json.loads(each) for each in ranks.gather(json.dumps(flattened(config.to_dict())))]
    for key in sorted({key for each in everywhere for key in each}):
        values: dict[str, list[int]] = {}
        for rank, each in enumerate(everywhere):
            values.setdefault(repr(each.get(key)), []).append(rank)
        if len(values) > 1 and key not in PER_NODE:
            said = ", ".join(f"{value[:80]} on {ranks_as_text(holders, 'rank')}" for value, holders in values.items())
            raise UserError(
                f"{key}: the ranks have different values: {said}; start every rank with the same RUN.yaml and "
                "overrides, and check that files of the same name are equal on all nodes"
            )


def same_fingerprint(own: str, ranks: Ranks) -> str:
    """Return the backbone's fingerprint; raise `UserError` if the ranks loaded different backbones."""
    everywhere = ranks.gather(own)
    for rank, other in enumerate(everywhere):
        if other != everywhere[0]:
            holders = [index for index, each in enumerate(everywhere) if each == other]
            raise UserError(
                f"backbone.path: {ranks_as_text(holders, 'rank')} loaded a different backbone (fingerprint {other}) "
                f"than rank 0 ({everywhere[0]}); put the same checkpoint under this path on the nodes of rank {rank} "
                "and rank 0"
            )
    return own


def check_output(folder: Path, ranks: Ranks) -> None:
    """Raise `UserError` unless ``output_dir`` can be written to and is the same folder on all ranks."""
    mark = f".ptd-{secrets.token_hex(8)}"

    def leave() -> str:
        place = check_writable(folder, "output_dir")
        if ranks.world_size > 1:
            (place / mark).touch()
        return mark

    mark = ranks.on_main(leave)
    if ranks.world_size == 1:
        return
    try:
        seen = ranks.gather(_appears(folder, mark))
    finally:
        if ranks.is_main:
            (existing(folder) / mark).unlink(missing_ok=True)
    blind = [rank for rank, there in enumerate(seen) if not there]
    if blind:
        raise UserError(
            f"output_dir: {folder} is not the same folder on {ranks_as_text(blind, 'rank')} as on rank 0, but all "
            "ranks write and read the checkpoints; give an absolute path on a disk that all nodes share"
        )


def _appears(folder: Path, mark: str) -> bool:
    """Wait for the file in the folder where this rank would write; return whether it appears."""
    limit = time.monotonic() + PATIENCE
    while not (existing(folder) / mark).exists():
        if time.monotonic() > limit:
            return False
        time.sleep(0.2)
    return True


def bytes_to_write(trained: int, adapter: int, save_total_limit: int, state_bytes: float) -> int:
    """Return the largest size of a run's folder in bytes: its adapters and checkpoints, one more during a save.

    ``trained``: number of trained values; ``adapter``: number of values that an adapter stores; ``state_bytes``: bytes
    of optimizer state per trained value.
    """
    checkpoint = (FLOAT + state_bytes) * trained + FLOAT * adapter  # a checkpoint also holds the initial prompt
    return math.ceil(checkpoint * (save_total_limit + 1) + FLOAT * ADAPTERS * adapter)


def check_space(folders: Sequence[Path], needed: int) -> str:
    """Raise `UserError` if the disk of ``folders`` has fewer than ``needed`` bytes for the runs in them.

    Counts the free space and the checkpoints that the runs already have there.
    """
    place = existing(folders[0])
    found = (path for folder in folders for path in folder.glob("checkpoints/*/*"))
    own = sum(path.stat().st_size for path in found if path.is_file())
    free = shutil.disk_usage(place).free
    if free + own < needed:
        raise UserError(
            f"output_dir: {place} has {decimal_size(free)} free, but the checkpoints and adapters of this run need "
            f"{decimal_size(needed)}; give a folder on another disk, make room, or lower train.save_total_limit"
        )
    return f"{decimal_size(free)} free in {place}, {decimal_size(needed)} needed"
