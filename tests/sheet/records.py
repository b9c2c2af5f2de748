"""The records of the family sheet: one per model type and kind of output, in families.json, one per line.

``cells``: "method layout" -> right, refused, … ; ``why``: reason -> the cells that have it. A type that could not be
compared has ``outcome`` and ``reason`` instead. ``digest``: of the code (without comments
and docstrings) and settings that the record depends on.
"""

from __future__ import annotations

import ast
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

from ptd.bench.machine import evidence
from sheet.configs import base
from sheet.page import page
from sheet.special import SPECIAL, TOWERS, VARIANTS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILE = HERE / "families.json"
PAGE = ROOT / "docs" / "families.md"
CODE = ("ptd/inject", "kernels/ptd_kernels/prefix_attention", "tests/sheet")
NOT_MEASURING = {"special.py", "page.py", "records.py", "explain.py", "attention_shares.py", "compile.py"}
"""Files of `CODE` on which no record depends, or of which a record has its own part."""
FAULTS = {"wrong", "crashed", "sheet failed"}
FACTS = ("way", "one_length")


def folded(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one record for the cells of one type and kind."""
    if found[0]["method"] == "*":
        return {"outcome": found[0]["outcome"], "reason": found[0]["reason"]}
    cells, why = {}, {}
    facts: dict[str, Any] = {}
    for each in found:
        name = f"{each['method']} {each['layout']}"
        cells[name] = each["outcome"]
        facts |= {fact: each[fact] for fact in FACTS if fact in each}
        if each.get("reason"):
            why.setdefault(
                each["reason"].split("; ")[0] if each["outcome"] == "refused" else each["reason"], []
            ).append(name)
    return {"cells": cells, "why": why, **facts}


def faults(record: dict[str, Any]) -> list[str]:
    """Return what is wrong in a record, whatever the sheet says."""
    if record.get("outcome") in FAULTS:
        return [f"{record['outcome']}: {record['reason']}"]
    return [
        f"{name}: {outcome}: {reason_of(record, name)}"
        for name, outcome in record.get("cells", {}).items()
        if outcome in FAULTS
    ]


def differences(record: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """Return how a record differs from that of the sheet. What a missing package leaves out is no difference."""
    name = f"{record['type']} {record['kind']}"
    if before is None:
        return [f"{name}: not in the sheet"]
    if any("ImportError" in each.get("reason", "") for each in (record, before)):
        return []
    old, new = (each.get("cells") or {"*": each.get("outcome")} for each in (before, record))
    return [
        f"{name}: {cell}: {new.get(cell)}, in the sheet {old.get(cell)} ({reason_of(record, cell)})"
        for cell in {**old, **new}
        if old.get(cell) != new.get(cell)
    ]


def reason_of(record: dict[str, Any], cell: str) -> str:
    """Return why a cell is not right; empty if there is no reason."""
    named = (reason for reason, cells in record.get("why", {}).items() if cell in cells)
    return next(named, record.get("reason", ""))


def read() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the records of the committed sheet and its evidence; both empty if there is none."""
    if not FILE.is_file():
        return [], {}
    found = json.loads(FILE.read_text(encoding="utf-8"))
    return found["records"], found["evidence"]


def write(records: list[dict[str, Any]]) -> None:
    """Write the sheet and its page."""
    found_by = {**evidence(), "command": "python tests/family_sheet.py"}
    records = sorted(records, key=lambda each: (each["kind"], each["type"]))
    lines = ",\n".join(json.dumps(each) for each in records)
    FILE.write_text(f'{{"evidence": {json.dumps(found_by)},\n"records": [\n{lines}\n]}}\n', encoding="utf-8")
    PAGE.write_text(page(records, found_by), encoding="utf-8")


@cache
def code_digest() -> str:
    """Return a digest of ptd's code for prompts in models, and of the sheet's own, without comments and docstrings."""
    files = [
        file for folder in CODE for file in sorted((ROOT / folder).rglob("*.py")) if file.name not in NOT_MEASURING
    ]
    return _digest(*(_code(file.read_bytes()) for file in files))


@cache
def digest_of(model_type: str) -> str:
    """Return a digest of ptd's code, the type's code in transformers, and the settings of its tiny model."""
    name = base(model_type)
    module = CONFIG_MAPPING[name].__module__.rsplit(".", 1)[0].removeprefix("transformers.").replace(".", "/")
    folder = Path(transformers.__file__).parent / module
    settings = [transformers.__version__, SPECIAL.get(name), TOWERS.get(name), VARIANTS.get(model_type)]
    files = sorted([*folder.glob("modeling_*.py"), *folder.glob("configuration_*.py")])
    return _digest(code_digest().encode(), json.dumps(settings).encode(), *(file.read_bytes() for file in files))


def _code(source: bytes) -> bytes:
    """Return a text that is the same for two sources of the same code."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [each for each in node.body if not _is_text(each)]
    return ast.dump(tree).encode()


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()[:12]
