"""Hand the frozen backbone to DeepSpeed, which owns its sharding and nothing else."""

from __future__ import annotations

import logging
from typing import Any

import deepspeed
from torch import nn


def shard(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Partition a model loaded under ZeRO-3 over all ranks; returns the module to call.

    With nothing trainable DeepSpeed builds no optimizer but a pure parameter offloader: the engine's ``module`` gathers
    each layer when it runs, forward and backward, and plain ``loss.backward()`` works on it.
    """
    # The shared-memory op serves CPU inference all-reduces only; building it needs a compiler and a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine.module
