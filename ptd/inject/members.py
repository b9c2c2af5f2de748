"""Several prompts on one model: which of them the sequences of a pass read, and numbers that differ between sequences.

A pass gets only the prompts that its sequences read. If all sequences read the same one, the pass is that of a single
prompt, so a single prompt is the case N = 1 of the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptd.async_copy import to_device
from ptd.types import NO_MEMBER, PromptState, UserError


@dataclass(frozen=True)
class PassPrompts:
    """The prompts that the sequences of a pass read.

    ``states``: the prompts with virtual tokens, each once. ``index``: for each sequence, its prompt's place among them;
    ``len(states)``: it reads none. None: every sequence reads the only state, or no sequence reads any.
    """

    states: tuple[PromptState, ...]
    index: tuple[int, ...] | None = None

    @classmethod
    def of(cls, prompts: Sequence[PromptState], members: Sequence[int] | None) -> PassPrompts:
        """Choose from all ``prompts``. ``members``: each sequence's prompt, as in `Batch`; None: the only prompt."""
        if members is None:
            return cls(tuple(prompt for prompt in prompts if prompt.num_virtual_tokens))
        read = [m if m != NO_MEMBER and prompts[m].num_virtual_tokens else NO_MEMBER for m in members]
        distinct = sorted(set(read) - {NO_MEMBER})
        states = tuple(prompts[number] for number in distinct)
        if len(set(read)) == 1:
            return cls(states)
        place = {number: index for index, number in enumerate(distinct)}
        return cls(states, tuple(place.get(number, len(states)) for number in read))

    def sizes(self) -> PerSequence:
        """Return the number of virtual tokens that each sequence reads."""
        return self.per_sequence([state.num_virtual_tokens for state in self.states])

    def per_sequence(self, numbers: Sequence[int]) -> PerSequence:
        """Return each sequence's number, given one number for each of `states`; 0 for a sequence without a prompt."""
        if self.index is None:
            return PerSequence(numbers[0] if numbers else 0)
        every = [*numbers, 0]
        return PerSequence.each_of([every[place] for place in self.index])


@dataclass(frozen=True)
class PerSequence:
    """A number for every sequence of a pass: ``most`` for all of them; if they differ, ``each`` sequence's own."""

    most: int = 0
    each: tuple[int, ...] | None = None

    @classmethod
    def each_of(cls, numbers: Sequence[int]) -> PerSequence:
        most = max(numbers)
        return cls(most) if min(numbers) == most else cls(most, tuple(numbers))

    def total(self, sequences: int) -> int:
        return self.most * sequences if self.each is None else sum(self.each)

    def tensor(self, sequences: int, device: torch.device) -> Tensor:
        """Return the numbers as int64 ``[sequences]``."""
        if self.each is None:
            return torch.full((sequences,), self.most, device=device)
        return to_device(torch.tensor(self.each), device)

    def over_tokens(self, tokens: int, bounds: Tensor | None, device: torch.device) -> int | Tensor:
        """Return what each token takes from its sequence, in a form that broadcasts over ``[…, B, S]``.

        ``bounds``: those of a packed row of ``tokens`` tokens; None: each row is a sequence.
        """
        if self.each is None:
            return self.most
        numbers = self.tensor(len(self.each), device)
        if bounds is None:
            return numbers[:, None]
        return torch.repeat_interleave(numbers, bounds.diff(), output_size=tokens)[None]


class RowsOfPass:
    """Assigns the sequences of a pass to prompts, also if ``generate`` repeats each row (beams, several answers).

    Raises `UserError` if the rows are neither as many as the assigned ones nor repetitions of them.
    """

    def __init__(self) -> None:
        self._repeated: Tensor | None = None  # the tokens of the last pass with repeated rows

    def members(self, given: Sequence[int], sequences: int, tokens: Tensor, cache: Any) -> tuple[int, ...]:
        """Return each sequence's prompt. ``tokens`` ``[B, S]`` and ``cache`` are the pass's.

        They are read only if the number of rows differs: repeated rows begin with the same tokens, and a pass that
        continues a cache has the rows of the pass that filled it.
        """
        if sequences == len(given):
            return tuple(given)
        times, rest = divmod(sequences, max(1, len(given)))
        cached = not rest and times > 0 and cache is not None and bool(cache.get_seq_length() > 0)
        if rest or not times or not (cached or self._begins_repeated(tokens, times)):
            raise UserError(
                f"a batch has {sequences} sequences, but prompts are assigned to {len(given)}; name one prompt (or "
                "none) for each sequence"
            )
        return tuple(number for number in given for _ in range(times))

    def _begins_repeated(self, tokens: Tensor, times: int) -> bool:
        begun = self._repeated
        longer = begun is not None and begun.shape[0] == tokens.shape[0] and begun.shape[1] < tokens.shape[1]
        if begun is not None and longer and bool((tokens[:, : begun.shape[1]] == begun).all()):
            return True  # a later pass without a cache
        rows = tokens.unflatten(0, (-1, times))
        self._repeated = tokens
        return bool((rows == rows[:, :1]).all())
