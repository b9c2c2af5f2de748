"""Choose how the elementwise work of a backbone's layers runs: in Liger's kernels, compiled, or as in transformers.

Norms, rotary embeddings and activations move memory and hardly compute. Written out as in transformers, a layer of a 7B
launches 86 such kernels per step, forward and backward, and they take a third of the step on an H100
(``benchmarks/gpu_model.py``).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ptd.backbone.liger import check_liger, interpreted, liger_obstacle
from ptd.config import BackboneConfig


class Fusion(NamedTuple):
    """Who runs the elementwise work, and ``why``. ``remedy``: what would let ``auto`` do better; empty if nothing."""

    by: Literal["transformers", "liger", "compile"]
    why: str
    remedy: str = ""

    @property
    def found(self) -> str:
        """The line that a run prints, without the remedy."""
        work = "norms, rotary embeddings and activations run in"
        return {
            "transformers": f"{work} transformers' own code: {self.why}",
            "liger": f"{work} Liger's kernels ({self.why})",
            "compile": f"torch.compile compiles the layers ({self.why}), which takes a minute in the first step",
        }[self.by]

    def __str__(self) -> str:
        return self.found + (f"; {self.remedy}" if self.remedy else "")


def choose_fusion(config: BackboneConfig, model_type: str, device_type: str) -> Fusion:
    """Return how the layers of a backbone of this family run on ``cuda`` or ``cpu``.

    ``auto`` takes Liger on a GPU, in every placement. In the model of a step it saves 74 of the 93 ms that a 7B's
    elementwise work takes on an H100, and torch.compile 70. But torch.compile takes a minute in the first step, and
    cannot compile sharded or bitsandbytes' weights. So ``auto`` never compiles.

    Raises `UserError` if Liger is required and cannot run.
    """
    if config.liger is True:
        check_liger(model_type, device_type)
        return Fusion("liger", "backbone.liger: true")
    if config.compile is True:
        return Fusion("compile", "backbone.compile: true")
    if config.liger is False:
        return Fusion("transformers", "backbone.liger: false")
    if device_type != "cuda":
        return Fusion("transformers", "the backbone is on the CPU")
    if interpreted():
        return Fusion("transformers", "Triton interprets its kernels (TRITON_INTERPRET=1)")
    obstacle = liger_obstacle(model_type, device_type)
    return Fusion("liger", "backbone.liger: auto") if obstacle is None else Fusion("transformers", *obstacle)
