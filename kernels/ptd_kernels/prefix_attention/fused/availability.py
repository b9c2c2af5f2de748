"""Whether Triton is installed, and whether it interprets its kernels instead of compiling them."""

from __future__ import annotations

import importlib.util
import os

INSTALLED = importlib.util.find_spec("triton") is not None
# Triton reads this variable when it is imported, so a later change would have no effect.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
