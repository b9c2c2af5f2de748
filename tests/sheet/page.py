"""Write the family sheet as a page of the documentation: counts, one table per kind of output, refusals by reason."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from transformers import CONFIG_MAPPING

from sheet.configs import base

FINE = ("right", "runs padded")
KINDS = {
    "causal_lm": "Decoders",
    "seq2seq_lm": "Encoder–decoders",
    "masked_lm": "Encoders",
    "body": "Bodies for a trained head",
}
HEAD = """\
# Families of models

`make families` writes this page. It builds every text family that transformers can build, at a tiny size, and
compares ptd with plain transformers: the outputs, the loss, the gradient and the greedily generated text of three
rows of different lengths. Plain transformers runs each row alone, without padding. It reads a prefix through the
textbook formula of attention, or from the model's own cache, and it takes a soft prompt in `inputs_embeds`. Values
are equal if they differ by less than 1e-4 of their root mean square, in fp32. Models are 32 wide and have 2 layers,
or one layer of each kind.

{evidence}

- **prefix**: with *attention*, ptd's attention reads the prefix in place. With *cache*, the model's own cache holds
  it, with a copy per row (`backbone.attention: cache`). A dash: use `prompt` or `p_tuning` instead.
- **soft prompt**: *yes* means virtual tokens before the text and at marks (`prompt`, `p_tuning`); *before* and
  *marks* mean only one of the two.
- **packed**: *yes* means that rows share a line without seeing each other; *padded* means that ptd pads them instead.
- **generation**: *yes* means that a batch has prompts of several lengths; with *one length*, ptd generates for
  prompts of one length together.
- **checkpointing** means the gradient with `backbone.gradient_checkpointing`.

Where there is a dash, ptd refuses with the reason. The numbers in the last column point to the [notes](#notes). A
type with a slash is a family with settings that its default config lacks. CI compares a fifth of the types, and all
that have changed, with this page (`make families-test`).
"""
REFUSED = "refused"


def page(records: list[dict[str, Any]], evidence: dict[str, Any]) -> str:
    """Return the page for all records of the sheet."""
    versions = evidence["versions"]
    said = (
        f"Measured with transformers {versions['transformers']} and torch {versions['torch']}, fp32, on "
        f"{evidence['hardware']}, {evidence['date']}. `tests/sheet/families.json` has every cell."
    )
    notes = _Notes()
    texts = {each["type"] for each in records if each["kind"] != "body" and "cells" in each}
    tables = []
    for kind, title in KINDS.items():
        rows = [each for each in records if each["kind"] == kind and each.get("cells")]
        if kind == "body":
            rows = [each for each in rows if each["type"] not in texts]
        tables.append(_table(title, kind, rows, notes))
    lines = [HEAD.format(evidence=said), *_counts(records), "", *tables, *notes.lines(), "", *_missing(records)]
    return "\n".join(lines).rstrip() + "\n"


class _Notes:
    """Reasons, each with a number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, reason: str) -> int:
        return self._numbers.setdefault(_general(reason), len(self._numbers) + 1)

    def lines(self) -> list[str]:
        return ["## Notes", "", *(f"{number}. {reason}" for reason, number in self._numbers.items())]


