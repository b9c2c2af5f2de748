"""Run a model with only its first layers, as many as include every kind of layer, and without its head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ptd.inject.attention import Call


@dataclass(frozen=True)
class Spared:
    """A module that the checks replace by a cheaper module."""

    parent: nn.Module
    name: str
    instead: nn.Module


def spared_modules(model: PreTrainedModel, calls: list[Call], head: nn.Module | None) -> list[Spared]:
    """Return the head and the lists of layers that the checks replace.

    Each outermost list of layers with attention is cut to its first layers, as many as include every kind of layer, and
    at least two. Where no attention calls are known, this is each list of layers that transformers can checkpoint.
    """
    call_of = {call.module: call for call in calls}
    found: list[Spared] = []
    inside: set[nn.Module] = set()
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is head:
                found.append(Spared(parent, name, nn.Identity()))
            if not isinstance(child, nn.ModuleList) or child in inside:
                continue
            kinds = [_kind(layer, call_of) for layer in child]
            layers = [
                bool(attends) if calls else isinstance(layer, GradientCheckpointingLayer)
                for layer, (_, attends) in zip(child, kinds, strict=True)
            ]
            if not kinds or not all(layers):
                continue
            inside |= set(child.modules())
            enough = max(2, 1 + max(kinds.index(kind) for kind in kinds))
            if enough < len(child):
                found.append(Spared(parent, name, nn.ModuleList(list(child)[:enough])))
    return found


def _kind(layer: nn.Module, call_of: dict[nn.Module, Call]) -> tuple[Any, tuple[Any, ...]]:
    """Return the types of a layer's modules, and the rules and sizes of its attention calls."""
    modules = list(layer.modules())
    attends = [call_of[module] for module in modules if module in call_of]
    rules = tuple((call.causal, call.window, call.kv_heads, call.key_dim, call.value_dim) for call in attends)
    return tuple(type(module) for module in modules), rules


@contextmanager
def shorter(spared: list[Spared]) -> Iterator[None]:
    """Run the model with the cheaper modules."""
    whole = [getattr(each.parent, each.name) for each in spared]
    try:
        for each in spared:
            setattr(each.parent, each.name, each.instead)
        yield
    finally:
        for each, module in zip(spared, whole, strict=True):
            setattr(each.parent, each.name, module)
