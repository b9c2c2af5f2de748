"""The loss of a micro-batch: summed, on supervised positions only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ptd.types import IGNORE_INDEX, Batch


def causal_lm_loss(run: Callable[..., Any], batch: Batch, device: torch.device) -> Tensor:
    """Sum of the cross-entropies of the supervised tokens (fp32 scalar on ``device``).

    Only supervised positions are projected to the vocabulary: transformers' ``logits_to_keep`` takes their columns.
    """
    columns = (batch.labels != IGNORE_INDEX).any(0).nonzero().flatten()
    if not len(columns):  # a filler batch: it must run all the same, or ranks under ZeRO-3 would wait for it
        columns = torch.zeros(1, dtype=torch.long)
    targets = batch.labels[:, columns].to(device, non_blocking=True)
    batch = batch.to(device)
    packing: dict[str, Any] = {}
    if batch.cu_seqlens is not None:
        packing = {
            "cu_seq_lens_q": batch.cu_seqlens,
            "cu_seq_lens_k": batch.cu_seqlens,
            "max_length_q": batch.max_seqlen,
            "max_length_k": batch.max_seqlen,
        }
    output = run(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=columns.to(device, non_blocking=True),
        **packing,
    )
    logits = output.logits.flatten(0, 1).float()
    return cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
