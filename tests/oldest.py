"""Prints what to install for the oldest versions that pyproject.toml allows, as constraints for pip."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parent.parent
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?P<extras>\[[^]]*\])?(?P<versions>[^;]*)")
INSTALLED = "torch"
"""What comes in the version of constraints.txt all the same: its old releases come with CUDA alone."""


def normal(name: str) -> str:
    """A package's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lower_bounds() -> dict[str, str]:
    """The oldest release of each package that pyproject.toml names one for, those of its extras too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = {}
    for requirement in chain(project["dependencies"], *project["optional-dependencies"].values()):
        found = REQUIREMENT.match(requirement)
        oldest = re.search(r">=\s*([\w.]+)", found["versions"])
        if oldest:
            bounds[normal(found["name"])] = oldest[1]
    return bounds


def constraints() -> list[str]:
    """Lines for pip: the lower bounds, and constraints.txt for all else."""
    bounds = {name: version for name, version in lower_bounds().items() if name != INSTALLED}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    others = [line for line in lines if line[:1].isalpha() and normal(REQUIREMENT.match(line)["name"]) not in bounds]
    return [*(f"{name}=={version}" for name, version in bounds.items()), *others]


if __name__ == "__main__":
    print("\n".join(constraints()))
