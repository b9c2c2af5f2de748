"""Several adapters over one backbone, used together: each row names its adapter, or none for the backbone alone.

One adapter without a name is the case of one part to which all rows belong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptd.backbone import load_tokenizer
from ptd.checkpoint import Adapter, load_adapter
from ptd.config import BackboneConfig
from ptd.distributed.ranks import Ranks
from ptd.runs.tuned import (
    AS_TRAINED,
    Settings,
    Tuned,
    TunedReference,
    backbone_of,
    check_sections,
    find_tuned,
    task_of,
)
from ptd.types import NO_MEMBER, Prompts, PromptState, Reporter, UserError

Adapters = str | Mapping[str, str] | None
"""An adapter's folder; name -> folder of several; None: the backbone alone."""
COLUMN = "adapter"
"""The column in which a row names its adapter."""
ALONE = "no adapter"
"""How results call rows that name no adapter. No adapter has this name."""


@dataclass(frozen=True)
class Part:
    """The rows that one adapter reads: ``numbers`` int64, their places among all rows; ``name`` None: no adapter."""

    name: str | None
    tuned: Tuned
    rows: Any
    numbers: np.ndarray


@dataclass(frozen=True)
class Several:
    """A backbone with its adapters. ``by_name``: what each name uses, with None for the backbone alone.

    ``named``: rows name their adapters; otherwise there is one adapter, or none, for all rows.
    """

    by_name: Mapping[str | None, Tuned]
    named: bool

    @property
    def first(self) -> Tuned:
        return next(iter(self.by_name.values()))

    def use(self, name: str | None, place: str) -> Tuned:
        """Return what ``name`` uses; ``place``: where it is given. Raises `UserError` for an unknown name."""
        if name in self.by_name:
            return self.by_name[name]
        known = ", ".join(sorted(filter(None, self.by_name)))
        if name is None:
            raise UserError(
                f"{place} names no adapter, but without one the backbone has no trained head to label rows with; name "
                f"one of {known}"
            )
        raise UserError(
            f"{place} names the adapter {name!r}, but --adapter gives {known}; give it, or correct the name"
        )

    def parts(self, rows: Any, column: str, what: str) -> list[Part]:
        """Return the rows of each adapter that any row names, in the order of the adapters.

        Raises `UserError`, naming the row, for a name that no adapter has.
        """
        if not self.named:
            return [Part(None, self.first, rows, np.arange(len(rows)))]
        if column not in rows.column_names:
            raise UserError(
                f"{what} has no column {column!r}, in which each row names its adapter; its columns are "
                f"{', '.join(rows.column_names)}; add it, or name another column with --adapter-column"
            )
        of: dict[str | None, list[int]] = {name: [] for name in self.by_name}
        for number, value in enumerate(rows[column]):
            name = None if value is None or value == "" else str(value)
            self.use(name, f"row {number + 1} of {what}")
            of[name].append(number)
        return [
            Part(name, self.by_name[name], rows.select(numbers), np.array(numbers))
            for name, numbers in of.items()
            if numbers
        ]

    def named_in(self, part: Part, what: str) -> str:
        """Return how messages call a part's rows, which they number from 1."""
        if not self.named:
            return what
        return f"{what} (counting the rows of {ALONE if part.name is None else repr(part.name)})"


@dataclass(frozen=True)
class SeveralReference:
    """Adapters and their backbone before the backbone's weights are loaded; None: the backbone alone."""

    by_name: Mapping[str | None, TunedReference]
    named: bool

    @property
    def first(self) -> TunedReference:
        return next(iter(self.by_name.values()))

    def start_ranks(self) -> Ranks:
        """Join the processes of a launcher."""
        return self.first.start_ranks()

    def load(self, ranks: Ranks, reporter: Reporter) -> Several:
        """Load the backbone and attach all adapters. All ranks call this together. Raises `UserError`."""
        if not self.named:
            return Several({name: each.load(ranks, reporter) for name, each in self.by_name.items()}, named=False)
        prepared = self.first.prepare(ranks, reporter)
        found: dict[str | None, Tuned] = {}
        states: list[PromptState] = []
        for name, each in self.by_name.items():
            if each.adapter is None:
                found[name] = each.on(prepared, NO_MEMBER)
                continue
            try:
                found[name] = each.on(prepared, len(states))
            except UserError as error:
                raise UserError(f"--adapter {name}: {error}") from error
            states.append(each.adapter.state_on(ranks.device))
        prepared.attachment.set(Prompts(tuple(states)))
        if prepared.attachment.note_on_several is not None and len(states) > 1:
            reporter.note(prepared.attachment.note_on_several)
        return Several(found, named=True)


