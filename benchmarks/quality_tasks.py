"""The tasks of ``benchmarks/quality.py``: their training, development and test rows, and the metrics of generated text.

- ``e2e``: E2E NLG (Novikova et al. 2017, https://aclanthology.org/W17-5525): a meaning representation (``mr``)
  becomes a text (``ref``). The prompt is the mr and a line break; the completion is the ref. Every 10th distinct mr is
  held out with all its rows, so no mr is in two splits. Every 4th held-out mr is for development, the others are for
  the test.
- ``sst2``: sentiment of a sentence (Socher et al. 2013, https://aclanthology.org/D13-1170) by the causal model. Every
  5th row of the development file is for development, the others are for the test.
- ``sst2-encoder``: the same rows, by the encoder.

A sample takes rows at equal distances, so it depends only on the file.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Row = dict[str, str]

TASKS = ("e2e", "sst2", "sst2-encoder")
FILES = {"e2e": ("e2e_dev.csv",), "sst2": ("sst2_train.tsv", "sst2_dev.tsv")}
FILES["sst2-encoder"] = FILES["sst2"]
LABELS = {"0": "negative", "1": "positive"}
PATTERN = "{text} It was {mask}."
"""One of the two patterns of launch/recipes/classification_cloze.yaml, whose label words `VERBALIZER` has."""
VERBALIZER = {"negative": ["terrible", "bad"], "positive": ["great", "good"]}
TEMPLATE = "{prompt}\n"
HELD_OUT, DEVELOPMENT, DEVELOPMENT_ROWS = 10, 4, 5
TEST_ROWS, TEST_MRS = 200, 64
"""E2E: the maximum number of rows for the loss, and the maximum number of mrs for generation."""
UNWRITTEN = frozenset({"familyFriendly"})
"""Slots whose value (yes, no) does not occur in the texts."""


@dataclass(frozen=True)
class Material:
    """The rows of a task. ``mrs``, only for E2E: the mrs to generate texts for, each with all its references."""

    train: list[Row]
    development: list[Row]
    test: list[Row]
    mrs: dict[str, list[str]]


def sample(items: Sequence[T], count: int) -> list[T]:
    """Return at most ``count`` items, at equal distances."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def read_e2e(file: Path) -> list[Row]:
    """Return rows ``{"prompt", "completion"}`` of a CSV file with the columns ``mr`` and ``ref``, in file order."""
    with file.open(encoding="utf-8", newline="") as lines:
        return [{"prompt": row["mr"], "completion": row["ref"]} for row in csv.DictReader(lines)]


def read_sst2(file: Path) -> list[Row]:
    """Return rows ``{"text", "label"}`` of a file whose lines are a sentence, a tab, and 0 or 1."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        text, _, label = line.rpartition("\t")
        rows.append({"text": text, "label": LABELS[label]})
    return rows


def split_e2e(rows: Sequence[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Return training, development and test rows, split by distinct prompt."""
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(row["prompt"] for row in rows))}
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for row in rows:
        tenth, rest = divmod(number[row["prompt"]], HELD_OUT)
        parts[0 if rest else 1 if tenth % DEVELOPMENT == 0 else 2].append(row)
    return parts


