"""Print pip constraints that install the oldest versions that pyproject.toml allows."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parent.parent
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?P<extras>\[[^]]*\])?(?P<versions>[^;]*)")
INSTALLED = "torch"
"""The package that keeps the version of constraints.txt, because its old releases exist only with CUDA."""


def normal(name: str) -> str:
    """Return the package's name as package indices normalise it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lower_bounds() -> dict[str, str]:
    """Return the lower bound of each package for which pyproject.toml gives one, including those of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = {}
    for requirement in chain(project["dependencies"], *project["optional-dependencies"].values()):
        found = REQUIREMENT.match(requirement)
        oldest = re.search(r">=\s*([\w.]+)", found["versions"])
        if oldest:
            bounds[normal(found["name"])] = oldest[1]
    return bounds


def constraints() -> list[str]:
    """Return lines for pip: the lower bounds, and those of constraints.txt for all other packages."""
    bounds = {name: version for name, version in lower_bounds().items() if name != INSTALLED}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    others = [line for line in lines if line[:1].isalpha() and normal(REQUIREMENT.match(line)["name"]) not in bounds]
    return [*(f"{name}=={version}" for name, version in bounds.items()), *others]


if __name__ == "__main__":
    print("\n".join(constraints()))
