"""The source follows the import table of docs/architecture.md, which says who may import whom."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PTD = sorted((ROOT / "ptd").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))

ARCHITECTURE = ROOT / "docs" / "architecture.md"


def read_layers(page: str) -> dict[str, list[str]]:
    """Return module pattern -> the parts of ptd that it may import, from the page's section "Who imports whom"."""
    told = page.split("## Who imports whom")[1]
    first, table = told.split("| module | may import | why |")
    lines = re.findall(r"^\| (\*\w+\*) \| (.+?) +\|$", first, flags=re.M)
    groups = {name: cell.split(", ") for name, cell in lines}
    layers: dict[str, list[str]] = {}
    for module, cell in re.findall(r"^\| (`\S+`|\*\w+\*) \| (.*?) +\|.*\|$", table, flags=re.M):
        allowed = [part for name in cell.split(", ") if name != "–" for part in groups.get(name, [name])]
        for pattern in [f"ptd.{part}" for part in groups[module]] if module in groups else [module.strip("`")]:
            layers.setdefault(pattern, allowed)
    return layers


LAYERS = read_layers(ARCHITECTURE.read_text(encoding="utf-8"))

# Third-party package -> the modules that may import it.
ONLY_IMPORTERS = {
    "pydantic": ["ptd.config*"],
    "deepspeed": ["ptd.distributed*"],
    "transformers.integrations.deepspeed": ["ptd.backbone*"],
    "datasets": ["ptd.data*", "ptd.tasks*"],
    "ptd_kernels": ["ptd.inject*", "ptd.backbone.fp8", "ptd_kernels*"],
    "liger_kernel": ["ptd.backbone.liger", "ptd.backbone.residual_norm"],
    "typer": ["ptd.cli*"],
    "rich": ["ptd.console"],
    "jinja2": ["ptd.inspection*", "ptd.launch*", "ptd.report*"],
    "tensorboard": ["ptd.trackers.tensorboard"],
    "wandb": ["ptd.trackers.wandb"],
    "mlflow": ["ptd.trackers.mlflow"],
}

# Modules that may import only these third-party packages (the standard library is always allowed).
PURE = {
    "ptd.types": {"torch", "numpy"},
    "ptd.config*": {"pydantic", "yaml"},
    "ptd.methods*": {"torch"},
    "ptd.readouts*": {"torch"},
    "ptd_kernels*": {"torch", "triton", "ptd_kernels"},
}
THIRD_PARTY = set(
    """
    accelerate bitsandbytes datasets deepspeed einops flash_attn huggingface_hub jinja2 liger_kernel matplotlib numpy
    pandas peft ptd_kernels pyarrow pydantic rich rouge_score sacrebleu safetensors scipy seqeval sklearn
    tokenizers torch torchmetrics tqdm transformers triton typer yaml
    """.split()  # noqa: SIM905
)


