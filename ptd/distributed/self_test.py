"""Test whether collectives work on this machine: start ranks that only join a process group and sum one number."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import torch

from ptd.distributed.ranks import Ranks
from ptd.types import UserError

PATIENCE = 300.0
"""Seconds for the ranks to start, join and sum."""


def sum_here() -> str:
    """Run the self-test on one rank per GPU (on two CPU ranks if there are fewer than two GPUs); return its result.

    Raises `UserError` with the message of a rank that failed.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks, hidden = (gpus, False) if gpus > 1 else (2, True)
    context = multiprocessing.get_context("spawn")
    said = context.SimpleQueue()
    port = Ranks.free_port()
    started = [context.Process(target=_one_rank, args=(rank, ranks, port, hidden, said)) for rank in range(ranks)]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE)
    alive = [rank for rank, process in enumerate(started) if process.is_alive()]
    for process in started:
        process.kill()
        process.join()
    how = f"{ranks} ranks on {'the CPU, over gloo' if hidden else 'the GPUs, over NCCL'}"
    if alive:
        raise UserError(f"{how}: rank {alive[0]} did not finish within {PATIENCE:g} s; see its output above")
    if not said.empty():
        raise UserError(f"{how}: {said.get()}")
    codes = [process.exitcode for process in started if process.exitcode]
    if codes:
        raise UserError(f"{how}: one rank exited with code {codes[0]}; see its output above")
    return f"{how}, summed a number"


def _one_rank(rank: int, ranks: int, port: int, hidden: bool, said: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    if hidden:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        Ranks.start().stop()
    except UserError as error:
        said.put(str(error))
