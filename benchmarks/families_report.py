"""The sweep's result as a file with one record per line, and as a table."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import rows

FINE = {"right", "runs padded"}
ORDER = ("right", "runs padded", "refused", "no reference", "wrong", "crashed")
KINDS = {"causal_lm": "decoders", "seq2seq_lm": "encoder-decoders", "masked_lm": "encoders", "body": "bodies"}


SAME = "the same"
"""The reason of a cell whose reason equals that of the cell before it."""


def read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the records of a result and their evidence; both empty if the file does not exist."""
    records, evidence = rows.read(path)
    for before, each in pairwise(records):
        if each.get("reason") == SAME:
            each["reason"] = before["reason"]
    return records, evidence


def write(path: Path, records: list[dict[str, Any]], evidence: dict[str, Any]) -> None:
    """Write the result with one record per line, and its table next to it."""
    records = [_short(each) for each in sorted(records, key=lambda each: (each["kind"], each["type"]))]
    short = records[:1]
    for before, each in pairwise(records):
        same = "reason" in each and each["reason"] == before.get("reason")
        short.append({**each, "reason": SAME} if same else each)
    rows.write(path, short, evidence)
    path.with_suffix(".md").write_text(table(records), encoding="utf-8")


def _short(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with two significant digits, without empty values, and without the advice in a refusal."""
    found = {
        name: float(f"{value:.2g}") if isinstance(value, float) and math.isfinite(value) else value
        for name, value in record.items()
        if value is not None and value != math.inf
    }
    if found["outcome"] == "refused":
        found["reason"] = found["reason"].split("; ")[0]
    return found


def table(records: list[dict[str, Any]]) -> str:
    """Return the counts of each outcome by kind, method and layout, then the names, with the reasons if not right."""
    cells: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for each in records:
        if each["method"] != "*":
            cells[each["kind"], each["method"], each["layout"]][each["outcome"]] += 1
    shown = [outcome for outcome in ORDER if any(found[outcome] for found in cells.values())]
    lines = ["| kind | method | layout | " + " | ".join(shown) + " |", "|---" * (3 + len(shown)) + "|"]
    for kind, title in KINDS.items():
        for (_, method, layout), found in sorted(item for item in cells.items() if item[0][0] == kind):
            counts = " | ".join(str(found[outcome] or "") for outcome in shown)
            lines.append(f"| {title} | {method} | {layout} | {counts} |")
    for outcome in ("wrong", "crashed", "sweep failed", "no reference", "refused", "not built"):
        found = _grouped(records, outcome)
        lines += ["", f"## {outcome}", "", *(found or ["none"])]
    lines += ["", "## right in every cell (packed or, where rows cannot be packed, padded)", ""]
    for kind, title in KINDS.items():
        names = {each["type"] for each in records if each["kind"] == kind and each["outcome"] in FINE}
        names -= {each["type"] for each in records if each["kind"] == kind and each["outcome"] not in FINE}
        lines.append(f"- {title}, {len(names)}: {', '.join(sorted(names))}")
    return "\n".join(lines) + "\n"


def _grouped(records: list[dict[str, Any]], outcome: str) -> list[str]:
    """Return one line per reason, then the types that have it, with their cells unless it is all cells of the kind."""
    cells: dict[tuple[str, str], list[str]] = defaultdict(list)  # of each type and kind
    for each in records:
        cells[each["type"], each["kind"]].append(f"{each['method']} {each['layout']}")
    groups: dict[str, dict[tuple[str, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for each in records:
        if each["outcome"] == outcome:
            reason = _general(each.get("reason", ""), outcome)
            groups[reason][each["type"], each["kind"]].append(f"{each['method']} {each['layout']}")
    lines = []
    for reason, whose in sorted(groups.items()):
        names: dict[str, list[str]] = defaultdict(list)
        for (name, kind), found in sorted(whose.items()):
            where = KINDS[kind] + ("" if found == cells[name, kind] else ": " + ", ".join(found))
            names[where].append(name)
        lines.append(f"- {reason}")
        lines += [f"  - {where}: {', '.join(types)}" for where, types in names.items()]
    return lines


def _general(reason: str, outcome: str) -> str:
    """Return the reason without class names and figures, so that families share it."""
    if outcome == "wrong":  # the JSON file has the figures
        return re.sub(r"(differ|differs|by) [\d.e+-]+(, [\d.e+-]+)*", r"\1 …", reason)
    if outcome != "refused":
        return reason
    reason = reason.split("; ")[0]
    reason = re.sub(r"model type '[^']*'", "model type …", reason)
    reason = re.sub(r"\b[A-Z]\w*(Model|LM|Attention|Encoder|Decoder|Stack|Generation|Config)\b", "…", reason)
    return re.sub(r"[\d.]+(?=%)", "…", reason)
