"""Report the versions of the software that a result depends on, for run.json and bug reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("ptd", "torch", "transformers", "deepspeed", "datasets", "bitsandbytes", "flash-attn", "liger-kernel")


def versions() -> dict[str, str]:
    """Return the version of Python and of each installed package of `PACKAGES`, by name."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
