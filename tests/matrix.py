"""List the methods, families and tasks to combine, say which make sense together, and choose a few that cover all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

from families import ENCODER_DECODERS, ENCODERS, FAMILIES

BACKBONES = (*FAMILIES, *ENCODERS, *ENCODER_DECODERS)
STEPS, BATCH = 3, 2

METHODS: dict[str, dict[str, Any]] = {
    "head": {"name": "head", "hidden_sizes": [8]},
    "hard_prompt": {"name": "hard_prompt"},
    "prompt": {"name": "prompt", "num_virtual_tokens": 3},
    "p_tuning-marks": {"name": "p_tuning", "encoder_hidden_size": 8},
    "p_tuning-front": {"name": "p_tuning", "num_virtual_tokens": 3, "encoder_reparameterization_type": "mlp"},
    "prefix-direct": {"name": "prefix", "num_virtual_tokens": 3},
    "prefix-mlp": {"name": "prefix", "num_virtual_tokens": 3, "prefix_projection": True, "freeze_first_token": True},
    "p_tuning_v2-direct": {"name": "p_tuning_v2", "num_virtual_tokens": 3},
    "p_tuning_v2-mlp": {"name": "p_tuning_v2", "num_virtual_tokens": 3, "prefix_projection": True},
}
WORDS = {"bad": ["no", "x"], "good": ["yes"]}  # one token per byte: words of one, two and three tokens
TASKS: dict[str, dict[str, Any]] = {
    "causal_lm": {"kind": "causal_lm"},
    "seq2seq_lm": {"kind": "seq2seq_lm"},
    "classification": {"kind": "classification", "class_weights": "balanced"},
    "cloze": {"kind": "classification", "patterns": ["{text} is {mask}.", "{text}? {mask}"], "verbalizer": WORDS},
    "token_classification": {"kind": "token_classification"},
    "question_answering": {"kind": "question_answering", "doc_stride": 8},
}
MARKED: dict[str, dict[str, Any]] = {
    "causal_lm": {"data": {"prompt_template": "{v:2} {prompt} {v:1} is"}},
    "seq2seq_lm": {"data": {"prompt_template": "{v:2} {prompt} {v:1}"}},
    "classification": {"task": {"patterns": ["{v:1} {text} {v:2}"]}},
    "cloze": {"task": {"patterns": ["{v:2} {text} {v:1} {mask}"]}},
}
"""Settings added to a task so that its sequences contain marks for virtual tokens."""
WITH_HEAD = ("classification", "token_classification", "question_answering")

ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"{index} and {index % 4}",
        "completion": "ab" * (1 + index * 5 % 4),
        "text": "fine " * (index % 3) + f"row {index}",
        "label": "good" if index % 3 else "bad",
        "tokens": ["ann", "is", "in", "oslo"][: 2 + index % 3],
        "tags": ["B-PER", "O", "O", "B-LOC"][: 2 + index % 3],
        "question": "who?",
        "context": "he saw " * (1 + index * 2 % 5) + f"ann {index}",
        "answers": f"ann {index}" if index % 4 else "",
    }
    for index in range(STEPS * BATCH)
]
"""Rows with the columns of every task; contexts of up to 40 tokens need more than one window."""

Case = TypeVar("Case", bound=Sequence[str])


def makes_sense(method: str, family: str, task: str) -> bool:
    """Return whether ptd runs this method for the task on a backbone of the family; it refuses all others."""
    decoder, encoder_decoder = family in FAMILIES, family in ENCODER_DECODERS
    if task in ("causal_lm", "seq2seq_lm") and not (decoder if task == "causal_lm" else encoder_decoder):
        return False
    if task == "cloze" and encoder_decoder:
        return False
    name = METHODS[method]["name"]
    if name in ("head", "p_tuning_v2"):
        return task in WITH_HEAD
    if name == "hard_prompt":
        return task == "cloze"
    return task in MARKED or method != "p_tuning-marks"


def pairs(case: Sequence[str]) -> set[tuple[int, int, str, str]]:
    """Return every pair of a case's values, with their places in the case."""
    return {(one, other, case[one], case[other]) for one, other in itertools.combinations(range(len(case)), 2)}


def covering(cases: Sequence[Case]) -> list[Case]:
    """Return a few of the cases that together contain every pair of all cases (a greedy choice)."""
    found = {case: pairs(case) for case in cases}
    missing = set().union(*found.values())
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(found[case] & missing))
        chosen.append(best)
        missing -= found[best]
    return chosen
