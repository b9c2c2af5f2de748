"""The effects of a prompt on rows: the attention on it, and the loss without each of its virtual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptd.distributed.ranks import Ranks
from ptd.engine.evaluation import HeldOut, mean_loss
from ptd.inject import LayerShares, SharesOfPrompt, attending_only_to
from ptd.inspection.geometry import layer_names
from ptd.readouts import Reading, Run
from ptd.runs.tuned import Tuned
from ptd.types import Batch, Reporter

SETS = ("all", "supervised")
POINTS = 16
"""Maximum number of prompt sizes above 0 in the curve of the most useful tokens."""
ENOUGH = 0.95
"""Share of the whole prompt's gain in loss that counts as enough in `enough`."""


def effects_on(held_out: HeldOut, tuned: Tuned, ranks: Ranks, reporter: Reporter) -> dict[str, Any]:
    """Return the entries ``attention``, ``tokens``, ``loss``, ``keep`` and ``enough``. All ranks call this together.

    One pass over the rows records attention. One pass per virtual token and up to `POINTS` + 1 more measure losses
    (mean over supervised positions, in nats) while tokens are hidden from every layer; nothing else changes. ``tokens``
    are ranked by the increase of the loss when only that token is hidden. ``keep`` hides all tokens except the first k
    of this ranking.
    """
    state_size = _num_virtual_tokens(tuned)
    sizes = sizes_to_try(state_size)
    done, total = 0, 1 + state_size + len(sizes)
    reporter.start("inspect", total)

    def tick() -> None:
        nonlocal done
        done += 1
        reporter.advance("inspect", done)

    recorder = SharesOfPrompt(tuned.prepared.attachment)

    def recorded(run: Run, batch: Batch, scores: bool) -> Reading:
        with recorder.within(batch):
            reading: Reading = tuned.readout(run, batch, scores)
        return reading

    loss, supervised = mean_loss(held_out, tuned.prepared, recorded, ranks, Reporter())
    tick()

    def loss_with(kept: Sequence[int]) -> float:
        with attending_only_to(tuned.prepared.attachment, kept):
            found = mean_loss(held_out, tuned.prepared, tuned.readout, ranks, Reporter())[0]
        tick()
        return found

    everything = range(state_size)
    changes = [loss_with([other for other in everything if other != one]) - loss for one in everything]
    order = sorted(everything, key=lambda one: -changes[one])
    keep = [{"tokens": size, "loss": loss_with(order[:size])} for size in sizes]
    reporter.finish("inspect")

    layers = [_summed(recorder.layers[index], ranks) for index in sorted(recorder.layers)]
    shape = tuned.prepared.shape.layers
    drawn = [float(layer.mass[0].sum()) > 0 for layer in layers]
    mass = torch.stack([_mean(layer)[0].mean(0) for layer, seen in zip(layers, drawn, strict=True) if seen]).mean(0)
    return {
        "attention": [
            {"layer": name, "kind": kind.kind, **_layer(layer, seen)}
            for name, kind, layer, seen in zip(layer_names(shape), shape, layers, drawn, strict=True)
        ],
        "tokens": [
            {"token": one, "rank": order.index(one) + 1, "loss_change": changes[one], "attention": float(mass[one])}
            for one in everything
        ],
        "loss": {"whole": loss, "none": keep[0]["loss"], "supervised_tokens": supervised},
        "keep": keep,
        "enough": enough(keep),
    }


def sizes_to_try(num_virtual_tokens: int) -> list[int]:
    """Return 0 and up to `POINTS` prompt sizes from 1 to P, spaced geometrically if there are more sizes than that."""
    if num_virtual_tokens <= POINTS:
        return list(range(num_virtual_tokens + 1))
    spaced = np.geomspace(1, num_virtual_tokens, POINTS).round().astype(int)
    return [0, *sorted(set(spaced.tolist()))]


def enough(keep: Sequence[dict[str, Any]]) -> int | None:
    """Return the smallest size from which on all sizes keep `ENOUGH` of the gain in loss; None if there is no gain."""
    gain = keep[0]["loss"] - keep[-1]["loss"]
    if gain <= 0:
        return None
    found = keep[-1]["tokens"]
    for point in reversed(keep):
        if keep[0]["loss"] - point["loss"] < ENOUGH * gain:
            break
        found = point["tokens"]
    return int(found)


def _num_virtual_tokens(tuned: Tuned) -> int:
    assert tuned.adapter is not None
    return len(tuned.adapter.flat)


def _summed(layer: LayerShares, ranks: Ranks) -> LayerShares:
    return LayerShares(*(ranks.all_reduce(tensor) for tensor in layer.tensors()))


def _mean(layer: LayerShares) -> Tensor:
    """Return the probability of each virtual token, mean over queries: ``[2, Hq, P]``."""
    return layer.mass / layer.queries[:, None, None].clamp_min(1)


def _layer(layer: LayerShares, seen: bool) -> dict[str, Any]:
    shares = _mean(layer).sum(-1)
    own = (layer.norms / layer.keys.clamp_min(1)).tolist()
    heads = {
        name: shares[index].tolist() if seen and float(layer.queries[index]) else None
        for index, name in enumerate(SETS)
    }
    return {**heads, "own_norms": {"key": own[0], "value": own[1]}}
