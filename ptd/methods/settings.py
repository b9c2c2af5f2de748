"""What the config sections of several methods have in common: their checks, and the text that ``init: text`` reads."""

from __future__ import annotations

from dataclasses import field, replace
from pathlib import Path
from typing import Any, Protocol

from ptd.files import as_path
from ptd.files import read_text as text_of
from ptd.methods import TaskFacts, refuse_marks
from ptd.types import UserError


def key(default: Any, description: str) -> Any:
    """A field of a method's config dataclass, and what is said of it (Markdown) by the docs and ``ptd init``."""
    shared = {"metadata": {"description": description}}
    return field(default_factory=default, **shared) if isinstance(default, type) else field(default=default, **shared)  # type: ignore[call-overload]


PROJECTION = (
    "re-parameterise by an MLP: embedding → tanh layer → keys and values. Only needed while training. An "
    "encoder–decoder has one each for encoder, decoder and cross-attention"
)
DEEP_START = (
    "the start: the keys and values that the backbone has for P tokens of text: of training `rows`, of `chunks` from "
    "random places in them, or of a `text` (at least P tokens; a decoder starts exactly as if conditioned on it); or "
    "`random` (normal, of the size of the backbone's own keys and values), or `zero`"
)
INIT_TEXT = "that text, with `init: text`"
INIT_TEXT_FILE = "or the file that holds it"
POOLING = (
    "the vector of a text in `classification`: `cls` (first token), `mean`, `last`; `auto`: `last` for a decoder, "
    "`cls` for an encoder, `mean` for an encoder–decoder"
)
TANH_WIDTH = "width of the MLP's tanh layer, with `prefix_projection`; default: the backbone's hidden size"
VIRTUAL_TOKENS = "P, the length of the prompt"


class TextSettings(Protocol):
    """The keys of a method that can start from a text."""

    init: Any
    init_text: str | None
    init_text_file: Path | None


def check_positive(config: Any, *names: str) -> None:
    """Raise `UserError` if one of these settings is below 1; None is left to its default."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"method.{name}: got {value}, but it has to be at least 1")


def check_text(config: TextSettings) -> None:
    """Raise `UserError` unless there is exactly one source of text with ``init: text``, and none without."""
    given = [name for name in ("init_text", "init_text_file") if getattr(config, name) is not None]
    if config.init == "text" and len(given) != 1:
        raise UserError("method.init: text needs exactly one of method.init_text and method.init_text_file")
    if config.init_text_file is not None:
        config.init_text_file = as_path(config.init_text_file)
    if config.init != "text" and given:
        raise UserError(f"method.{given[0]}: is given, but method.init is {config.init!r}; set method.init: text")


def read_text(config: TextSettings) -> str:
    """The text to start from; only with ``init: text``. Raises `UserError` for a file that cannot be read."""
    if config.init_text is not None:
        return config.init_text
    assert config.init_text_file is not None
    return text_of(config.init_text_file, "method.init_text_file: cannot read").rstrip("\n")  # which ends a line


def check_start(config: TextSettings, facts: TaskFacts) -> None:
    """The check of methods whose virtual tokens have their own place and may start from a text: it can be read."""
    refuse_marks(config, facts)
    check_start_text(config)


def check_start_text(config: TextSettings) -> None:
    """Raise `UserError` where ``init: text`` has a file that cannot be read."""
    if config.init == "text":
        read_text(config)


def from_nothing(config: Any) -> Any:
    """The settings (`TextSettings`) with a start that looks at neither text nor backbone; the sizes are the same."""
    return replace(config, init="random", init_text=None, init_text_file=None)


def need_trained_head(name: str, pooling: str, facts: TaskFacts, *, for_words: str, for_text: str) -> None:
    """The check of methods that are made of a trained head: the task has to have one, and a use for its pooling.

    ``for_words`` and ``for_text`` name the method to take for labels read off words and for tasks that write text.
    """
    refuse_marks(None, facts)
    if not facts.trained_head and facts.cloze:
        raise UserError(
            f"method.name: {name} trains a head on the last hidden states, but the labels are read off the words at "
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
