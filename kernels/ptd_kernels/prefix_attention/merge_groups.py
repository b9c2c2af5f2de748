"""Which query rows read which prefix: fold the batch into the query axis, take the rows of a prefix, put them back.

Legend of shapes: problem.py; N = B * S folded query rows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.problem import Problem


def fold(x_BHSX: Tensor) -> Tensor:
    """Fold the batch into the query axis: ``[1, H, B*S, X]``, a view if the memory layout is [B, S, H, X]."""
    if x_BHSX.shape[0] == 1:
        return x_BHSX
    return x_BHSX.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def unfold(x_1HNX: Tensor, batch: int) -> Tensor:
    if batch == 1:
        return x_1HNX
    _, H, N, X = x_1HNX.shape
    return x_1HNX[0].transpose(0, 1).reshape(batch, N // batch, H, X).transpose(1, 2)


class Group(NamedTuple):
    """A prefix and its readers: the range of its keys, and the ranges of folded query rows that read it, ascending."""

    first_key: int
    last_key: int
    rows: list[tuple[int, int]]


def take_rows(x_1HNX: Tensor, rows: list[tuple[int, int]]) -> Tensor:
    """Return these rows; a view if they are consecutive."""
    if len(rows) == 1:
        return x_1HNX[:, :, rows[0][0] : rows[0][1]]
    return torch.cat([x_1HNX[:, :, a:b].transpose(1, 2) for a, b in rows], dim=1).transpose(1, 2)


def place_rows(parts: list[Tensor], groups: list[Group], length: int, fill: float) -> Tensor:
    """Undo `take_rows` for all groups: return ``[1, H, length, X]``, with `fill` in the rows of no group."""
    if len(groups) == 1 and groups[0].rows == [(0, length)]:
        return parts[0]
    _, H, _, X = parts[0].shape
    placed = parts[0].new_full((1, length, H, X), fill).transpose(1, 2)
    for part, group in zip(parts, groups, strict=True):
        put_rows(placed, group.rows, part)
    return placed


def put_rows(x_1HNX: Tensor, rows: list[tuple[int, int]], part: Tensor) -> None:
    """Write `part` into these rows, which `take_rows` took."""
    pieces = part.split_with_sizes([b - a for a, b in rows], dim=2)
    for (a, b), piece in zip(rows, pieces, strict=True):
        x_1HNX[:, :, a:b] = piece


def groups_of(problem: Problem) -> list[Group]:
    """Return the prefixes that have keys and readers. Waits for the GPU if `prefix_index` (or cu_seqlens) is on it."""
    p = problem
    if p.prefix_k_HPD is None:
        return []
    B, _, S, _ = p.q_BHSD.shape
    if p.prefix_index is None or p.prefix_bounds is None:
        keys = p.prefix_k_HPD.shape[1]
        return [Group(0, keys, [(0, B * S)])] if keys else []
    bounds = [i * S for i in range(B + 1)]
    if p.cu_seqlens is not None:
        bounds = list(p.offsets or p.cu_seqlens.tolist())
    groups = [Group(first, last, []) for first, last in pairwise(p.prefix_bounds)]
    for prefix, (first, last) in zip(p.prefix_index.tolist(), pairwise(bounds), strict=True):
        rows = groups[prefix].rows
        if rows and rows[-1][1] == first:
            rows[-1] = (rows[-1][0], last)
        elif first < last:
            rows.append((first, last))
    return [group for group in groups if group.rows and group.first_key < group.last_key]
