"""Write docs/map.md, one line per file, from the first sentence of each file's docstring: ``python docs/map.py``."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "map.md"
FOLDERS = {
    "ptd": "The toolkit",
    "kernels": "Kernels: importable as `ptd_kernels`, without ptd",
    "tools": "Tools: what made files of the package; not in the wheel",
    "benchmarks": "Benchmarks: programs that write `benchmarks/results/`",
}
OTHERS = {
    "ds_configs/": "DeepSpeed files for frozen backbones, explained in its README",
    "launch/recipes/": "run files to copy, by task and by size of the backbone",
    "launch/slurm/": "job scripts for Slurm, and the template that `ptd launch slurm` fills in",
    "docs/": "this site, built by `make docs`; `configuration.py` and `map.py` write the pages of the same name",
    "tests/": "mirror `ptd/`; `docs/` runs every command and code block of the documentation (`make docs-test`)",
    "tests/family_sheet.py": "every text family beside plain transformers; writes [families](families.md)",
    "tests/gpu_paper/": "an emulated GPU, and whole runs on it (`make test-gpu-paper`)",
    "tests/oldest.py": "the oldest versions that pyproject.toml allows (`make test-oldest`)",
    ".ci/run": "everything that has to pass on a clean clone",
}
HEAD = """\
# Every file

One line per file: the first sentence of its docstring. `python docs/map.py` writes this page. The
[architecture](architecture.md)
explains how the parts work together.
"""


def page() -> str:
    """Return the whole page. Raises `ValueError` for a file without a docstring."""
    parts = [HEAD, *(section(folder, title) for folder, title in FOLDERS.items())]
    lines = aligned({f"`{path}`": said for path, said in OTHERS.items()})
    return "\n".join([*parts, f"## Everything else\n\n{lines}"])


def section(folder: str, title: str) -> str:
    """Return the part of the page about a folder: its own files first, then one table per subfolder."""
    files: dict[Path, dict[str, str]] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        files.setdefault(path.parent, {})[f"`{path.name}`"] = summary(path)
    parts = [f"## {title}\n"]
    for place in sorted(files):
        inside = place.relative_to(ROOT).as_posix()
        own = files[place].pop("`__init__.py`", "")
        parts.append(f"### `{inside}/`\n\n{own}\n" if own else f"### `{inside}/`\n")
        if files[place]:
            parts.append(aligned(files[place]))
    return "\n".join(parts)


def aligned(lines: dict[str, str]) -> str:
    """Return a Markdown table with columns of equal width, so that it can be read as plain text too."""
    width = max(map(len, lines))
    rows = [f"| {name:<{width}} | {said} |" for name, said in lines.items()]
    return "\n".join([f"| {'file':<{width}} | what it is for |", f"|{'-' * (width + 2)}|---|", *rows, ""])


def summary(path: Path) -> str:
    """Return the first paragraph of a file's docstring, as one line of Markdown."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{path.relative_to(ROOT)} has no docstring")
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`").replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
