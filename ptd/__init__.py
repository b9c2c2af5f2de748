"""ptd: tune a prefix, not a model. Prompt- and prefix-tuning of frozen language models across GPUs and nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ptd.errors import UserError

if TYPE_CHECKING:
    from ptd.api import TunedModel, attach, load

__all__ = ["TunedModel", "UserError", "attach", "load"]


def __getattr__(name: str) -> Any:
    # Importing the API imports transformers, which ptd --help and ptd --version do not need.
    if name in ("TunedModel", "attach", "load"):
        from ptd import api

        return getattr(api, name)
    raise AttributeError(f"module 'ptd' has no attribute {name!r}")
