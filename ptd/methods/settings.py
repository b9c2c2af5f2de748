"""The keys and checks that several methods share, and the text that ``init: text`` reads."""

from __future__ import annotations

from dataclasses import field, replace
from pathlib import Path
from typing import Any, Protocol

from ptd.files import as_path, read_text
from ptd.methods import TaskFacts, refuse_marks
from ptd.types import UserError


def key(default: Any, description: str) -> Any:
    """Return a field of a method's config dataclass. The docs and ``ptd init`` show its ``description`` (Markdown)."""
    shared = {"metadata": {"description": description}}
    return field(default_factory=default, **shared) if isinstance(default, type) else field(default=default, **shared)  # type: ignore[call-overload]


PROJECTION = (
    "re-parameterise by an MLP: embedding → tanh layer → keys and values. The MLP is needed only during training. An "
    "encoder–decoder has one MLP each for encoder, decoder and cross-attention"
)
DEEP_START = (
    "the initial values: the keys and values that the backbone computes for P tokens of training `rows`, of `chunks` "
    "from random places in the rows, or of a `text` (at least P tokens; a decoder starts exactly as if conditioned on "
    "the text); or `random` (normal, at the scale of the backbone's own keys and values), or `zero`"
)
INIT_TEXT = "the text for `init: text`"
INIT_TEXT_FILE = "file with the text for `init: text`, in place of `init_text`"
POOLING = (
    "the vector of a text in `classification`: `cls` (first token), `mean`, `last`; `auto`: `last` for a decoder, "
    "`cls` for an encoder, `mean` for an encoder–decoder"
)
TANH_WIDTH = "width of the MLP's tanh layer, with `prefix_projection`; default: the backbone's hidden size"
VIRTUAL_TOKENS = "P, the number of virtual tokens in the prompt"


class TextSettings(Protocol):
    """The keys of a method that can start from a text."""

    init: Any
    init_text: str | None
    init_text_file: Path | None


def check_positive(config: Any, *names: str) -> None:
    """Raise `UserError` if one of these settings is below 1; None stands for the default."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"method.{name}: got {value}, but it has to be at least 1")


def check_text(config: TextSettings) -> None:
    """Raise `UserError` unless ``init: text`` has exactly one source of text, or another ``init`` has none."""
    given = [name for name in ("init_text", "init_text_file") if getattr(config, name) is not None]
    if config.init == "text" and len(given) != 1:
        raise UserError("method.init: text needs exactly one of method.init_text and method.init_text_file")
    if config.init_text_file is not None:
        config.init_text_file = as_path(config.init_text_file)
    if config.init != "text" and given:
        raise UserError(f"method.{given[0]}: is given, but method.init is {config.init!r}; set method.init: text")


def initial_text(config: TextSettings) -> str:
    """Return the text of ``init: text``. Raises `UserError` for a file that cannot be read."""
    if config.init_text is not None:
        return config.init_text
    assert config.init_text_file is not None
    # The newline at the end of the file ends a line and is no part of the text.
    return read_text(config.init_text_file, "method.init_text_file: cannot read").rstrip("\n")


def check_start(config: TextSettings, facts: TaskFacts) -> None:
    """Raise `UserError` for ``{v:n}`` marks and for a text of ``init: text`` that cannot be read."""
    refuse_marks(config, facts)
    check_start_text(config)


def check_start_text(config: TextSettings) -> None:
    """Raise `UserError` if ``init: text`` names a file that cannot be read."""
    if config.init == "text":
        initial_text(config)


def from_nothing(config: Any) -> Any:
    """Return the settings (`TextSettings`) with ``init: random``, which needs no text; the sizes are the same."""
    return replace(config, init="random", init_text=None, init_text_file=None)


def need_trained_head(name: str, pooling: str, facts: TaskFacts, *, for_words: str, for_text: str) -> None:
    """Raise `UserError` unless the task has a trained head that uses ``pooling``: the check of methods with a head.

    ``for_words`` and ``for_text``: the methods to recommend for labels read off words and for tasks without a head.
    """
    refuse_marks(None, facts)
    if not facts.trained_head and facts.cloze:
        raise UserError(
            f"method.name: {name} trains a head on the last hidden states, but this task reads labels off the words at "
            f"{{mask}}; remove task.verbalizer and {{mask}} from task.patterns, or set method.name: {for_words}"
        )
    if not facts.trained_head:
        raise UserError(
            f"method.name: {name} trains a head on the last hidden states, but task.kind {facts.kind} has none; set "
            f"task.kind: classification, token_classification or question_answering, or method.name: {for_text}"
        )
    if pooling != "auto" and facts.kind != "classification":
        raise UserError(
            f"method.pooling: has no effect with task.kind {facts.kind}, whose head reads every token; remove it"
        )
