"""The units of trained input embeddings, for all methods whose virtual tokens are part of the input.

The prompt ``[P, hidden]`` is trained in units of the backbone's own input embeddings (`ptd.types.Units`):
``E = E₀ + 2 · s · z``, where ``s`` is the root mean square of those embeddings.
"""

from __future__ import annotations

from torch import Tensor

from ptd.methods import Conditioner
from ptd.types import Units

MEASURED = 64
"""Number of text tokens from which the root mean square of the embeddings is measured."""
EMBEDDINGS = 2.0
"""The unit of a virtual token as a multiple of the embeddings' root mean square. A larger value improves text tasks and
degrades labelling tasks: benchmarks/README.md, "One learning rate"."""


def embeddings_of_rows(num_virtual_tokens: int, conditioner: Conditioner) -> Tensor:
    """Return embeddings of tokens of training rows, ``[S, hidden]``; the first P of them end with a whole row."""
    start = conditioner.rows(num_virtual_tokens)[0]
    return conditioner.embeddings(start + conditioner.rows(max(0, MEASURED - num_virtual_tokens))[0])


def units_of(rows: Tensor, origin: Tensor) -> Units:
    """Return units from ``origin`` ``[P, hidden]``, each `EMBEDDINGS` times the RMS of ``rows`` ``[S, hidden]``."""
    return Units(origin.clone(), EMBEDDINGS * rows.square().mean().sqrt().expand(rows.shape[1]))
