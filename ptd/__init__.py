"""ptd: tune a prefix, not a model. Prompt- and prefix-tuning of frozen language models across GPUs and nodes.

In a training loop of your own: `attach`, `load` and `TunedModel`. The commands as functions: `train`, `evaluate`,
`generate` and `predict`, with `load_config` for a run file.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ptd.errors import UserError

if TYPE_CHECKING:
    from ptd.api import TunedModel, attach, load
    from ptd.commands.evaluate import evaluate
    from ptd.commands.generate import generate
    from ptd.commands.predict import predict
    from ptd.commands.train import train
    from ptd.config import load_config

__all__ = ["TunedModel", "UserError", "attach", "evaluate", "generate", "load", "load_config", "predict", "train"]

_MODULES = {
    **dict.fromkeys(("TunedModel", "attach", "load"), "ptd.api"),
    **{name: f"ptd.commands.{name}" for name in ("evaluate", "generate", "predict", "train")},
    "load_config": "ptd.config",
}
"""Exported name -> the module that defines it, imported on first use: `ptd --help` needs neither torch nor
transformers."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'ptd' has no attribute {name!r}")
