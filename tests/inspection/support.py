"""Adapters of tiny backbones, for the tests of the inspection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ptd.checkpoint import Adapter, save_adapter
from ptd.types import LayerShape

P = 4
HIDDEN = 32
ROWS = [{"prompt": f"Add {a} and {b}: ", "completion": str(a + b)} for a in range(3) for b in range(4)]
SELF = LayerShape(2, 8, 8)


def saved(folder: Path, backbone: Path, layout: Any, flat: torch.Tensor | None = None, **facts: Any) -> str:
    if flat is None:
        flat = torch.randn(P, layout.width, generator=torch.Generator().manual_seed(1))
    task = facts.pop("task", {"kind": "causal_lm"})
    about = {"task": task, "data": {"max_length": 64}, "backbone_config": {"dtype": "float32"}, **facts}
    save_adapter(folder, Adapter(flat, layout, str(backbone), task_type="CAUSAL_LM", facts=about))
    return str(folder)


def large(found: dict[str, Any], *, layers: int, heads: int, tokens: int, kept: list[int]) -> dict[str, Any]:
    """Return ``found``, the inspection of a prefix, as if the backbone and the prompt were larger."""
    names = [f"layer {number}" for number in range(layers)]
    shares = [[(7 * layer + 3 * head) % 31 / 30 for head in range(heads)] for layer in range(layers)]
    attention = [
        found["attention"][0] | {"layer": name, "all": row, "supervised": [share / 2 for share in row]}
        for name, row in zip(names, shares, strict=True)
    ]
    return found | {
        "num_virtual_tokens": tokens,
        "tensors": [each | {"layer": name} for name in names for each in found["tensors"][:2]],
        "tokens": [{"token": n, "rank": n + 1, "loss_change": 1e-5 * (n - 9), "attention": 0.1} for n in range(tokens)],
        "keep": [{"tokens": size, "loss": 100.0 - size / 2} for size in kept],
        "enough": tokens - 8,
        "attention": attention,
    }
