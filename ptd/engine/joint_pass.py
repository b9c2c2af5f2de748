"""Run the batches of several prompts in one forward pass of the backbone.

The backbone is frozen and the same for all prompts, so sequences with different prompts may share a pass. Every readout
gets the output that it asked for at the positions of its own batch, and computes its own loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptd.data.batches import join_batches
from ptd.readouts import Ask, Reading, Readout, Run
from ptd.types import Batch


@dataclass(frozen=True)
class JointPart:
    """A batch of the prompt number ``member``, and its readout."""

    readout: Readout
    batch: Batch
    member: int


def read_jointly(run: Run, parts: Sequence[JointPart], scores: bool = False) -> list[Reading]:
    """Return the reading of each part, from a single forward pass; ``scores`` as for `Readout.reading`.

    All batches are packed, or all are padded. All readouts ask for the same kind of output: all for cross-entropies, or
    all for the backbone's own output.
    """
    if len(parts) == 1:
        return [parts[0].readout(run, parts[0].batch, scores)]
    asks = [part.readout.ask(part.batch) for part in parts]
    whole = join_batches([part.batch for part in parts], [part.member for part in parts])
    output = run(whole, _joined(asks, [part.batch for part in parts], whole))
    pieces = output.split([len(ask.positions) for ask in asks])
    return [part.readout.reading(piece, part.batch, scores) for part, piece in zip(parts, pieces, strict=True)]


def _joined(asks: Sequence[Ask], batches: Sequence[Batch], whole: Batch) -> Ask:
    """Return one `Ask` for the joined batch, with the asks one after the other."""
    positions, first = [], 0
    for ask, batch in zip(asks, batches, strict=True):
        if whole.cu_seqlens is not None:
            positions.append(ask.positions + first)
            first += batch.input_ids.numel()
        else:
            rows, columns = batch.input_ids.shape
            positions.append((ask.positions // columns + first) * whole.input_ids.shape[1] + ask.positions % columns)
            first += rows
    targets = [ask.targets for ask in asks if ask.targets is not None]
    assert len(targets) in (0, len(asks)), "the readouts ask for different kinds of output"
    return Ask(torch.cat(positions), _cat(targets))


def _cat(tensors: list[Tensor]) -> Tensor | None:
    return torch.cat(tensors) if tensors else None
