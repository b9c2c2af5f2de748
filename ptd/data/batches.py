"""Turn examples into micro-batches: choose the rows of each step, assign them to slots, and build the tensors.

A step has ``world_size x gradient_accumulation_steps`` slots; a slot is one micro-batch of one rank. The rows of a step
depend on the seed, the epoch and the number of slots only, so a run on 8 ranks and a run on 2 ranks with four times the
accumulation use the same rows at every step. No step depends on the steps before it: any step can be requested at any
time, so a resumed run needs only the number of its next step.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ptd.data.order import InOrder, LongestFirst, Order, Shuffled
from ptd.data.packing import balance, first_fit, first_fit_starts
from ptd.types import IGNORE_INDEX, Batch, Examples, UserError

ROWS_PLANNED = 2**16
"""Rows whose lengths are read at a time to divide an epoch into steps by their tokens."""


@dataclass(frozen=True)
class EpochPlan:
    """The rows of an epoch by step: step ``s`` begins at the place ``starts[s]`` of ``order``."""

    order: Order
    starts: range | np.ndarray

    @property
    def steps(self) -> int:
        return len(self.starts)

    def rows(self, step: int) -> np.ndarray:
        """Return the rows of a step of this epoch, int64."""
        last = step + 1 == self.steps
        return self.order.between(int(self.starts[step]), self.order.rows if last else int(self.starts[step + 1]))


class Batches:
    """Gives random access to a rank's micro-batches by global step.

    With ``packing``, the rows of a step are divided among its slots so that the token counts are balanced, and each
    slot is one packed row. Without it, each slot gets up to ``per_device_batch_size`` rows of similar length, padded on
    the right. With ``max_tokens`` (packing only), a step uses as many rows as fit its slots at ``max_tokens`` tokens
    per slot, and ``per_device_batch_size`` has no effect. Without ``shuffle``, an epoch has the rows in order, or, if
    they are padded, the longest first, so that few columns are padding.

    Raises `UserError` if a row does not fit ``max_tokens``, or if ``max_tokens`` is given without packing.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        rank: int,
        world_size: int,
        per_device_batch_size: int,
        gradient_accumulation_steps: int = 1,
        packing: bool = True,
        max_tokens: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        pad_token_id: int = 0,
    ) -> None:
        assert len(examples) > 0
        assert 0 <= rank < world_size
        assert min(per_device_batch_size, gradient_accumulation_steps) >= 1
        if max_tokens is not None:
            if not packing:
                raise UserError(
                    "max_tokens is the token budget of a packed micro-batch; set packing: true or remove it"
                )
            if examples.longest > max_tokens:
                raise UserError(
                    f"max_tokens is {max_tokens}, but the longest row has {examples.longest} tokens and a row is never "
                    "split; raise max_tokens or lower max_length"
                )
        self.examples = examples
        self.rank = rank
        self.world_size = world_size
        self.per_device_batch_size = per_device_batch_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.packing = packing
        self.max_tokens = max_tokens
        self.seed = seed
        self.shuffle = shuffle
        self.pad_token_id = pad_token_id
        self.slots = world_size * gradient_accumulation_steps
        # The prefetch thread and the training loop may request steps at the same time.
        self._lock = threading.RLock()
        self._plans: dict[int, EpochPlan] = {}
        self._epoch_ends: list[int] = []

    def steps_in_epoch(self, epoch: int) -> int:
        """Return the number of optimizer steps of the epoch; with ``max_tokens`` it may differ between epochs."""
        if self.max_tokens is None:
            return -(-len(self.examples) // (self.per_device_batch_size * self.slots))
        return self._end_of_epoch(epoch) - (self._end_of_epoch(epoch - 1) if epoch else 0)

    def total_steps(self, num_epochs: float) -> int:
        """Return the number of optimizer steps of ``num_epochs`` epochs (which may have a fraction); at least one."""
        whole = math.floor(num_epochs)
        steps = sum(self.steps_in_epoch(epoch) for epoch in range(whole))
        if num_epochs > whole:
            # 0.1 of 30 steps is 3 steps, even if a rounding error makes the product slightly larger.
            steps += math.ceil((num_epochs - whole) * self.steps_in_epoch(whole) - 1e-6)
        return max(steps, 1)

    def rows(self, global_step: int) -> list[int]:
        """Return the rows of the step over all ranks, in the epoch's order."""
        return [int(row) for row in self._rows(global_step)]

    def supervised_tokens(self, global_step: int) -> int:
        """Return the number of labels of the step over all ranks, the divisor of the sum of its losses."""
        return int(self.examples.summary.supervised[self._rows(global_step)].sum(dtype=np.int64))

    def step(self, global_step: int) -> list[Batch]:
        """Return this rank's micro-batches of the step: always ``gradient_accumulation_steps`` of them.

        A slot without rows gets a batch without labels, because all ranks of a sharded backbone have to run the same
        number of micro-batches.
        """
        return self.of(self._rows(global_step))

    def of(self, rows: np.ndarray) -> list[Batch]:
        """Return this rank's micro-batches of a step that uses ``rows``."""
        slots = self._pack(rows) if self.packing else self._chunk(rows)
        # Slots are sorted, largest first, so all ranks have nearly the same work in each micro-batch.
        mine = slots[self.rank :: self.world_size]
        return [self._make(slot) if len(slot) else self._filler(rows) for slot in mine]

    def _rows(self, global_step: int) -> np.ndarray:
        assert global_step >= 0
        if self.max_tokens is None:
            epoch, step = divmod(global_step, self.steps_in_epoch(0))
        else:
            epoch = 0
            while global_step >= self._end_of_epoch(epoch):
                epoch += 1
            step = global_step - (self._end_of_epoch(epoch - 1) if epoch else 0)
        with self._lock:
            return self._plan(epoch).rows(step)

    def _end_of_epoch(self, epoch: int) -> int:
        with self._lock:
            while len(self._epoch_ends) <= epoch:
                last = self._epoch_ends[-1] if self._epoch_ends else 0
                self._epoch_ends.append(last + self._plan(len(self._epoch_ends)).steps)
            return self._epoch_ends[epoch]

    def _plan(self, epoch: int) -> EpochPlan:
        with self._lock:
            if epoch not in self._plans:
                # Keep two plans: at the end of an epoch the prefetch thread is already in the next epoch.
                self._plans = {key: self._plans[key] for key in list(self._plans)[-1:]}
                order = self._order(epoch)
                starts: range | np.ndarray = range(0, order.rows, self.per_device_batch_size * self.slots)
                if self.max_tokens is not None:
                    blocks = (
                        self.examples.lengths(order.between(first, min(first + ROWS_PLANNED, order.rows)))
                        for first in range(0, order.rows, ROWS_PLANNED)
                    )
                    starts = first_fit_starts(blocks, self.slots, self.max_tokens)
                self._plans[epoch] = EpochPlan(order, starts)
            return self._plans[epoch]

    def _order(self, epoch: int) -> Order:
        rows = len(self.examples)
        if self.shuffle:
            return Shuffled(rows, self.seed, epoch)
        return InOrder(rows) if self.packing else LongestFirst(self.examples.lengths(np.arange(rows)))

    def _pack(self, rows: np.ndarray) -> list[np.ndarray]:
        lengths = self.examples.lengths(rows)
        slots, loads = balance(lengths, self.slots)
        if self.max_tokens is not None and loads.max() > self.max_tokens:
            # Balancing may exceed max_tokens in a slot, whereas first fit, which planned the step, does not.
            slots, loads = first_fit(lengths, self.slots, self.max_tokens)
        return [rows[slots[index]] for index in np.argsort(-loads, kind="stable")]

    def _chunk(self, rows: np.ndarray) -> list[np.ndarray]:
        longest_first = rows[np.argsort(-self.examples.lengths(rows), kind="stable")]
        return np.array_split(longest_first, self.slots)

    def _make(self, rows: np.ndarray) -> Batch:
        return (
            packed_batch(self.examples, rows) if self.packing else padded_batch(self.examples, rows, self.pad_token_id)
        )

    def _filler(self, rows: np.ndarray) -> Batch:
        """Return a batch with the step's first row and without labels."""
        whole = self._make(rows[:1])
        nothing = torch.full_like(whole.labels, IGNORE_INDEX)
        return replace(whole, labels=nothing, rows=(), tokens=0, supervised_tokens=0)


def packed_batch(examples: Examples, rows: np.ndarray) -> Batch:
    """Return the sequences of ``rows``, concatenated: ``[1, N]``."""
    assert examples.source is None, "an encoder-decoder runs padded batches"
    sequences = _sequences(examples, rows)
    lengths = examples.offsets[sequences + 1] - examples.offsets[sequences]
    ends = np.cumsum(lengths)
    begins = ends - lengths
    position = np.arange(int(ends[-1]))
    source = position + np.repeat(examples.offsets[sequences] - begins, lengths)
    return _batch(
        examples,
        rows,
        lengths,
        ids=examples.tokens[source][None],
        labels=examples.labels[source][None],
        positions=(position - np.repeat(begins, lengths))[None],
        types=None if examples.token_types is None else examples.token_types[source][None],
        cu_seqlens=torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)),
    )


