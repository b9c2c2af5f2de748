"""The registry of tuning methods. A method is one file in this folder: its config, its encoder and ``@register``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ptd.types import BackboneShape, PromptEncoder, UserError


class Conditioner(Protocol):
    """What an initialiser may ask of the backbone: the keys and values it caches for a real text."""

    def text_kv(self, text: str, num_virtual_tokens: int) -> Tensor:
        """Flat ``[P, sum of layer numel]`` fp32 cache of the first P tokens, rotated at positions 0…P−1.

        Raises `UserError` if the text has fewer than P tokens.
        """
        ...


@dataclass(frozen=True)
class Method:
    """A registered method: how to read its config section and how to build its encoder."""

    name: str
    config: type
    construct: Callable[[Any, BackboneShape, Conditioner], PromptEncoder]

    def build(self, config: Any, shape: BackboneShape, conditioner: Conditioner, *, seed: int) -> PromptEncoder:
        """The freshly initialised encoder (fp32, on the CPU); the same on every rank that gives the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.construct(config, shape, conditioner)


_METHODS: dict[str, Method] = {}


def register(name: str, *, config: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ``construct(config, shape, conditioner) -> PromptEncoder`` under ``name``.

    ``config`` is a plain dataclass: its fields are the keys of the ``method:`` section beside ``name``.
    """

    def add(construct: Callable[..., Any]) -> Callable[..., Any]:
        _METHODS[name] = Method(name, config, construct)
        return construct

    return add


def methods() -> dict[str, Method]:
    """All methods of this folder by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(_METHODS)


def method(name: str) -> Method:
    """Look a method up; `UserError` names those that exist."""
    known = methods()
    if name not in known:
        raise UserError(f"method.name: there is no method {name!r}; available: {', '.join(sorted(known))}")
    return known[name]
