"""The sweep's result as a file with a record a line, and as a table."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

ORDER = ("right", "runs padded", "refused", "no reference", "wrong", "crashed")
KINDS = {"causal_lm": "decoders", "seq2seq_lm": "encoder-decoders", "masked_lm": "encoders", "body": "bodies"}


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a result; none where there is no file."""
    if not path.is_file():
        return []
    records: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["records"]
    return records


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """The result with a record a line, and its table beside it."""
    records = sorted(records, key=lambda each: (each["kind"], each["type"]))
    lines = ",\n".join(json.dumps(_short(each)) for each in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(f'{{"records": [\n{lines}\n]}}\n', encoding="utf-8")
    part.replace(path)
    path.with_suffix(".md").write_text(table(records), encoding="utf-8")


def _short(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: float(f"{value:.3g}") if isinstance(value, float) else value
        for name, value in record.items()
        if value is not None
    }


def table(records: list[dict[str, Any]]) -> str:
    """Counts of each outcome by kind, method and layout; then who is wrong, crashed, refused or not built, and why."""
    cells: dict[tuple[str, str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for each in records:
        if each["method"] != "*":
            cells[each["kind"], each["method"], each["layout"]][each["outcome"]].append(each["type"])
    shown = [outcome for outcome in ORDER if any(outcome in found for found in cells.values())]
    lines = ["| kind | method | layout | " + " | ".join(shown) + " |", "|---" * (3 + len(shown)) + "|"]
    for (kind, method, layout), found in sorted(cells.items()):
        counts = " | ".join(str(len(found[outcome])) if outcome in found else "" for outcome in shown)
        lines.append(f"| {KINDS[kind]} | {method} | {layout} | {counts} |")
    for outcome in ("wrong", "crashed", "sweep failed", "no reference", "refused", "not built"):
        lines += ["", f"## {outcome}", ""]
        lines += _grouped([each for each in records if each["outcome"] == outcome])
    return "\n".join(lines) + "\n"


def _grouped(records: list[dict[str, Any]]) -> list[str]:
    """A line a type and reason, with the cells that have it."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for each in records:
        groups[each["type"], each.get("reason", "")].append(f"{each['kind']}/{each['method']}/{each['layout']}")
    return [f"- **{name}** ({', '.join(where)}): {reason}" for (name, reason), where in sorted(groups.items())]
