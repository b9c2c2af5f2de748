"""ptd's side of the family sheet, as in a run: an attachment, batches of several rows, and training's forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptd.data.batches import packed_batch, padded_batch
from ptd.engine.forward import Forward
from ptd.engine.setup import check_context
from ptd.inject import Attachment
from ptd.readouts import Ask
from ptd.types import IGNORE_INDEX, Batch, DataReport, Examples, PrefixKV, SoftTokens
from sheet.cases import NEW_TOKENS, Rows, Written, generated, loss_of, targets
from sheet.configs import PAD

CPU = torch.device("cpu")
MAKE = {"packed": packed_batch, "padded": padded_batch}


class Attached:
    """A model with an attachment, which runs rows."""

    def __init__(self, model: PreTrainedModel, language_model: bool) -> None:
        self.model, self.language_model = model, language_model
        self.attachment = Attachment(model)
        self.run = Forward(self.attachment, CPU)

    def give(self, prompt: dict[str, Any], *, in_front: bool = True) -> None:
        """Set the prompt: ``prefix`` (keys and values per layer) or ``soft`` (embeddings, before rows or at marks)."""
        if "prefix" in prompt:
            keys, values = zip(*prompt["prefix"], strict=True)
            self.attachment.set(PrefixKV(tuple(keys), tuple(values)))
        elif "soft" in prompt:
            self.attachment.set(SoftTokens(prompt["soft"], in_front))
        else:
            self.attachment.set(None)

    def outputs(self, rows: Rows, layout: str) -> list[Tensor]:
        """Return the outputs at each row's own tokens, ``[S, width]``."""
        self._check(rows)
        batch = make_batch(rows, layout)
        with torch.no_grad():
            whole = self.run(batch)
        return [whole[start : start + length] for start, length in zip(batch.starts, batch.lengths, strict=True)]

    def generated(self, rows: Rows, order: list[int], eos: int | None) -> list[Written]:
        """Generate as `ptd.runs.generation` does: only rows of one length together if padding on the left is wrong."""
        self._check(rows, NEW_TOKENS)
        batches = [order] if self.attachment.verdict.left is None else [[row] for row in order]
        inputs = self.attachment.generation_inputs
        return [written for batch in batches for written in generated(self.model, rows, batch, eos, inputs)]

    def _check(self, rows: Rows, more: int = 0) -> None:
        """Check that rows and prompt fit into the context, as a run does before it begins."""
        longest = max(map(len, rows.ids)) + more
        check_context(self.attachment.shape.context, self.attachment.extra_positions, longest)

    def loss(self, rows: Rows, layout: str) -> Tensor:
        """Return the sum of `loss_of` over all rows, computed as training computes it."""
        batch = make_batch(rows, layout)
        places = [
            start + torch.arange(1, int(length)) for start, length in zip(batch.starts, batch.lengths, strict=True)
        ]
        positions = torch.cat(places)
        if self.language_model:
            wanted = torch.cat([targets(row, len(place)) for row, place in enumerate(places)])
            return self.run(batch, Ask(positions, wanted)).sum()
        read = self.run(batch, Ask(positions)).split([len(place) for place in places])
        return sum((loss_of(row, torch.cat([part[:1], part]), False) for row, part in enumerate(read)), torch.zeros(()))


def make_batch(rows: Rows, layout: str) -> Batch:
    source = None if rows.sources is None else _examples(rows.sources, None)
    ids = [row.clone() for row in rows.ids]
    if source is not None:  # the placeholder that `ptd.tasks.seq2seq_lm` writes for the decoder's start token
        for row in ids:
            row[0] = PAD
    options = {} if layout == "packed" else {"pad_token_id": PAD}
    return MAKE[layout](_examples(ids, source), np.arange(len(ids)), **options)


def _examples(rows: list[Tensor], source: Examples | None) -> Examples:
    tokens = torch.cat(rows).numpy().astype(np.int32)
    offsets = np.concatenate(([0], np.cumsum([len(row) for row in rows])))
    report = DataReport(len(rows), len(tokens), 0)
    return Examples(tokens, np.full_like(tokens, IGNORE_INDEX), offsets, report, source=source)
