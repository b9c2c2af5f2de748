"""``ptd doctor``: what this machine has, and how attention with a prefix would run on it."""

from __future__ import annotations

from typing import Any

import torch

from ptd.inject import explain_attention
from ptd.types import DTYPES, UserError
from ptd.versions import versions


def examine(*, dtype: str = "auto", head_dim: int = 128) -> dict[str, Any]:
    """Versions, devices, and for each kind of batch which attention backend would be taken and why.

    ``dtype`` ``auto``: bfloat16 on a GPU, else float32. Raises `UserError` for another name.
    """
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype: there is no {dtype!r}; known: auto, {', '.join(DTYPES)}")
    on_gpu = torch.cuda.is_available()
    name = ("bfloat16" if on_gpu else "float32") if dtype == "auto" else dtype
    device = torch.device("cuda" if on_gpu else "cpu")
    return {
        "versions": versions(),
        "devices": [_gpu(index) for index in range(torch.cuda.device_count())] if on_gpu else ["cpu"],
        "attention": {
            "dtype": name,
            "head_dim": head_dim,
            "backends": explain_attention(device, DTYPES[name], head_dim),
        },
    }


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, sm_{found.major}{found.minor}"
