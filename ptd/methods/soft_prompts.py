"""Trained input embeddings: what the methods that put virtual tokens among the words have in common, their units.

The prompt ``[P, hidden]`` is trained in units of the embeddings that the backbone itself reads (`ptd.types.Units`):
``E = E₀ + 2 · s · z`` with ``s`` their root mean square.
"""

from __future__ import annotations

from torch import Tensor

from ptd.methods import Conditioner
from ptd.types import Units

MEASURED = 64
"""Tokens of text from which the size of embeddings is measured."""
EMBEDDINGS = 2.0
"""How many times the root mean square of the embeddings the unit of a virtual token is. Text tasks gain from more,
labels lose by it: benchmarks/README.md, "One learning rate"."""


def embeddings_of_rows(num_virtual_tokens: int, conditioner: Conditioner) -> Tensor:
    """Embeddings of the tokens of training rows: ``[S, hidden]``; a whole row ends the first P of them."""
    start = conditioner.rows(num_virtual_tokens)[0]
    return conditioner.embeddings(start + conditioner.rows(max(0, MEASURED - num_virtual_tokens))[0])


def units_of(rows: Tensor, origin: Tensor) -> Units:
    """A start at ``origin`` ``[P, hidden]``, in `EMBEDDINGS` times the root mean square of ``rows`` ``[S, hidden]``."""
    return Units(origin.clone(), EMBEDDINGS * rows.square().mean().sqrt().expand(rows.shape[1]))