def padded_batch(examples: Examples, rows: np.ndarray, pad_token_id: int = 0) -> Batch:
    """Return the sequences of ``rows``, padded on the right: ``[B, S]``.

    ``position_ids`` continue through the padding; under a causal mask no real token attends to it.
    """
    sequences = _sequences(examples, rows)
    lengths = examples.offsets[sequences + 1] - examples.offsets[sequences]
    column = np.arange(int(lengths.max()))
    useful = column < lengths[:, None]
    source = np.where(useful, examples.offsets[sequences][:, None] + column, 0)
    return _batch(
        examples,
        rows,
        lengths,
        ids=np.where(useful, examples.tokens[source], pad_token_id),
        labels=np.where(useful, examples.labels[source], IGNORE_INDEX),
        positions=np.tile(column, (len(sequences), 1)),
        types=None if examples.token_types is None else np.where(useful, examples.token_types[source], 0),
        source=None if examples.source is None else padded_batch(examples.source, rows, pad_token_id),
    )


def join_batches(batches: Sequence[Batch], members: Sequence[int]) -> Batch:
    """Return one batch with the sequences of all ``batches``, in order; ``members[i]`` is the prompt of ``batches[i]``.

    All batches are packed, or all are padded. Padded ones get the width of the widest. The joined batch has no
    ``rows``, because the rows of different batches may belong to different data.
    """
    sources = [batch.source for batch in batches if batch.source is not None]
    assert len(sources) in (0, len(batches))
    packed = batches[0].cu_seqlens is not None
    assert all((batch.cu_seqlens is not None) == packed for batch in batches)
    bounds = None
    if packed:
        lengths = torch.cat([batch.lengths for batch in batches])
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    types = [batch.token_type_ids for batch in batches if batch.token_type_ids is not None]
    return Batch(
        input_ids=_side_by_side([batch.input_ids for batch in batches], packed, 0),
        labels=_side_by_side([batch.labels for batch in batches], packed, IGNORE_INDEX),
        position_ids=_side_by_side([batch.position_ids for batch in batches], packed, 0),
        cu_seqlens=bounds,
        max_seqlen=max(batch.max_seqlen for batch in batches),
        tokens=sum(batch.tokens for batch in batches),
        supervised_tokens=sum(batch.supervised_tokens for batch in batches),
        lengths=torch.cat([batch.lengths for batch in batches]),
        group=batches[0].group,
        token_type_ids=_side_by_side(types, packed, 0) if types else None,
        source=join_batches(sources, members) if sources else None,
        members=tuple(member for batch, member in zip(batches, members, strict=True) for _ in batch.lengths),
    )


