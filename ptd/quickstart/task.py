"""The quickstart's tuning task: write an advert in a new style from a restaurant's record in a new format.

Pretraining teaches the words, but not the record format and the sentences, so the frozen backbone cannot do the task
without a prefix but can with one. The style has a few fixed rules:

- the text starts with price and food in this order ("If you want cheap Thai meals, "), whatever their order in the
  record; if both are missing, it starts with "If you want a meal, ";
- area (always known) and landmark follow the name ("go to Belmora in the old town, next to Tarvin Gate.");
- the slot ``family`` becomes "Good for children." or "Not for children.";
- the text ends with the rating ("Guests rated it 4 out of 5.").

Every name in the evaluation rows is held out of the pretraining corpus and absent from the training rows.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from ptd.quickstart.domains import DOMAINS
from ptd.quickstart.names import DROP_PROBABILITY, draw_value, invent_name

Row = dict[str, str]

SLOTS = tuple(DOMAINS["restaurant"].slots)
# When some rows had no area, the most frequent mistake with the tuned prefix on the evaluation rows was to invent one.
ALWAYS_KNOWN = ("area",)


def render_prompt(values: dict[str, str]) -> str:
    """Return the record as one line, with its slots in the order of ``values``."""
    return " | ".join(f"{slot}: {value}" for slot, value in values.items())


def parse_prompt(prompt: str) -> dict[str, str]:
    """Return the slots of a prompt made by `render_prompt`. Only its last line counts; examples may precede it."""
    line = prompt.strip().splitlines()[-1]
    return dict(field.split(": ", 1) for field in line.split(" | "))


def render_completion(values: dict[str, str]) -> str:
    """Return the reference text for a record."""
    wanted = [values[slot] for slot in ("price", "food") if slot in values]
    text = f"If you want {' '.join(wanted)} meals, " if wanted else "If you want a meal, "
    text += f"go to {values['name']}"
    if "area" in values:
        text += f" in the {values['area']}"
    if "near" in values:
        text += f", next to {values['near']}"
    text += "."
    if "family" in values:
        text += " Good for children." if values["family"] == "yes" else " Not for children."
    if "rating" in values:
        text += f" Guests rated it {values['rating']} out of 5."
    return text


def _make_row(rng: random.Random, held_out: bool) -> Row:
    values = {"name": invent_name(rng, held_out)}
    for slot in SLOTS:
        value = draw_value(rng, DOMAINS["restaurant"].slots[slot].values, held_out)
        if rng.random() >= DROP_PROBABILITY or slot in ALWAYS_KNOWN:
            values[slot] = value
    return {"prompt": render_prompt(values), "completion": render_completion(values)}


def make_rows(seed: int = 0, train_rows: int = 400, eval_rows: int = 100) -> tuple[list[Row], list[Row]]:
    """Return training and evaluation rows, each ``{"prompt", "completion"}``; no name occurs in both."""
    rng = random.Random(seed)
    train = [_make_row(rng, held_out=False) for _ in range(train_rows)]
    return train, [_make_row(rng, held_out=True) for _ in range(eval_rows)]


def write_task(folder: str | Path) -> tuple[Path, Path]:
    """Write the task in its default sizes as ``train.jsonl`` and ``eval.jsonl``, and return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, rows in zip(paths, make_rows(), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def slot_accuracy(prompt: str, output: str) -> float:
    """Return the fraction of the prompt's slots that the output expresses correctly, in any style.

    A value is correct if it occurs as a whole phrase. ``family`` is correct if the output has a clause about children
    or families and every such clause is negative exactly for "no". The measure is lenient about style on purpose; exact
    match is the strict measure.
    """
    values = parse_prompt(prompt)
    return sum(_expresses(output, slot, value) for slot, value in values.items()) / len(values)


def _expresses(output: str, slot: str, value: str) -> bool:
    if slot != "family":
        return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", output) is not None
    about = [
        part for part in re.split(r"[.!?,\n]| and ", output) if re.search(r"child|famil|\bkids?\b", part, re.IGNORECASE)
    ]
    negative = [bool(re.search(r"\b(not?|without|never)\b", part, re.IGNORECASE)) for part in about]
    return bool(about) and all(flag == (value == "no") for flag in negative)
