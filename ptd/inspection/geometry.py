"""The prompt itself, without rows: norms and ranks of its tensors, and the vocabulary tokens nearest to them."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from ptd.engine.setup import Prepared
from ptd.types import LayerShape, PrefixKV, PromptState, SoftTokens

CHUNK = 8192
"""Vocabulary tokens compared at a time."""
NEAREST = 3
ENERGY = 0.9
"""Share of the squared singular values that `rank_90` keeps."""


def layer_names(layers: tuple[LayerShape, ...]) -> list[str]:
    """Return names such as ``layer 3``; in an encoder-decoder the kind of attention replaces "layer": ``cross 3``."""
    several, seen, names = len({layer.kind for layer in layers}) > 1, Counter[str](), []
    for layer in layers:
        names.append(f"{layer.kind if several else 'layer'} {seen[layer.kind]}")
        seen[layer.kind] += 1
    return names


@singledispatch
def describe_tensors(state: PromptState, layers: tuple[LayerShape, ...]) -> list[dict[str, Any]]:
    """Return an entry per tensor of the prompt: ``layer``, ``part`` and the numbers of `_describe`."""
    raise TypeError(f"a prompt of type {type(state).__name__} is not supported")


@describe_tensors.register
def _(state: PrefixKV, layers: tuple[LayerShape, ...]) -> list[dict[str, Any]]:
    return [
        {"layer": name, "part": part, **_describe(tensor)}
        for name, key, value in zip(layer_names(layers), state.keys, state.values, strict=True)
        for part, tensor in (("key", key), ("value", value))
    ]


@describe_tensors.register
def _(state: SoftTokens, layers: tuple[LayerShape, ...]) -> list[dict[str, Any]]:
    return [{"layer": "input", "part": "embedding", **_describe(state.embeddings[:, None])}]


def _describe(tensor_PHD: Tensor) -> dict[str, Any]:
    """Return norm and ranks of a tensor ``[P, H, D]``; an embedding has one head.

    ``norm`` is the Euclidean norm of a head's vector, mean over tokens and heads. The other numbers describe the matrix
    ``[P, H·D]`` with singular values s: ``effective_rank`` = exp(entropy of s / Σs), from 1 to P (Roy & Vetterli 2007,
    EUSIPCO, definition 1); ``rank_90`` is how many of the largest singular values hold 90 % of Σs²; ``energy`` is the
    share of Σs² that the largest 1, 2, … hold.
    """
    matrix = tensor_PHD.detach().double().cpu()
    singular = torch.linalg.svdvals(matrix.flatten(1))
    share = singular / singular.sum().clamp_min(torch.finfo(torch.double).tiny)
    squares = singular.square()
    energy = squares.cumsum(0) / squares.sum().clamp_min(torch.finfo(torch.double).tiny)
    return {
        "norm": float(matrix.norm(dim=-1).mean()),
        "effective_rank": float(torch.exp(torch.special.entr(share).sum())),
        "rank_90": int((energy < ENERGY - 1e-12).sum()) + 1,
        "energy": energy.tolist(),
    }


@singledispatch
def nearest_tokens(state: PromptState, prepared: Prepared, tokenizer: Any) -> list[dict[str, Any]]:
    """Return for each virtual token the vocabulary tokens nearest by cosine: ``token``, ``norm`` and ``near``."""
    raise TypeError(f"a prompt of type {type(state).__name__} has no input embeddings")


@nearest_tokens.register
@torch.no_grad()
def _(state: SoftTokens, prepared: Prepared, tokenizer: Any) -> list[dict[str, Any]]:
    module = prepared.attachment.stacks[0].embeddings
    gathered: Any = nullcontext()
    if prepared.sharded:
        from ptd.distributed.zero3 import gathered_parameter  # importing deepspeed takes seconds

        gathered = gathered_parameter(module.weight)
    prompt = state.embeddings.detach().float().to(prepared.model.device)
    unit, norms = torch.nn.functional.normalize(prompt, dim=-1), prompt.norm(dim=-1).tolist()
    best: list[tuple[Tensor, Tensor]] = []
    known = min(len(tokenizer), module.num_embeddings)  # further rows are padding of the matrix
    with gathered:
        for begin in range(0, known, CHUNK):
            ids = torch.arange(begin, min(begin + CHUNK, known), device=prompt.device)
            rows = module.forward(ids).float()  # not a call: the module's hooks are for the model's own passes
            cosines = unit @ torch.nn.functional.normalize(rows, dim=-1).T
            top = cosines.topk(min(NEAREST, len(ids)), dim=-1)
            best.append((top.values, ids[top.indices]))
    values, ids = (torch.cat(parts, dim=-1) for parts in zip(*best, strict=True))
    values, order = values.sort(dim=-1, descending=True)
    ids = ids.gather(-1, order)
    return [
        {
            "token": number,
            "norm": norm,
            "near": [
                {"token": tokenizer.decode([token]), "id": token, "cosine": cosine}
                for token, cosine in zip(ids[number, :NEAREST].tolist(), values[number, :NEAREST].tolist(), strict=True)
            ],
        }
        for number, norm in enumerate(norms)
    ]
