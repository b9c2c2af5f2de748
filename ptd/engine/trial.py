"""Ranks on this machine that do nothing but meet and sum a number: whether collectives work here."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import torch

from ptd.engine.ranks import Ranks
from ptd.types import UserError

PATIENCE = 300.0
"""Seconds for the ranks to start, meet and sum."""


def sum_here() -> str:
    """Start a rank for each GPU (two on the CPU with fewer than two), let them meet and sum; says how they did.

    Raises `UserError` with what a rank said that could not.
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
    how = f"{ranks} ranks on {'the CPU, by gloo' if hidden else 'the GPUs, by NCCL'}"
    if alive:
        raise UserError(f"{how}: rank {alive[0]} did not end within {PATIENCE:g} s; see what it wrote above")
    if not said.empty():
        raise UserError(f"{how}: {said.get()}")
    codes = [process.exitcode for process in started if process.exitcode]
    if codes:
        raise UserError(f"{how}: one ended with code {codes[0]}; see what it wrote above")
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
