"""Batches with rows of several parts, each part with its own prompt and readout: one forward pass, several readings.

A readout sees only the rows of its part, as a batch of their own, and the outputs at the positions that it reads. So
every readout works in a mixed batch as it does alone, and each part has its own loss and scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import numpy as np

from ptd.data.batches import packed_batch, padded_batch
from ptd.engine.joint_pass import JointPart, read_jointly
from ptd.readouts import Reading, Readout, Run
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


class MixedReads:
    """Reads each batch with the readouts of the parts whose rows it has.

    ``parts``: the parts' examples, whose rows are numbered consecutively; ``members``: the prompt that each part reads;
    ``packed`` and ``pad``: how batches are laid out.
    """

    def __init__(
        self,
        parts: Sequence[Examples],
        readouts: Sequence[Reads],
        members: Sequence[int | None],
        *,
        packed: bool,
        pad: int,
    ) -> None:
        self.parts, self.readouts, self.packed, self.pad = parts, readouts, packed, pad
        self.members = [NO_MEMBER if member is None else member for member in members]
        self.first_rows = np.cumsum([0, *map(len, parts)])

    def __call__(self, run: Run, batch: Batch, scores: bool) -> Iterator[tuple[int, Batch, tuple[int, ...], Reading]]:
        """Run the batch once; yield each part in it: its place, its own batch, its rows' numbers, its reading.

        A readout that reads rows next to those of other parts has to be a `Readout`.
        """
        owners = np.searchsorted(self.first_rows, batch.rows, side="right") - 1
        places = np.unique(owners).tolist()
        if len(places) < 2:  # a batch without rows belongs to any part
            place = places[0] if places else 0
            yield place, batch, batch.rows, self.readouts[place](run, batch, scores)
            return
        rows = {place: np.array(batch.rows)[owners == place] for place in places}
        joint = [
            JointPart(self._readout(place), self._own(place, rows[place]), self.members[place]) for place in places
        ]
        for place, part, reading in zip(places, joint, read_jointly(run, joint, scores), strict=True):
            yield place, part.batch, tuple(rows[place].tolist()), reading

    def _readout(self, place: int) -> Readout:
        found = self.readouts[place]
        assert isinstance(found, Readout)
        return found

    def _own(self, place: int, rows: np.ndarray) -> Batch:
        local = rows - self.first_rows[place]
        examples = self.parts[place]
        return packed_batch(examples, local) if self.packed else padded_batch(examples, local, self.pad)
