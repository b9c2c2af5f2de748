"""The registry of tuning methods. A method is one file in this folder: its config, its encoder and ``@register``."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ptd.types import BackboneShape, EmptyLayout, HeadSettings, PromptEncoder, UserError


class Conditioner(Protocol):
    """What an initialiser may ask of the backbone: what it makes of real text (`ptd.backbone.TextConditioner`)."""

    def rows(self, count: int) -> list[list[int]]:
        """``count`` tokens of training rows, drawn at random; whole rows end them. A list for each of the stacks."""
        ...

    def chunks(self, count: int) -> list[list[int]]:
        """As `rows`, of short pieces from random places in them."""
        ...

    def frequent(self, count: int) -> list[int]:
        """Ids of frequent tokens, drawn at random."""
        ...

    def token_ids(self, text: str, *, special: bool = False) -> list[int]:
        """The text's token ids, without ``special`` tokens or with those that the tokenizer adds."""
        ...

    def keys_and_values(self, sides: Sequence[Sequence[int]]) -> Tensor:
        """Flat ``[S, sum of layer numel]`` fp32: what attention sees of S tokens of each stack, at positions 0…S−1."""
        ...

    def embeddings(self, ids: Sequence[int]) -> Tensor:
        """Input embeddings of tokens: fp32 ``[len(ids), hidden]``, as the backbone's embedding layer puts them out."""
        ...


@dataclass(frozen=True)
class TaskFacts:
    """What a method may know of the task: enough to say that it does not suit it.

    ``kind`` as in ``task.kind``; ``labels`` the label names; ``cloze``: labels are read off the language model's words
    at a mask; ``trained_head``: the readout has parameters of its own; ``virtual_tokens``: number of virtual tokens
    that the layout of the sequences places with ``{v:n}`` marks.
    """

    kind: str = "causal_lm"
    labels: tuple[str, ...] = ()
    cloze: bool = False
    trained_head: bool = False
    virtual_tokens: int = 0


class NoPromptEncoder(PromptEncoder):
    """For methods that put nothing beside the tokens."""

    layout = EmptyLayout()

    def __init__(self) -> None:
        super().__init__()
        self.empty: Tensor
        self.register_buffer("empty", torch.empty(0, 0), persistent=False)

    def network(self) -> Tensor:
        return self.empty


Construct = Callable[[Any, BackboneShape, Conditioner, TaskFacts], PromptEncoder]


@dataclass(frozen=True)
class Method:
    """A registered method: how to read its config section and how to build what it trains.

    ``construct(config, shape, conditioner, facts)`` builds the encoder; ``head(config)`` says what a trained head looks
    like where the task has one; ``check(config, facts)`` raises `UserError` for a task that the method does not suit.
    Without ``has_prompt`` a trained head is all there is to train, and without that head nothing is. ``sizes(config)``:
    settings that build an encoder of the same sizes without a look at the backbone's numbers or at a file.
    ``example``: keys that a new run file sets because the defaults alone do not make a run.
    """

    name: str
    config: type
    construct: Construct
    head: Callable[[Any], HeadSettings]
    check: Callable[[Any, TaskFacts], None]
    has_prompt: bool
    sizes: Callable[[Any], Any] = lambda config: config
    example: Mapping[str, Any] = field(default_factory=dict)

    @property
    def about(self) -> str:
        """The first line of the method's file: what it is, and its paper."""
        return (sys.modules[self.construct.__module__].__doc__ or "").partition("\n")[0]

    def build(
        self,
        config: Any,
        shape: BackboneShape,
        conditioner: Conditioner,
        facts: TaskFacts | None = None,
        *,
        seed: int,
    ) -> PromptEncoder:
        """The freshly initialised encoder (fp32, on the CPU); the same on every rank that gives the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.construct(config, shape, conditioner, facts or TaskFacts())


def refuse_marks(config: Any, facts: TaskFacts) -> None:
    """The check of methods whose virtual tokens have their own place."""
    if facts.virtual_tokens:
        raise UserError(
            "{v:n} in a pattern or template places virtual tokens, which method p_tuning only trains; "
            "remove the marks or set method.name: p_tuning"
        )


_METHODS: dict[str, Method] = {}


def register(
    name: str,
    *,
    config: type,
    head: Callable[[Any], HeadSettings] = lambda config: HeadSettings(),
    check: Callable[[Any, TaskFacts], None] = refuse_marks,
    has_prompt: bool = True,
    sizes: Callable[[Any], Any] = lambda config: config,
    example: Mapping[str, Any] | None = None,
) -> Callable[[Construct], Construct]:
    """Register ``construct(config, shape, conditioner, facts) -> PromptEncoder`` under ``name``; see `Method`.

    ``config`` is a plain dataclass: its fields are the keys of the ``method:`` section beside ``name``.
    """

    def add(construct: Construct) -> Construct:
        _METHODS[name] = Method(name, config, construct, head, check, has_prompt, sizes, example or {})
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
