"""Run a batch through the backbone: which of its tensors a model of this architecture takes, and what comes back."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ptd.engine.rounding import fill
from ptd.inject import Attachment
from ptd.transfer import to_device
from ptd.types import IGNORE_INDEX, Batch


def decoder_start(model: PreTrainedModel) -> int | None:
    """What the decoder of an encoder-decoder starts from, in training and in generation; None: nothing says it."""
    start: int | None = getattr(model.config, "decoder_start_token_id", None)
    own = getattr(model, "generation_config", None)
    return start if start is not None or own is None else own.decoder_start_token_id


class Forward:
    """The ``run`` of `ptd.readouts`: a language model's logits or their cross-entropy, or a body's last hidden states.

    Only the positions asked for reach what is behind the last attention, and the language model's head. With gradient
    checkpointing the backward pass has to come before the next forward pass. ``rounds``: packed batches run in sizes
    that come again (`ptd.engine.rounding`).
    """

    def __init__(
        self, model: PreTrainedModel, attachment: Attachment, device: torch.device, *, rounds: bool = False
    ) -> None:
        self.model, self.attachment, self.device, self.rounds = model, attachment, device, rounds
        self.placeholder: int | None = None
        """The token that the sequences of an encoder-decoder have where the decoder starts; None: the padding token."""
        self._takes = set(inspect.signature(model.forward).parameters)
        self._sees_padding = any(layer.kind == "encoder" for layer in attachment.shape.layers)

    def __call__(self, batch: Batch, positions: Tensor | None = None) -> Tensor:
        """``[len(positions), width]``; None: of all positions, flattened."""
        wanted = batch.input_ids.numel() if positions is None else len(positions)
        batch, also = self.filled(batch, 0 if positions is None else wanted)
        self.attachment.keep(None if positions is None else to_device(torch.cat([positions, also]), self.device))
        output = self._run(self._inputs(batch.to(self.device)))
        logits: Tensor | None = output.get("logits")
        return (output.last_hidden_state if logits is None else logits).flatten(0, 1)[:wanted]

    def cross_entropy(self, batch: Batch, positions: Tensor, targets: Tensor) -> Tensor:
        """Sum over ``positions`` of the language model's cross-entropy with ``targets`` ``[len(positions)]``, fp32."""
        head = self.attachment.head
        if not head.fuses:
            targets = to_device(targets, self.device)
            return cross_entropy(self(batch, positions).float(), targets, reduction="sum")
        batch, also = self.filled(batch, len(positions))
        targets = torch.cat([targets, targets.new_full(also.shape, IGNORE_INDEX)])
        positions = torch.cat([positions, also])
        self.attachment.keep(to_device(positions, self.device), to_device(targets, self.device))
        self._run(self._inputs(batch.to(self.device)))
        return head.take()

    def filled(self, batch: Batch, read: int) -> tuple[Batch, Tensor]:
        """The batch as it runs when ``read`` of its positions are read, and the positions that are read beside them."""
        return fill(batch, read) if self.rounds and batch.cu_seqlens is not None else (batch, torch.arange(0))

    def _run(self, inputs: dict[str, Any]) -> Any:
        if "attention_mask" in inputs or not self.attachment.own_rules:
            return self.model(**inputs)
        with self.attachment.without_masks():
            return self.model(**inputs)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        if "use_cache" in self._takes:
            inputs["use_cache"] = False
        if batch.source is not None:
            ids = batch.input_ids.clone()
            # Where the target does not say what the decoder starts from (mBART's language code), the model does.
            start = decoder_start(self.model)
            if start is not None:
                placeholder = self.model.config.pad_token_id if self.placeholder is None else self.placeholder
                ids[:, 0] = ids[:, 0].masked_fill(ids[:, 0] == (placeholder or 0), start)
            source = batch.source
            return inputs | {
                "input_ids": source.input_ids,
                "attention_mask": source.attention_mask.long(),
                "decoder_input_ids": ids,
            }
        inputs["input_ids"] = batch.input_ids
        if "position_ids" in self._takes:
            inputs["position_ids"] = batch.position_ids + self.attachment.first_position
        if batch.token_type_ids is not None and "token_type_ids" in self._takes:
            inputs["token_type_ids"] = batch.token_type_ids
        if batch.cu_seqlens is not None:
            inputs |= {
                "cu_seq_lens_q": batch.cu_seqlens,
                "cu_seq_lens_k": batch.cu_seqlens,
                "max_length_q": batch.max_seqlen,
                "max_length_k": batch.max_seqlen,
            }
        elif self._sees_padding:  # behind a causal mask no useful token sees the padding on the right
            inputs["attention_mask"] = batch.attention_mask.long()
        return inputs
