"""Pad packed batches to a few recurring sizes, for kernels that are compiled for one size each.

oneDNN, which multiplies half-precision matrices on a CPU, generates code for every number of rows it meets: 30 to 40 ms
and 10 MB for the products of a small Llama, a fifth of its step. Hardly two packed batches have the same length. So a
padding sequence rounds up the number of tokens and the number of positions that are read. It belongs to no row, carries
no loss, and no other sequence attends to it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ptd.types import IGNORE_INDEX, Batch


def pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a backbone in ``dtype`` on ``device`` is multiplied by kernels that are compiled per size."""
    return device.type == "cpu" and dtype is not torch.float32


def rounded(count: int) -> int:
    """Round up to one of 16 numbers between a power of two and the next: by at most a sixteenth; below 32 unchanged."""
    step = 1 << max(0, count.bit_length() - 5)
    return -(-count // step) * step


def pad_to_bucket(batch: Batch, read: int) -> tuple[Batch, Tensor]:
    """Append a padding sequence to a packed batch of which ``read`` positions are read, so that both sizes are round.

    Returns the batch and the padding positions to read in addition: int64 ``[rounded(read) − read]``. In the batch,
    ``lengths`` includes the padding sequence, which reads the same prompt as the last sequence, and
    ``supervised_tokens`` counts all positions read, padding included.
    """
    assert batch.cu_seqlens is not None
    tokens = batch.input_ids.shape[1]
    also_read = rounded(read) - read
    total = rounded(tokens + also_read)
    if total == tokens:
        return batch, torch.arange(0)
    extra = total - tokens

    def longer(tensor: Tensor, value: int) -> Tensor:
        return torch.cat([tensor, tensor.new_full((1, extra), value)], dim=1)

    filled = replace(
        batch,
        input_ids=longer(batch.input_ids, 0),
        labels=longer(batch.labels, IGNORE_INDEX),
        position_ids=longer(batch.position_ids, 0),
        token_type_ids=None if batch.token_type_ids is None else longer(batch.token_type_ids, 0),
        cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens.new_tensor([total])]),
        max_seqlen=max(batch.max_seqlen, extra),
        lengths=torch.cat([batch.lengths, batch.lengths.new_tensor([extra])]),
        supervised_tokens=read + also_read,
        members=None if batch.members is None else (*batch.members, batch.members[-1]),
    )
    return filled, torch.arange(tokens, tokens + also_read)
