"""``make test-oldest`` installs the lower bounds of pyproject.toml, and constraints.txt for all other packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

FILE = Path(__file__).with_name("oldest.py")
TESTED = FILE.parents[1] / "constraints.txt"
spec = importlib.util.spec_from_file_location("oldest", FILE)
oldest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oldest)


def versions(lines):
    named = [Requirement(line.split("  #")[0]) for line in lines if line[:1].isalpha()]
    assert len({oldest.normal(each.name) for each in named}) == len(named), "each package once"
    return {oldest.normal(each.name): str(each.specifier) for each in named}


def test_the_lower_bounds_are_installed_and_the_tested_versions_for_the_rest():
    printed, tested = versions(oldest.constraints()), versions(TESTED.read_text().splitlines())
    bounds = oldest.lower_bounds()
    assert {"transformers", "deepspeed", "bitsandbytes", "datasets", "typer", "peft"} <= set(bounds)
    for name, version in bounds.items():
        wanted = tested["torch"] if name == "torch" else f"=={version}"
        assert printed.pop(name) == wanted
        assert Version(version) <= Version(tested.get(name, wanted).removeprefix("==")), name
    assert printed.items() <= tested.items()


def test_what_runs_with_them_is_there():
    listed = (FILE.with_suffix(".txt")).read_text(encoding="utf-8").split()
    assert listed
    assert [path for path in listed if not (FILE.parents[1] / path).exists()] == []
