"""Write and read what a run saves: the adapter (in PEFT's format, with a model card) and its checkpoints."""

from ptd.checkpoint.adapter import Adapter, backbone_reference, load_adapter, save_adapter
from ptd.checkpoint.run_state import latest_complete, load_tensors
from ptd.checkpoint.saver import Saver

__all__ = [
    "Adapter",
    "Saver",
    "backbone_reference",
    "latest_complete",
    "load_adapter",
    "load_tensors",
    "save_adapter",
]
