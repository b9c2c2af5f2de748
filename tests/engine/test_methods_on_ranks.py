"""Every method and task gives the same on two ranks with a sharded backbone as in one process with a whole one.

worker_methods.py runs all cases in one launch; each test here checks one of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import save_backbone

WORKER = Path(__file__).with_name("worker_methods.py")

# Both sides compute in fp32, but sum in different orders.
TOLERANCE = 1e-5

CLOZE = {"kind": "classification", "verbalizer": {"bad": ["no", "x"], "fair": ["okay"], "good": ["yes"]}}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "head, class weights": (
        "bert",
        {"name": "head", "hidden_sizes": [8]},
        {"kind": "classification", "class_weights": {"bad": 4.0, "fair": 0.25}},
    ),
    "prompt, classification by a decoder": (
        "llama",
        {"name": "prompt", "num_virtual_tokens": 3},
        {"kind": "classification"},
    ),
    "p_tuning at marks, cloze, class weights": (
        "roberta",
        {"name": "p_tuning", "encoder_hidden_size": 8},
        {**CLOZE, "patterns": ["{v:2} {text} {v:1} {mask}"], "class_weights": "balanced"},
    ),
    "prompt, cloze by a decoder": (
        "llama",
        {"name": "prompt", "num_virtual_tokens": 3},
        {**CLOZE, "patterns": ["{text} It is {mask}", "{text}? {mask}."]},
    ),
    "p_tuning_v2, tags, class weights": (
        "bert",
        {"name": "p_tuning_v2", "num_virtual_tokens": 3},
        {"kind": "token_classification", "class_weights": "balanced"},
    ),
    "p_tuning_v2 by an MLP, tags": (
        "gpt2",
        {"name": "p_tuning_v2", "num_virtual_tokens": 3, "prefix_projection": True},
        {"kind": "token_classification"},
    ),
    "prefix by MLPs, seq2seq": (
        "t5",
        {"name": "prefix", "num_virtual_tokens": 3, "prefix_projection": True},
        {"kind": "seq2seq_lm"},
    ),
    "prefix, seq2seq": ("bart", {"name": "prefix", "num_virtual_tokens": 3}, {"kind": "seq2seq_lm"}),
    "prompt, seq2seq": ("t5", {"name": "prompt", "num_virtual_tokens": 3}, {"kind": "seq2seq_lm"}),
    "head, answers": ("modernbert", {"name": "head"}, {"kind": "question_answering", "doc_stride": 8}),
    "prefix by an MLP, answers": (
        "distilbert",
        {"name": "prefix", "num_virtual_tokens": 3, "prefix_projection": True},
        {"kind": "question_answering", "doc_stride": 8},
    ),
}
UNEVEN = tuple(name for name in CASES if any(word in name for word in ("class weights", "tags", "seq2seq")))
"""Cases whose rows have different weights: the mean of the ranks' means is not the mean over all rows."""
# A step takes four of the six rows (for question answering seven, because one context has two windows). The second step
# has only two or three rows, so that some slots have no row. Texts, targets, words and labels differ from row to row.
ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"{index} and {index % 4}",
        "completion": "ab" * (1 + index * 5 % 7),
        "text": "fine " * (index * 3 % 5) + f"row {index}",
        "label": ("bad", "fair", "good", "fair")[index % 4],
        "tokens": ["ann", "is", "in", "oslo", "now"][: 1 + index * 2 % 5],
        "tags": ["B-PER", "O", "O", "B-LOC", "O"][: 1 + index * 2 % 5],
        "question": "who?",
        "context": f"ann {index}" + " he saw" * (0, 2, 5, 1, 0, 3)[index],
        "answers": f"ann {index}" if index % 3 else "",
    }
    for index in range(6)
]


@pytest.fixture(scope="module")
def measured(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("methods")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    backbones = {family: save_backbone(folder / family, family) for family, _, _ in CASES.values()}
    runs = {
        name: {
            "backbone": {"path": str(backbones[family]), "dtype": "float32"},
            "method": method,
            "task": task,
            "data": {"train": str(rows), "eval": str(rows), "max_length": 40},
            "train": {
                "max_steps": 2,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 2,
                "learning_rate": 0.01,
                "max_grad_norm": 0,
                "logging_steps": 1,
            },
            # A threshold of 0, because by default DeepSpeed would shard no weight of backbones as small as these.
            "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
            "output_dir": str(folder / "out" / str(number)),
        }
        for number, (name, (family, method, task)) in enumerate(CASES.items())
    }
    (folder / "cases.json").write_text(json.dumps(runs), encoding="utf-8")
    launch(2, WORKER, folder / "cases.json", folder / "results.json")
    return dict(json.loads((folder / "results.json").read_text()))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(measured: dict[str, Any], case: str) -> None:
    result = measured[case]
    assert result["gradient_error"] <= TOLERANCE, result["worst_gradient"]
    assert result["loss_error"] <= TOLERANCE
    assert result["ranks_equal"]


@pytest.mark.parametrize("case", CASES)
def test_the_backbone_is_divided_and_some_slots_have_no_row(measured: dict[str, Any], case: str) -> None:
    assert measured[case]["sharded"]
    assert measured[case]["fillers"] > 0
    assert (measured[case]["split"] > 0) == ("MLP" in case)


@pytest.mark.parametrize("case", CASES)
def test_evaluation_over_ranks_is_that_of_one_process(measured: dict[str, Any], case: str) -> None:
    result = measured[case]
    assert result["metrics"] == pytest.approx(result["expected_metrics"], rel=TOLERANCE)
    assert result["answers"] == result["expected_answers"]
    assert result["score_error"] <= TOLERANCE
    assert len(result["answers"]) == (0 if "seq2seq" in case else len(ROWS))


@pytest.mark.parametrize("case", UNEVEN)
def test_the_rows_tell_a_mean_of_means_from_the_mean(measured: dict[str, Any], case: str) -> None:
    assert measured[case]["mean_of_means"] > 0.1
