"""Define the tasks: each file is one kind of task, from its rows to its metrics.

A task says which output it needs from the backbone, turns rows into `ptd.types.Examples`, names the readout that
computes loss and scores, and turns scores into answers and answers into metrics.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

from ptd.config import DataConfig, TaskConfig
from ptd.data.collecting import Columns, InMemory
from ptd.data.identity import key_of
from ptd.readouts import Readout
from ptd.types import Architecture, Examples, HeadSettings, Output, Sample

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class _Common(Protocol):
    """The interface of every kind of task.

    ``config`` and ``data``: the sections ``task`` and ``data`` of the run. ``labels``: the names that a prediction
    chooses from (none for text). ``virtual_tokens``: the number of virtual tokens that ``{v:n}`` marks place in its
    sequences. ``cloze``: labels are predicted as words of the language model.
    """

    config: TaskConfig
    data: DataConfig
    output: Output
    labels: tuple[str, ...]
    virtual_tokens: int
    cloze: bool

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics of an evaluation, ``loss`` first; if `fit` learns the labels, they are known after `fit`."""
        ...

    def fit(self, rows: Dataset, what: str) -> Task:
        """Return the task with all that it learns from the training rows before tokenising them (label names)."""
        ...

    def tokenize(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        what: str,
        labelled: bool = True,
        columns: Columns = InMemory,
    ) -> Examples:
        """Return all rows as sequences; without ``labelled`` the rows' labels are neither needed nor read.

        ``columns``: where the arrays are stored while they grow (`ptd.data.collecting`).
        """
        ...

    def readout(self, tokenizer: PreTrainedTokenizerBase, hidden_size: int, head: HeadSettings) -> Readout:
        """Return the readout, which computes loss and scores and is the same on every rank."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return the ``task`` section with everything learned filled in, which the adapter stores."""
        ...


class WritingTask(_Common, Protocol):
    """A task whose answer is text; evaluation generates this text."""

    generates: Literal[True]

    def prompts(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, raw: bool = False
    ) -> list[list[int]]:
        """Return the prompts of typed texts as token ids, as in training; ``raw``: each text is a complete prompt."""
        ...

    def how_typed(self, raw: bool) -> str | None:
        """Return a sentence on how typed texts become prompts; None if there is nothing to explain."""
        ...

    def ends(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Return the tokens that end a text in training, as far as the tokenizer and the settings determine them."""
        ...

    def prompts_and_references(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, what: str
    ) -> tuple[list[list[int]], list[str]]:
        """Return each row's prompt as token ids, and the text that should follow it."""
        ...


class LabellingTask(_Common, Protocol):
    """A task whose answer is computed from the readout's scores."""

    generates: Literal[False]

    def answers(self, scores: Sequence[Tensor], examples: Examples, rows: Dataset) -> list[dict[str, Any]]:
        """Return the answer to each row of the data, as ``ptd predict`` writes it."""
        ...

    def metrics(self, answers: Sequence[dict[str, Any]], rows: Dataset) -> dict[str, float]:
        """Return how well the answers match the rows' labels, in percent."""
        ...

    def samples(self, answers: Sequence[dict[str, Any]], rows: Dataset) -> list[Sample]:
        """Return each row with its label and its answer, for a person to read."""
        ...


Task = WritingTask | LabellingTask
TEXT_METRICS = ("loss", "perplexity")
LOWER_IS_BETTER = frozenset(TEXT_METRICS)
"""The only metrics for which lower is better; `ptd.engine.evaluation` computes them."""


def rows_key(task: Task, rows: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return the digest of all that determines the result of ``task.tokenize`` on the rows with this digest.

    Without a tokenizer: of all that determines the result of ``task.fit``.
    """
    settings = {
        "config": task.config.model_dump(mode="json"),
        "labels": task.labels,
        "output": task.output,
        "virtual_tokens": task.virtual_tokens,
        "cloze": task.cloze,
    }
    return key_of(rows, tokenizer, settings, task.data, type(task))


_KINDS: dict[str, Callable[[TaskConfig, DataConfig, Architecture], Task]] = {}


def register(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ``construct(config, data, architecture) -> Task`` for ``task.kind: kind``."""

    def add(construct: Callable[..., Any]) -> Callable[..., Any]:
        _KINDS[kind] = construct
        return construct

    return add


def make_task(config: TaskConfig, data: DataConfig, architecture: Architecture) -> Task:
    """Return the task that the ``task`` and ``data`` sections describe.

    Raises `UserError` for settings that contradict each other or do not fit the backbone's architecture.
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _KINDS[config.kind](config, data, architecture)
