"""Batches with rows of several parts, each part with its own prompt and readout: one forward pass, several readings.

A readout sees only the rows of its part, as a batch of their own, and the outputs at the positions that it reads. So
every readout works in a mixed batch as it does alone, and each part has its own loss and scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ptd.data.batches import packed_batch, padded_batch
from ptd.readouts import Reading, Run
from ptd.types import NO_MEMBER, Batch, DataReport, Examples, UserError

Reads = Callable[[Run, Batch, bool], Reading]
"""A readout, or a function that wraps a readout."""


def joined_examples(parts: Sequence[Examples], members: Sequence[int | None]) -> Examples:
    """Return the rows of all parts, one part after the other; ``members``: the prompt that each part's rows read.

    Raises `UserError` if the rows of two parts cannot share a batch.
    """
    groups = sorted({part.group for part in parts})
    if len(groups) > 1:
        raise UserError(
            f"the adapters read each row {groups[0]} and {groups[-1]} times (task.patterns), so their rows cannot "
            "share batches; use adapters with different numbers of patterns one by one"
        )
    sizes = [len(part.tokens) for part in parts]
    begins = [0, *accumulate(sizes)]
    typed = any(part.token_types is not None for part in parts)
    types = [
        np.zeros(len(part.tokens), dtype=np.int8) if part.token_types is None else part.token_types for part in parts
    ]
    sources = [part.source for part in parts if part.source is not None]
    numbers = [NO_MEMBER if member is None else member for member in members]
    return Examples(
        tokens=np.concatenate([part.tokens for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        offsets=np.concatenate([[0], *(part.offsets[1:] + begin for part, begin in zip(parts, begins, strict=False))]),
        report=sum((part.report for part in parts), DataReport(0, 0, 0)),
        group=groups[0],
        token_types=np.concatenate(types) if typed else None,
        source=joined_examples(sources, members) if sources else None,
        members=np.repeat(numbers, [len(part) for part in parts]),
    )


class _Asked(Exception):
    """Raised by the first run of a readout: the positions that it reads."""

    def __init__(self, positions: Tensor | None) -> None:
        self.positions = positions


class MixedReads:
    """Reads each batch with the readouts of the parts whose rows it has.

    ``parts``: the parts' examples, whose rows are numbered consecutively; ``packed`` and ``pad``: how batches are laid
    out.
    """

    def __init__(self, parts: Sequence[Examples], readouts: Sequence[Reads], *, packed: bool, pad: int) -> None:
        self.parts, self.readouts, self.packed, self.pad = parts, readouts, packed, pad
        self.first_rows = np.cumsum([0, *map(len, parts)])

    def __call__(self, run: Run, batch: Batch, scores: bool) -> Iterator[tuple[int, Batch, tuple[int, ...], Reading]]:
        """Run the batch once; yield each part in it: its place, its own batch, its rows' numbers, its reading."""
        owners = np.searchsorted(self.first_rows, batch.rows, side="right") - 1
        places = np.unique(owners).tolist()
        if len(places) < 2:  # a batch without rows belongs to any part
            place = places[0] if places else 0
            yield place, batch, batch.rows, self.readouts[place](run, batch, scores)
            return
        own = {place: self._own(place, np.array(batch.rows)[owners == place]) for place in places}
        asked = {place: self._asked(place, own[place], scores) for place in places}
        sequences = np.repeat(owners, batch.group)
        wanted = [_among(batch, own[place], np.flatnonzero(sequences == place), asked[place]) for place in places]
        outputs = run(batch, torch.cat(wanted)).split([len(each) for each in wanted])
        for place, output in zip(places, outputs, strict=True):
            rows = tuple(np.array(batch.rows)[owners == place].tolist())
            yield place, own[place], rows, self.readouts[place](lambda *_, given=output: given, own[place], scores)

    def _own(self, place: int, rows: np.ndarray) -> Batch:
        local = rows - self.first_rows[place]
        examples = self.parts[place]
        return packed_batch(examples, local) if self.packed else padded_batch(examples, local, self.pad)

    def _asked(self, place: int, own: Batch, scores: bool) -> Tensor:
        """Return the positions that the part's readout reads in its own batch."""

        def ask(batch: Batch, positions: Tensor | None) -> Tensor:
            raise _Asked(positions)

        try:
            self.readouts[place](ask, own, scores)
        except _Asked as found:
            return torch.arange(own.input_ids.numel()) if found.positions is None else found.positions
        raise AssertionError("a readout runs its batch")


def _among(batch: Batch, own: Batch, sequences: np.ndarray, positions: Tensor) -> Tensor:
    """Return where ``positions`` of ``own``, whose sequences are these of ``batch``, are in ``batch``."""
    sequence = torch.searchsorted(own.starts, positions, right=True) - 1
    return batch.starts[torch.from_numpy(sequences)][sequence] + positions - own.starts[sequence]