def find_adapters(adapters: Adapters, backbone: str | None, *, settings: Settings | None = None) -> SeveralReference:
    """Read the adapters, and everything of their backbone (or of ``backbone``) except the weights.

    Every adapter has its own task and data settings, those of its training, with the changes of ``settings``. Raises
    `UserError` for adapters that cannot be used together: prompts of two kinds, text and labels, different outputs of
    the backbone, or different dtypes or quantizations in training.
    """
    if not isinstance(adapters, Mapping):
        return SeveralReference({None: find_tuned(adapters, backbone, settings=settings)}, named=False)
    if not adapters:
        raise UserError("--adapter: no adapter is given; give at least one as NAME=FOLDER")
    settings = settings or {}
    check_sections(settings)
    loaded: dict[str, Adapter] = {}
    for name, folder in adapters.items():
        try:
            loaded[name] = load_adapter(folder)
        except UserError as error:
            raise UserError(f"--adapter {name}={folder}: {error}") from error
    config = _common_backbone(loaded, backbone, settings.get("backbone", {}))
    Prompts(tuple(adapter.state() for adapter in loaded.values()))  # raises for prompts of two kinds
    tokenizer = load_tokenizer(config)
    changes = settings.get("data", {})
    found: dict[str | None, TunedReference] = {}
    for name, adapter in loaded.items():
        found[name] = TunedReference(adapter, config, *task_of(adapter, config, changes), tokenizer)
    _check_alike(found)
    if next(iter(found.values())).task.generates:
        shared = _shared_shape(loaded.values()) | changes
        found[None] = TunedReference(None, config, *task_of(None, config, shared), tokenizer)
    return SeveralReference(found, named=True)


def _common_backbone(loaded: Mapping[str, Adapter], path: str | None, changes: dict[str, Any]) -> BackboneConfig:
    """Return the config of the backbone that all adapters share; the first names its path."""
    first = next(iter(loaded))
    config = backbone_of(loaded[first], path, changes)
    for name, adapter in loaded.items():
        other = backbone_of(adapter, config.path, changes)
        for key in AS_TRAINED:
            if getattr(other, key) != getattr(config, key):
                raise UserError(
                    f"--adapter: {first} was trained with backbone.{key}: {getattr(config, key)}, and {name} with "
                    f"{getattr(other, key)}, but both use one backbone; choose one with --set backbone.{key}=…"
                )
    return config


def _check_alike(found: Mapping[str | None, TunedReference]) -> None:
    (first, one), *others = found.items()
    for name, other in others:
        if one.task.generates != other.task.generates or one.task.output != other.task.output:
            kinds = ", ".join(f"{each}: {given.task.config.kind}" for each, given in ((first, one), (name, other)))
            raise UserError(
                f"--adapter: these adapters read different outputs of the backbone ({kinds}), so they cannot be used "
                "together; use adapters of one kind of task"
            )


def _shared_shape(adapters: Any) -> dict[str, Any]:
    """Return what all adapters say about the form of a row, which also holds for rows without an adapter."""
    sections = [adapter.facts.get("data", {}) for adapter in adapters]
    return {
        key: sections[0][key]
        for key in ("format", "columns", "max_length", "eval_split")
        if key in sections[0] and all(section.get(key) == sections[0][key] for section in sections)
    }


def check_names(adapters: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return name -> folder. Raises `UserError` for a name that is given twice or that results use otherwise."""
    found: dict[str, str] = {}
    for name, folder in adapters:
        if name in found:
            raise UserError(f"--adapter: the name {name} is given to {found[name]} and to {folder}; give each its own")
        if name == ALONE:
            raise UserError(f"--adapter: results call rows without an adapter {ALONE!r}; give another name")
        found[name] = folder
    return found
