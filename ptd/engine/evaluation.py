"""Loss on held-out rows over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ptd.data import Batches
from ptd.engine.loss import causal_lm_loss
from ptd.engine.ranks import Ranks
from ptd.types import Examples, Reporter


def held_out_batches(
    examples: Examples, *, batch_size: int, packing: bool, pad_token_id: int | None, ranks: Ranks
) -> Batches:
    """All rows once, in their order, dealt out to the ranks."""
    return Batches(
        examples,
        rank=ranks.rank,
        world_size=ranks.world_size,
        per_device_batch_size=batch_size,
        packing=packing,
        shuffle=False,
        pad_token_id=pad_token_id or 0,
    )


@torch.no_grad()
def evaluate_loss(run: Callable[..., Any], batches: Batches, ranks: Ranks, reporter: Reporter) -> dict[str, float]:
    """Mean loss over all supervised tokens of one pass, its exponential and their number."""
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    steps = batches.steps_in_epoch(0)
    reporter.start("eval", steps)
    for step in range(steps):
        for batch in batches.step(step):
            total[0] += causal_lm_loss(run, batch, ranks.device)
            total[1] += batch.supervised_tokens
        reporter.advance("eval", step + 1)
    reporter.finish("eval")
    loss_sum, supervised = ranks.all_reduce(total).tolist()
    loss = loss_sum / supervised
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "supervised_tokens": int(supervised)}
