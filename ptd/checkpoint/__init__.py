"""What a run leaves behind: the adapter (PEFT's format, with a card) and the state to continue from."""

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
