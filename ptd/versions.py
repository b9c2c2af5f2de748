"""Versions of what a result depends on, for run.json and bug reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("ptd", "torch", "transformers", "deepspeed", "datasets", "bitsandbytes", "flash-attn", "liger-kernel")


def versions() -> dict[str, str]:
    """Installed versions by package; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
