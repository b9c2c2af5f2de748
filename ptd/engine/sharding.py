"""Hand the frozen backbone to DeepSpeed, which owns its sharding and nothing else."""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import redirect_stdout
from typing import Any

from torch import nn

with redirect_stdout(sys.stderr):  # where its logger writes is settled at import; stdout is for ptd's results
    import deepspeed


def make_ready() -> None:
    """Settle DeepSpeed's defaults before it is first used (loading a model under ZeRO-3 already uses it)."""
    # The shared-memory op serves CPU inference all-reduces only; building it needs a compiler and a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor. is deprecated", category=FutureWarning)


def shard(model: nn.Module, config: dict[str, Any]) -> None:
    """Let DeepSpeed run a model that was loaded under ZeRO-3: it gathers each layer when it is used.

    With nothing trainable DeepSpeed builds no optimizer, only a parameter offloader; call the model itself, and plain
    ``loss.backward()``.
    """
    deepspeed.initialize(model=model, config=config)
