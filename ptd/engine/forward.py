"""Run a batch through the backbone and compute outputs only for the positions that are asked for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ptd.async_copy import to_device
from ptd.engine.bucket_padding import pad_to_bucket
from ptd.inject import Attachment, PassOutput
from ptd.readouts import Ask
from ptd.types import IGNORE_INDEX, Batch


class Forward:
    """The `ptd.readouts.Run` of a backbone.

    The layers after the last attention and the language model's head compute only the requested positions. With
    gradient checkpointing the backward pass has to run before the next forward pass. ``rounds``: pad packed batches to
    a few recurring sizes (`ptd.engine.bucket_padding`).
    """

    def __init__(self, attachment: Attachment, device: torch.device, *, rounds: bool = False) -> None:
        self.attachment, self.device, self.rounds = attachment, device, rounds

    def __call__(self, batch: Batch, ask: Ask | None = None) -> Tensor:
        """Return what ``ask`` needs (`ptd.readouts.Run`); None: the output at all positions, flattened."""
        if ask is not None and ask.targets is not None:
            return self._cross_entropies(batch, ask, ask.targets)
        count = batch.input_ids.numel() if ask is None else len(ask.positions)
        batch, also = self.filled(batch, 0 if ask is None else count)
        wanted = None if ask is None else PassOutput(to_device(torch.cat([ask.positions, also]), self.device))
        output = self.attachment.run(batch.to(self.device), wanted)
        logits: Tensor | None = output.get("logits")
        return (output.last_hidden_state if logits is None else logits).flatten(0, 1)[:count]

    def _cross_entropies(self, batch: Batch, ask: Ask, targets: Tensor) -> Tensor:
        """Return the cross-entropies of ``targets``, fp32 ``[n]``, without holding logits where the model allows it."""
        count = len(targets)
        if not self.attachment.head.fuses:
            return cross_entropy(
                self(batch, Ask(ask.positions)).float(), to_device(targets, self.device), reduction="none"
            )
        batch, also = self.filled(batch, count)
        targets = torch.cat([targets, targets.new_full(also.shape, IGNORE_INDEX)])
        positions = torch.cat([ask.positions, also])
        wanted = PassOutput(to_device(positions, self.device), to_device(targets, self.device))
        self.attachment.run(batch.to(self.device), wanted)
        assert wanted.losses is not None, "the pass did not run the output layer"
        return wanted.losses[:count]

    def filled(self, batch: Batch, read: int) -> tuple[Batch, Tensor]:
        """Return the batch, padded if ``rounds``, and the padding positions to read after its ``read`` positions."""
        return pad_to_bucket(batch, read) if self.rounds and batch.cu_seqlens is not None else (batch, torch.arange(0))
