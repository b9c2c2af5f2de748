"""Insert a block of columns into the rows of a padded batch: where each column comes from, and the longer mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ptd.inject.members import PerSequence


def layout_of_block(first_B: Tensor, columns: int, count: int, between_B: Tensor) -> Tensor:
    """Return ``[B, P + S]``: for each column of a row, an index into the row's [block, own tokens], concatenated.

    Row b has ``columns`` own tokens. The first ``between_B[b]`` columns of its block of ``count`` columns come before
    its token ``first_B[b]``, the rest of the block at its end.
    """
    column = torch.arange(columns + count, device=first_B.device)
    behind, between = column - first_B[:, None], between_B[:, None]
    own = torch.where(behind < between, behind, column - between + count)
    own = torch.where(behind < 0, column + count, own)
    return torch.where(column >= columns + between, column - columns, own)


def interleaved(own: Tensor, virtual: Tensor, places: Tensor) -> Tensor:
    """Return ``own`` ``[…, B, S]`` and ``virtual`` ``[P]`` or ``[…, B, P]`` in the layout of `layout_of_block`."""
    both = torch.cat([virtual.to(own.dtype).expand(*own.shape[:-1], virtual.shape[-1]), own], dim=-1)
    return both.gather(-1, places.expand(*both.shape[:-2], *places.shape))


def first_tokens(mask: Tensor) -> Tensor:
    """Return the column of the first token of each row, ``[B]``."""
    return mask.bool().int().argmax(dim=1)


def mask_with_block(mask: Tensor, front: PerSequence, *, at_end: bool) -> Tensor:
    """Extend the mask ``[B, S]`` to ``[B, P + S]``, by each row's virtual tokens before its first token.

    A row with fewer virtual tokens than another has padding before them, or ``at_end`` of the row.
    """
    most, first_B = front.most, first_tokens(mask)
    between_B, block = torch.full_like(first_B, most), mask.new_ones(most)
    if front.each is not None:
        column, count_B = torch.arange(most, device=mask.device), front.tensor(len(mask), mask.device)
        between_B = count_B if at_end else between_B
        place = column - (between_B - count_B)[:, None]
        block = ((place >= 0) & (place < count_B[:, None])).to(mask.dtype)
    return interleaved(mask, block, layout_of_block(first_B, mask.shape[1], most, between_B))
