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
    """What an initialiser may ask about real text and the backbone (see `ptd.backbone.TextConditioner`)."""

    def rows(self, count: int) -> list[list[int]]:
        """Return ``count`` tokens of randomly drawn training rows, ending with a whole row; one list per stack."""
        ...

    def chunks(self, count: int) -> list[list[int]]:
        """Return ``count`` tokens as `rows` does, but from short pieces at random places of the rows."""
        ...

    def frequent(self, count: int) -> list[int]:
        """Return ``count`` ids of frequent tokens, drawn at random."""
        ...

    def token_ids(self, text: str, *, special: bool = False) -> list[int]:
        """Return the text's token ids, with the ``special`` tokens that the tokenizer adds or without them."""
        ...

    def keys_and_values(self, sides: Sequence[Sequence[int]]) -> Tensor:
        """Return the keys and values that attention has for S tokens of each stack, at positions 0…S−1.

        Flat ``[S, sum of layer numel]``, fp32.
        """
        ...

    def embeddings(self, ids: Sequence[int]) -> Tensor:
        """Return the input embeddings of tokens, fp32 ``[len(ids), hidden]``: the output of the embedding layer."""
        ...


@dataclass(frozen=True)
class TaskFacts:
    """What a method may know of the task: enough to decide whether the method suits the task.

    ``kind``: as in ``task.kind``. ``labels``: the label names. ``cloze``: the labels are read off the language model's
    words at a mask. ``trained_head``: the readout has trainable parameters. ``virtual_tokens``: number of virtual
    tokens that ``{v:n}`` marks place in a sequence.
    """

    kind: str = "causal_lm"
    labels: tuple[str, ...] = ()
    cloze: bool = False
    trained_head: bool = False
    virtual_tokens: int = 0


class NoPromptEncoder(PromptEncoder):
    """The encoder of methods without a prompt."""

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

    ``construct(config, shape, conditioner, facts)`` builds the encoder. ``head(config)`` returns the settings of the
    trained head, for tasks that have one. ``check(config, facts)`` raises `UserError` for a task that the method does
    not suit. Without ``has_prompt``, the method trains only the task's head, or nothing if the task has no trained
    head. ``sizes(config)`` returns settings that build an encoder of the same sizes without reading a file or values of
    the backbone. ``example``: keys that a new run file has to set because their defaults do not make a valid run.
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
        """The first line of the method's module: what the method is, and its paper."""
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
        """Build and initialise the encoder (fp32, on the CPU). It is the same on every rank with the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.construct(config, shape, conditioner, facts or TaskFacts())


def refuse_marks(config: Any, facts: TaskFacts) -> None:
    """Raise `UserError` if the task has ``{v:n}`` marks: the check of methods with a fixed place for virtual tokens."""
    if facts.virtual_tokens:
        raise UserError(
            "{v:n} in a pattern or template places virtual tokens, which only method p_tuning trains; "
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

    ``config`` is a plain dataclass: its fields are the keys of the ``method:`` section other than ``name``.
    """

    def add(construct: Construct) -> Construct:
        _METHODS[name] = Method(name, config, construct, head, check, has_prompt, sizes, example or {})
        return construct

    return add


def methods() -> dict[str, Method]:
    """Return all methods of this folder by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(_METHODS)


def method(name: str) -> Method:
    """Return the method of that name; raises a `UserError` that lists the available methods."""
    known = methods()
    if name not in known:
        raise UserError(f"method.name: there is no method {name!r}; available: {', '.join(sorted(known))}")
    return known[name]
