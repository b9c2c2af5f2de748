"""What is checked before a run: that all ranks mean the same run, and that what it writes has a place.

`ptd.engine.meeting` has compared versions and GPUs and tried a sum by then. Each check returns what it found, or raises
`UserError` on all ranks together; `ptd doctor` makes a table of those that one machine can answer.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from pathlib import Path

from ptd.config import RunConfig
from ptd.engine.meeting import listed
from ptd.engine.ranks import Ranks
from ptd.engine.records import flat
from ptd.files import check_writable, existing
from ptd.types import UserError

PER_NODE = ("backbone.offload_folder",)
"""Keys that may differ: a disk of its own may have another name on each node."""
FLOAT = 4
"""Bytes of a trained number, in the checkpoint and in the adapter."""
COPIES = 3
"""Of a trained number in a checkpoint: itself and Adam's two moments."""
ADAPTERS = 3
"""adapter, best, and one that is being written."""
PATIENCE = 30.0
"""Seconds in which a file has to be seen from the other nodes: a shared folder may be late."""


def check_run(config: RunConfig, ranks: Ranks) -> None:
    """All that can be checked before the backbone is loaded. Every rank calls this together."""
    check_same_config(config, ranks)
    check_output(config.output_dir, ranks)
    if config.backbone.offload_folder is not None:
        check_writable(config.backbone.offload_folder, "backbone.offload_folder")


def check_same_config(config: RunConfig, ranks: Ranks) -> None:
    """Raise `UserError` unless the resolved configuration is the same on all ranks."""
    if ranks.world_size == 1:
        return
    everywhere = [json.loads(each) for each in ranks.gather(json.dumps(flat(config.to_dict())))]
    for key in sorted({key for each in everywhere for key in each}):
        values: dict[str, list[int]] = {}
        for rank, each in enumerate(everywhere):
            values.setdefault(repr(each.get(key)), []).append(rank)
        if len(values) > 1 and key not in PER_NODE:
            said = ", ".join(f"{value[:80]} on {listed(holders, 'rank')}" for value, holders in values.items())
            raise UserError(
                f"{key}: the ranks were given different runs: {said}; start every rank with the same RUN.yaml and "
                "overrides, and look for files of the same name that differ from node to node"
            )


def same_fingerprint(own: str, ranks: Ranks) -> str:
    """The backbone's fingerprint, the same on every rank; raises `UserError` where ranks loaded different ones."""
    everywhere = ranks.gather(own)
    for rank, other in enumerate(everywhere):
        if other != everywhere[0]:
            holders = [index for index, each in enumerate(everywhere) if each == other]
            raise UserError(
                f"backbone.path: {listed(holders, 'rank')} loaded another backbone (fingerprint {other}) than rank 0 "
                f"({everywhere[0]}); the path has to hold the same checkpoint on the node of rank {rank} as on rank 0's"
            )
    return own


def check_output(folder: Path, ranks: Ranks) -> None:
    """Raise `UserError` unless ``output_dir`` can be written to, and is one folder for all ranks."""
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
            f"output_dir: {folder} is another folder for {listed(blind, 'rank')} than for rank 0, and a checkpoint is "
            "written and read by all ranks; give an absolute path on a disk that all nodes share"
        )


def _appears(folder: Path, mark: str) -> bool:
    """Whether the file is seen where this rank would write."""
    limit = time.monotonic() + PATIENCE
    while not (existing(folder) / mark).exists():
        if time.monotonic() > limit:
            return False
        time.sleep(0.2)
    return True


def bytes_to_write(trained: int, adapter: int, save_total_limit: int) -> int:
    """What a run's folder comes to hold, in bytes: checkpoints (one more while a new one is written) and adapters.

    ``trained``: numbers that are trained; ``adapter``: numbers that an adapter keeps.
    """
    checkpoint = COPIES * trained + adapter  # and what the prompt started from
    return FLOAT * (checkpoint * (save_total_limit + 1) + ADAPTERS * adapter)


def check_space(folder: Path, needed: int) -> str:
    """Raise `UserError` if the disk of ``folder`` has less than ``needed`` bytes, beside what the run has there."""
    place = existing(folder)
    own = sum(path.stat().st_size for path in folder.glob("checkpoints/*/*") if path.is_file())
    free = shutil.disk_usage(place).free
    if free + own < needed:
        raise UserError(
            f"output_dir: {place} has {size(free)} free, but the checkpoints and adapters of this run need "
            f"{size(needed)}; give a folder on another disk, make room, or lower train.save_total_limit"
        )
    return f"{size(free)} free in {place}, {size(needed)} needed"


def size(number: int) -> str:
    """Bytes as people write them."""
    value = float(number)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"
