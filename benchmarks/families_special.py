"""What the tiny size of some families needs beside `families_configs.SIZES`."""

from __future__ import annotations

from typing import Any

KINDS_OF_LAYERS: set[str] = set()
"""Families that get a sliding window although their default has none."""

SPECIAL: dict[str, dict[str, Any]] = {}