def _counts(records: list[dict[str, Any]]) -> list[str]:
    head = ["types", "at least one method", "prefix", "soft prompt", "no method", "not built", "wrong"]
    lines = ["| kind | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for kind, title in KINDS.items():
        rows = [each for each in records if each["kind"] == kind and "/" not in each["type"]]
        rows = [each for each in rows if each.get("outcome") not in ("no text", "no task")]
        built = [each for each in rows if each.get("cells")]
        numbers = (
            len(rows),
            sum(any(works(each, name) for name in ("prefix", "prompt", "marks", "head")) for each in built),
            sum(works(each, "prefix") for each in built),
            sum(works(each, "prompt") for each in built),
            sum(not any(works(each, name) for name in ("prefix", "prompt", "marks", "head")) for each in built),
            sum(each.get("outcome") == "not built" for each in rows),
            sum(any(cell in ("wrong", "crashed") for cell in each.get("cells", {}).values()) for each in rows)
            + sum(each.get("outcome") in ("crashed", "sheet failed") for each in rows),
        )
        lines.append(f"| {title} | " + " | ".join(map(str, numbers)) + " |")
    return lines


def works(record: dict[str, Any], method: str) -> bool:
    """Return whether a method is right in a padded batch, the layout that every family has."""
    return record.get("cells", {}).get(f"{method} padded") == "right"


def _table(title: str, kind: str, rows: list[dict[str, Any]], notes: _Notes) -> str:
    columns = ["family", "type", "prefix", "soft prompt", "packed"]
    columns += ["generation"] if kind in ("causal_lm", "seq2seq_lm") else []
    columns += ["checkpointing", "note"]
    lines = [f"## {title}", ""]
    if kind == "body":
        lines += ["Types without a language model of their own above; a head on the other bodies is compared, too.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_row(each, columns, notes)[name] for name in columns) + " |" for each in rows]
    return "\n".join(lines) + "\n"


def _row(record: dict[str, Any], columns: list[str], notes: _Notes) -> dict[str, str]:
    cells = record["cells"]
    before, marks = works(record, "prompt"), works(record, "marks")
    packed = [outcome for name, outcome in cells.items() if name.endswith(" packed") and outcome != REFUSED]
    return {
        "family": CONFIG_MAPPING[base(record["type"])].__module__.split(".")[-2],
        "type": record["type"],
        "prefix": record["way"] if works(record, "prefix") else _failed(cells, "prefix padded"),
        "soft prompt": "yes" if before and marks else "before" if before else "marks" if marks else
        _failed(cells, "prompt padded"),
        "packed": ("yes" if set(packed) == {"right"} else "padded") if packed else "–",
        "generation": _generation(record),
        "checkpointing": _all(cells, "checkpointed"),
        "note": ", ".join(str(notes.number(reason)) for reason in record.get("why", {})),
    }  # fmt: skip


def _generation(record: dict[str, Any]) -> str:
    found = _all(record["cells"], "generated")
    return "one length" if found == "yes" and record.get("one_length") else found


def _all(cells: dict[str, str], layout: str) -> str:
    """Return whether all methods that the family can do at all are right in a layout."""
    found = {
        outcome
        for name, outcome in cells.items()
        if name.endswith(f" {layout}") and cells.get(f"{name.split()[0]} padded") != REFUSED
    }
    return (
        "–" if not found or REFUSED in found else "yes" if found == {"right"} else ", ".join(sorted(found - {"right"}))
    )


def _failed(cells: dict[str, str], cell: str) -> str:
    return "–" if cells.get(cell) == REFUSED else cells.get(cell, "–")


def _missing(records: list[dict[str, Any]]) -> list[str]:
    """Return the types that were not compared, by reason."""
    lines = ["## Not compared", ""]
    for kind, title in KINDS.items():
        groups: dict[str, list[str]] = defaultdict(list)
        for each in records:
            if each["kind"] == kind and "cells" not in each and each["outcome"] not in ("no text", "no task"):
                groups[f"{each['outcome']}: {each['reason'].split('. ')[0][:200]}"].append(each["type"])
        lines += [f"- {title}: {', '.join(names)}: {reason}" for reason, names in sorted(groups.items())]
    return lines


def _general(reason: str) -> str:
    """Return a reason without class names and figures, so that families share it."""
    reason = re.sub(r"^(attach|run): (backbone\.path: |method\.name: )?", "", reason)
    reason = re.sub(r"`{1,2}", "", reason).replace("|", "/").replace("<", "‹").replace(">", "›")
    reason = re.sub(
        r"\b[A-Z]\w*(Model|LM|Attention|Encoder|Decoder|Stack|Generation|Config|Text)\b", "the model", reason
    )
    reason = re.sub(r"\bbackbones of type '[^']*' take no prefix\b", "no prefix", reason)
    return re.sub(r"\b\d+\.\d+%", "…%", reason)
