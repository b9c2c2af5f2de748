"""Run a batch through the backbone and compute outputs only for the requested positions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ptd.async_copy import to_device
from ptd.engine.bucket_padding import pad_to_bucket
from ptd.inject import Attachment, PassOutput
from ptd.types import IGNORE_INDEX, Batch


class Forward:
    """The ``run`` of `ptd.readouts`: a language model's logits or their cross-entropy, or a body's last hidden states.

    The layers after the last attention and the language model's head compute only the requested positions. With
    gradient checkpointing the backward pass has to run before the next forward pass. ``rounds``: pad packed batches to
    a few recurring sizes (`ptd.engine.bucket_padding`).
    """

    def __init__(self, attachment: Attachment, device: torch.device, *, rounds: bool = False) -> None:
        self.attachment, self.device, self.rounds = attachment, device, rounds

    def __call__(self, batch: Batch, positions: Tensor | None = None) -> Tensor:
        """Return the output at ``positions``, ``[len(positions), width]``; None: at all positions, flattened."""
        count = batch.input_ids.numel() if positions is None else len(positions)
        batch, also = self.filled(batch, 0 if positions is None else count)
        wanted = None if positions is None else PassOutput(to_device(torch.cat([positions, also]), self.device))
        output = self.attachment.run(batch.to(self.device), wanted)
        logits: Tensor | None = output.get("logits")
        return (output.last_hidden_state if logits is None else logits).flatten(0, 1)[:count]

    def cross_entropy(self, batch: Batch, positions: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy between the language model's logits at ``positions`` and ``targets``, summed, fp32.

        ``targets``: ``[len(positions)]``.
        """
        if not self.attachment.head.fuses:
            targets = to_device(targets, self.device)
            return cross_entropy(self(batch, positions).float(), targets, reduction="sum")
        batch, also = self.filled(batch, len(positions))
        targets = torch.cat([targets, targets.new_full(also.shape, IGNORE_INDEX)])
        positions = torch.cat([positions, also])
        wanted = PassOutput(to_device(positions, self.device), to_device(targets, self.device))
        self.attachment.run(batch.to(self.device), wanted)
        assert wanted.loss is not None, "the pass did not run the output layer"
        return wanted.loss

    def filled(self, batch: Batch, read: int) -> tuple[Batch, Tensor]:
        """Return the batch, padded if ``rounds``, and the padding positions to read after its ``read`` positions."""
        return pad_to_bucket(batch, read) if self.rounds and batch.cu_seqlens is not None else (batch, torch.arange(0))
