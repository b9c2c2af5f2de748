"""Run on two ranks by test_host_collectives.py: what ranks exchange while their GPUs may be busy.

    torchrun --nproc-per-node 2 worker_host.py BACKBONE FOLDER

The process group has two backends, as on GPUs: gloo for data on the host, and for data on a GPU a fake backend that
transfers nothing. The device of the ranks is ``meta``, from which no data can be sent. Each rank writes its results to
``FOLDER/found.RANK``.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend

from ptd.checkpoint import Saver, latest_complete, saver
from ptd.config import parse_config
from ptd.config.deepspeed import apply_deepspeed
from ptd.distributed import rendezvous
from ptd.distributed.ranks import Ranks
from ptd.distributed.zero3 import _gather
from ptd.engine.setup import prepare
from ptd.types import UserError

HELD = 60.0
"""Limit of every wait, in seconds."""


def main(backbone: str, folder: Path) -> None:
    try_out = rendezvous._try_out
    rendezvous.backends_for = lambda device: {"cpu": "gloo", "cuda": "fake"}  # type: ignore[assignment]
    rendezvous._try_out = lambda size, device: try_out(size, device) if device.type == "cpu" else None
    ranks = Ranks.start()
    found = {
        "backend": str(dist.get_backend()),
        **talk(replace(ranks, device=torch.device("meta"))),
        **sharded(backbone, ranks),
        **saving(folder / "checkpoints", ranks),
        **failing(folder / "none" / "checkpoints", ranks),
    }
    (folder / f"found.{ranks.rank}").write_text(json.dumps(found))
    ranks.barrier()
    ranks.stop()


def talk(ranks: Ranks) -> dict[str, Any]:
    def refuse() -> None:
        raise UserError("no")

    ranks.barrier()
    ranks.leave("name", ranks.rank * 10)
    ranks.barrier()
    try:
        ranks.on_main(refuse, long=True)
    except UserError as error:
        raised = str(error)
    began = time.monotonic()
    said = ranks.on_main(lambda: time.sleep(0.5) or "said by 0", long=True)
    return {
        "gathered": ranks.gather(ranks.rank),
        "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
        "on main": ranks.on_main(lambda: "said by 0"),
        "long": [said, time.monotonic() - began >= 0.5],
        "raised": raised,
        "left": [ranks.left("name"), ranks.left("other")],
    }


def sharded(backbone: str, ranks: Ranks) -> dict[str, Any]:
    """Run DeepSpeed over the existing group, and over a separate group for each node."""
    deepspeed.init_distributed()
    found: dict[str, Any] = {"deepspeed": deepspeed.comm.is_initialized()}
    ids = torch.arange(5, 12)[None]
    for sharding in ("world", "node"):
        raw = {
            "backbone": {
                "path": backbone,
                "sharding": sharding,
                "sharding_group_size": 2 if sharding == "node" else None,
            },
            "method": {"name": "prefix"},
            "data": {"train": "x"},
            "output_dir": "x",
            "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        }
        config, zero3 = apply_deepspeed(parse_config(raw))
        prepared = prepare(config.backbone, ranks, zero3)
        with torch.no_grad():
            found[sharding] = float(prepared.model(input_ids=ids, use_cache=False).logits.double().sum())
    group = dist.new_group([0, 1])
    found["of a group"] = [dist.get_backend(group), _gather(ranks.rank, group)]
    return found


def trained() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: tensor.detach() for name, tensor in nn.Linear(3, 4).named_parameters()}


def saving(root: Path, ranks: Ranks) -> dict[str, Any]:
    """Save a checkpoint while rank 1's disk is slow and rank 0 passes many step boundaries."""
    write, store = saver._write_part, ranks._notes
    may_write = threading.Event()

    def held(*args: Any) -> Any:
        assert ranks.is_main or may_write.wait(HELD)
        return write(*args)

    saver._write_part = held
    writer = Saver(root, ranks, keep=2)
    writer.save(1, trained(), {})
    found: dict[str, Any] = {}
    if ranks.is_main:
        for _ in range(100):
            writer.poll()
        found["before"] = str(latest_complete(root)[0])
        store.set("polled", "")
    else:
        store.wait(["polled"])
        may_write.set()
        until(lambda: writer._write is not None and writer._write.part.done())
        writer.poll()  # once, at the next boundary
    if ranks.is_main:
        until(lambda: writer.poll() or (root / "latest").exists())
        found["completed by polling"] = (root / "latest").read_text()
    writer.wait()
    saver._write_part = write
    writer.save(2, trained(), {})
    writer.wait()
    ranks.barrier()
    return found | {"kept": sorted(path.name for path in root.iterdir()), "failed": writer.failed}


def until(done: Any) -> None:
    for _ in range(int(HELD * 100)):
        if done():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come to that")


def failing(root: Path, ranks: Ranks) -> dict[str, Any]:
    """Save a checkpoint that rank 1 cannot write: it knows at its next boundary, and all ranks raise together."""
    write = saver._write_part

    def full(*args: Any) -> Any:
        if not ranks.is_main:
            raise OSError(28, "No space left on device")
        return write(*args)

    saver._write_part = full
    writer = Saver(root, ranks, keep=2)
    writer.save(3, trained(), {})
    until(lambda: writer._write is not None and writer._write.part.done())
    for _ in range(3):
        writer.poll()
        ranks.barrier()
    failed = writer.failed

    def gone(ranks: Ranks, name: str) -> None:
        raise RuntimeError("rank 0 has ended, with the notes")

    Ranks.withdraw = gone  # type: ignore[method-assign]
    try:
        writer.wait()
    except UserError as error:
        ranks.barrier()
        return {"knows": failed, "said": str(error), "remains": sorted(path.name for path in root.glob("*"))}
    return {"said": "nothing"}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