@cache
def tree_of(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a bad escape in a string, for example
        return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_of(path: Path) -> str:
    root = ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of every import in the file; ``from ptd import x`` counts as ``ptd.x``."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            modules = {name for name in names if exists(name)}
            yield from ((node.lineno, name) for name in modules or {base})
            if modules and len(modules) < len(names):
                yield node.lineno, base


def fits(module: str, patterns: list[str]) -> bool:
    """Return whether the module matches a pattern; ``ptd.data*`` is the package and everything in it."""
    return any(
        module == pattern or (pattern.endswith("*") and f"{module}.".startswith(f"{pattern[:-1]}."))
        for pattern in patterns
    )


def within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def complaint(path: Path, line: int, text: str) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {text}"


def violations(path: Path) -> list[str]:
    module, found = module_of(path), []
    layer = next((pattern for pattern in LAYERS if fits(module, [pattern])), None)
    if module.startswith("ptd") and not module.startswith("ptd_kernels") and layer is None:
        return [complaint(path, 1, f"{module} has no place in the table of docs/architecture.md; give it one there")]
    for line, name in imports_of(path):
        if layer is not None and (name == "ptd" or name.startswith("ptd.")):
            own = [layer] if layer != "ptd" else []
            if not fits(name, own) and not any(within(name, f"ptd.{part}") for part in LAYERS[layer]):
                found.append(complaint(path, line, f"{module} may not import {name}"))
        if layer is None and (name == "ptd" or name.startswith("ptd.")):
            found.append(complaint(path, line, f"ptd_kernels stands alone; it may not import {name}"))
        for package, importers in ONLY_IMPORTERS.items():
            if within(name, package) and not fits(module, importers):
                found.append(complaint(path, line, f"only {', '.join(importers)} may import {package}"))
        for pattern, allowed in PURE.items():
            top = name.split(".")[0]
            if fits(module, [pattern]) and top in THIRD_PARTY and top not in allowed:
                found.append(complaint(path, line, f"{module} has to do without {top}"))
    return found


def test_the_table_is_read() -> None:
    assert LAYERS["ptd.methods*"] == ["types", "files"]
    assert LAYERS["ptd.async_copy"] == []
    assert {"types", "config", "engine", "runs"} <= set(LAYERS["ptd.commands.train"])
    assert {"backbone", "commands", "console"} <= set(LAYERS["ptd.cli*"])
    assert "engine" not in LAYERS["ptd.api"]


def test_no_command_imports_another() -> None:
    commands = [f"ptd.commands.{path.stem}" for path in (ROOT / "ptd" / "commands").glob("[a-z]*.py")]
    assert {"ptd.commands.train", "ptd.commands.plan"} <= set(commands) <= set(LAYERS)
    assert [name for name in commands if "commands" in LAYERS[name]] == []


@pytest.mark.parametrize("path", PTD + KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path: Path) -> None:
    assert not violations(path), "\n".join(violations(path))


@pytest.mark.parametrize("path", PTD + KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(tree_of(path)), f"{path.relative_to(ROOT)} has no docstring"


def compared_strings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and value of each string literal compared or matched with a method's name, or with any other name."""
    for node in ast.walk(tree_of(path)):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            parts = [node.subject, *(case.pattern for case in node.cases)]
        if not any("method" in ast.unparse(part) or "name" in ast.unparse(part) for part in parts):
            continue
        for part in parts:
            for leaf in ast.walk(part):
                if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                    yield leaf.lineno, leaf.value


def test_no_method_is_told_by_its_name_outside_the_methods() -> None:
    from ptd.methods import methods

    names = set(methods())
    assert names
    found = [
        complaint(path, line, f"compares with the name of a method, {text!r}; let the method's own file decide")
        for path in PTD
        if not fits(module_of(path), ["ptd.methods*"])
        for line, text in compared_strings(path)
        if text in names
    ]
    assert not found, "\n".join(found)


INTERFACES = {
    "ptd.methods": {"build", "check", "head"},
    "ptd.tasks": {"build"},
    "ptd.trackers": {"start"},
}
"""Package -> the functions that each of its modules may define, because the package calls all of them alike."""
REGISTRIES = {"register"}
"""Functions that packages define to register their methods, or their kinds of task."""
PROGRAMS = {"main"}


def homes() -> dict[str, list[str]]:
    """Return the public functions and classes of ptd and its kernels: name -> the modules that define it."""
    found: dict[str, list[str]] = {}
    for path in [*PTD, *KERNELS]:
        for node in tree_of(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module_of(path))
    return found


def test_a_public_name_has_one_meaning() -> None:
    """The commands of ``ptd.cli`` carry the names of the functions that they call."""
    twice = {}
    for name, modules in homes().items():
        rest = [
            module
            for module in modules
            if name not in PROGRAMS | REGISTRIES
            and not any(within(module, package) and name in names for package, names in INTERFACES.items())
        ]
        if len(rest) > 1 and not (len(rest) == 2 and any(within(module, "ptd.cli") for module in rest)):
            twice[name] = rest
    assert not twice, f"rename all but one of {twice}"


def test_kernels_is_no_package() -> None:
    """A regular package `kernels` here would shadow Hugging Face's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


def test_methods_are_independent_of_each_other() -> None:
    """One file is one method: adding or removing a method changes no other file."""
    from ptd.methods import methods

    files = {f"ptd.methods.{name}" for name in methods()}
    found = [
        complaint(path, line, f"imports the method {name}")
        for path in PTD
        for line, name in imports_of(path)
        if name in files and name != module_of(path)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("where", "source", "said"),
    [
        ("ptd/data/x.py", "from ptd.backbone import load_model", "may not import ptd.backbone"),
        ("ptd/data/x.py", "from ptd import engine", "may not import ptd.engine"),
        ("ptd/data/x.py", "from ..engine import loop", "may not import ptd.engine.loop"),
        ("ptd/engine/x.py", "def f():\n    import ptd.commands.train", "may not import ptd.commands.train"),
        ("ptd/backbone/x.py", "import deepspeed.comm", "only ptd.distributed* may import deepspeed"),
        ("ptd/methods/x.py", "from transformers import AutoModel", "do without transformers"),
        ("ptd/surprise.py", "import os", "has no place in the table"),
        ("kernels/ptd_kernels/x.py", "import ptd.types", "stands alone"),
        ("ptd/engine/x.py", "from ptd_kernels import prefix_attention", "only ptd.inject*, ptd.backbone.fp8"),
        ("ptd/data/x.py", "import datasets\nfrom ptd.types import Batch\nfrom ptd.data.batches import Batches", ""),
        ("ptd/backbone/x.py", "from transformers.integrations.deepspeed import HfDeepSpeedConfig", ""),
    ],
)
def test_the_test_sees(monkeypatch: pytest.MonkeyPatch, where: str, source: str, said: str) -> None:
    monkeypatch.setitem(globals(), "tree_of", lambda path: ast.parse(source))
    found = violations(ROOT / where)
    assert (said in found[0]) if said else not found
