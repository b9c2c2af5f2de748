"""What is learned: one file is one kind of task, from the rows to its metrics.

A task says what the backbone has to end in, turns rows into `ptd.types.Examples`, names the readout that gives loss and
scores, and turns scores into answers and answers into metrics.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

from ptd.config import DataConfig, TaskConfig
from ptd.readouts import Readout
from ptd.types import Architecture, Examples, HeadSettings, Output, Sample

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class _Common(Protocol):
    """What every kind of task has.

    ``data``: how the rows are read; ``labels``: the names a prediction chooses from (none for text).
    ``virtual_tokens``: how many ``{v:n}`` marks stand for in the layout of its sequences. ``cloze``: labels are read
    off the language model's own words.
    """

    data: DataConfig
    output: Output
    labels: tuple[str, ...]
    virtual_tokens: int
    cloze: bool

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What an evaluation measures, known before any: ``loss`` first (after `fit`, where that learns labels)."""
        ...

    def fit(self, rows: Dataset, what: str) -> Task:
        """The task with everything it has to learn from the training rows before they are tokenised (label names)."""
        ...

    def tokenize(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, what: str, labelled: bool = True
    ) -> Examples:
        """All rows as sequences; without ``labelled`` the rows' labels are neither needed nor read."""
        ...

    def readout(self, tokenizer: PreTrainedTokenizerBase, hidden_size: int, head: HeadSettings) -> Readout:
        """Loss and scores; built alike on every rank."""
        ...

    def facts(self) -> dict[str, Any]:
        """The ``task`` section with everything learned filled in: what an adapter keeps."""
        ...


class WritingTask(_Common, Protocol):
    """The answer is text, which is judged by generating it."""

    generates: Literal[True]

    def prompts(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, raw: bool = False
    ) -> list[list[int]]:
        """What a person types as token ids, as in training; ``raw``: each text is a whole prompt already."""
        ...

    def how_typed(self, raw: bool) -> str | None:
        """What becomes of a text that a person types before it is sent; None: nothing that has to be said."""
        ...

    def ends(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """The tokens that end a text in training, as far as tokenizer and settings tell."""
        ...

    def prompts_and_references(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, what: str
    ) -> tuple[list[list[int]], list[str]]:
        """Each row's prompt as token ids, and the text that should follow."""
        ...


class LabellingTask(_Common, Protocol):
    """The readout's scores say the answer."""

    generates: Literal[False]

    def answers(self, scores: Sequence[Tensor], examples: Examples) -> list[dict[str, Any]]:
        """What each row of the data is answered, as ``ptd predict`` writes it."""
        ...

    def metrics(self, answers: Sequence[dict[str, Any]], rows: Dataset) -> dict[str, float]:
        """How the answers compare with the rows' labels, in percent."""
        ...

    def samples(self, answers: Sequence[dict[str, Any]], rows: Dataset) -> list[Sample]:
        """Each row with its label and its answer, to be looked at."""
        ...


Task = WritingTask | LabellingTask
TEXT_METRICS = ("loss", "perplexity")
LOWER_IS_BETTER = frozenset(TEXT_METRICS)
"""Of all metrics these alone; `ptd.engine.evaluation` has them."""


_KINDS: dict[str, Callable[[TaskConfig, DataConfig, Architecture], Task]] = {}


def register(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ``construct(config, data, architecture) -> Task`` for ``task.kind: kind``."""

    def add(construct: Callable[..., Any]) -> Callable[..., Any]:
        _KINDS[kind] = construct
        return construct

    return add


def make_task(config: TaskConfig, data: DataConfig, architecture: Architecture) -> Task:
    """The task that the ``task`` and ``data`` sections describe.

    Raises `UserError` for settings that do not fit each other or the backbone's architecture.
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _KINDS[config.kind](config, data, architecture)
