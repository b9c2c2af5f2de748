"""The quickstart: a tiny pretrained backbone and a task, to try all of ptd in minutes on two CPU cores."""

from pathlib import Path

BACKBONE = Path(__file__).parent / "backbone"