def _side_by_side(tensors: list[Tensor], packed: bool, fill: int) -> Tensor:
    """Concatenate packed rows ``[1, N]`` to one row, or padded rows ``[B, S]`` to more rows."""
    if packed:
        return torch.cat(tensors, dim=1)
    widest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([pad(tensor, (0, widest - tensor.shape[1]), value=fill) for tensor in tensors])


def _sequences(examples: Examples, rows: np.ndarray) -> np.ndarray:
    return (rows[:, None] * examples.group + np.arange(examples.group)).reshape(-1)


def _batch(
    examples: Examples,
    rows: np.ndarray,
    lengths: np.ndarray,
    *,
    ids: np.ndarray,
    labels: np.ndarray,
    positions: np.ndarray,
    types: np.ndarray | None,
    cu_seqlens: Tensor | None = None,
    source: Batch | None = None,
) -> Batch:
    assert lengths.min() > 0, "every sequence has at least one token"
    return Batch(
        input_ids=torch.from_numpy(ids.astype(np.int64)),
        labels=torch.from_numpy(labels.astype(np.int64)),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=cu_seqlens,
        max_seqlen=int(lengths.max()),
        tokens=int(lengths.sum()) + (0 if source is None else source.tokens),
        supervised_tokens=int((labels != IGNORE_INDEX).sum()),
        lengths=torch.from_numpy(lengths),
        rows=tuple(rows.tolist()),
        group=examples.group,
        token_type_ids=None if types is None else torch.from_numpy(types.astype(np.int64)),
        source=source,
        members=None if examples.members is None else tuple(examples.members[rows].repeat(examples.group).tolist()),
    )