def material(task: str, folder: Path, *, test_rows: int = TEST_ROWS, test_mrs: int = TEST_MRS) -> Material:
    """Return the rows of ``task`` from the files of ``folder``. SST-2 keeps all its development and test rows unless
    ``test_rows`` is less than `TEST_ROWS`."""
    if task == "e2e":
        train, development, test = split_e2e(read_e2e(folder / FILES[task][0]))
        references: dict[str, list[str]] = {}
        for row in test:
            references.setdefault(row["prompt"], []).append(row["completion"])
        mrs = {mr: references[mr] for mr in sample(list(references), test_mrs)}
        return Material(train, sample(development, test_rows // 2), sample(test, test_rows), mrs)
    train, held_out = (read_sst2(folder / name) for name in FILES[task])
    development = held_out[::DEVELOPMENT_ROWS]
    test = [row for index, row in enumerate(held_out) if index % DEVELOPMENT_ROWS]
    if test_rows < TEST_ROWS:
        development, test = sample(development, test_rows), sample(test, test_rows)
    return Material(train, development, test, {})


def write_material(found: Material, folder: Path) -> None:
    """Write train.jsonl, development.jsonl, test.jsonl and mrs.json into ``folder``, which may exist already."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "development", "test"):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in getattr(found, name))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "mrs.json").write_text(json.dumps(found.mrs, ensure_ascii=False), encoding="utf-8")


def read_mrs(folder: Path) -> dict[str, list[str]]:
    """Return mr -> its references, as `write_material` wrote them."""
    found: dict[str, list[str]] = json.loads((folder / "mrs.json").read_text(encoding="utf-8"))
    return found


def slots(mr: str) -> list[tuple[str, str]]:
    """Return the name and value of each slot of an mr such as ``name[The Eagle], eatType[coffee shop]``."""
    return [(name.strip(), value) for name, value in re.findall(r"([^\[\],]+)\[([^\]]*)\]", mr)]


def _plain(text: str) -> str:
    return " ".join(text.lower().replace("-", " ").split())


def slots_found(mr: str, text: str) -> tuple[int, int]:
    """Return how many of the mr's slot values occur in the text, and how many slot values count.

    A value is found if the text contains it verbatim, as whole words; case does not matter, a hyphen equals a space,
    and a run of white space equals one space. Slots of `UNWRITTEN` do not count. A paraphrased value (£20-25 as
    "moderately priced") is not found, so texts written by people do not reach 100 % either.
    """
    values = [_plain(value) for name, value in slots(mr) if name not in UNWRITTEN]
    read = _plain(text)
    found = sum(bool(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", read)) for value in values)
    return found, len(values)


def slot_rate(pairs: Iterable[tuple[str, str]]) -> float:
    """Return the share, 0 to 100, of all slot values that occur in their texts; ``pairs``: mr and text."""
    counts = [slots_found(mr, text) for mr, text in pairs]
    return 100 * sum(found for found, _ in counts) / sum(there for _, there in counts)


def corpus_bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the BLEU-4 of a corpus, 0 to 100, each text against all its references, whose number may differ.

    sacrebleu computes it, with its defaults (tokeniser 13a, case-sensitive, exponential smoothing; Post 2018,
    https://aclanthology.org/W18-6319). Raises ValueError for a text without references, or without texts.
    """
    import sacrebleu

    if not texts or not all(references):
        raise ValueError("every text needs at least one reference")
    most = max(map(len, references))
    # One stream per reference; sacrebleu ignores None, which pads the texts with fewer references.
    streams = [[each[number] if number < len(each) else None for each in references] for number in range(most)]
    stripped = [text.strip() for text in texts]
    return float(sacrebleu.corpus_bleu(stripped, streams).score)  # type: ignore[arg-type]


def text_metrics(texts: Mapping[str, str], mrs: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return ``bleu`` and ``slots`` of the texts (mr -> text), and ``texts``, their number."""
    return {
        "bleu": corpus_bleu([texts[mr] for mr in mrs], list(mrs.values())),
        "slots": slot_rate((mr, texts[mr]) for mr in mrs),
        "texts": len(mrs),
    }


def slots_of_references(mrs: Mapping[str, Sequence[str]]) -> float:
    """Return the slot rate of all references, which people wrote: approximately the rate of a good text."""
    return slot_rate((mr, text) for mr, texts in mrs.items() for text in texts)


def task_sections(task: str, *, trained_head: bool) -> dict[str, dict[str, Any]]:
    """Return ptd's ``task`` and ``data`` sections, without files. ``trained_head``: labels by a head, not by words."""
    if task == "e2e":
        return {"task": {"kind": "causal_lm"}, "data": {"prompt_template": TEMPLATE}}
    section: dict[str, Any] = {"kind": "classification", "labels": list(LABELS.values())}
    if not trained_head:
        section |= {"patterns": [PATTERN], "verbalizer": VERBALIZER}
    return {"task": section, "data": {}}


def rows_of(file: Path) -> Iterator[Row]:
    """Return an iterator over the rows of a file that `write_material` wrote."""
    return (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
