"""``train.samples`` of labelling tasks: the answers before and after training are those that ``ptd predict`` gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from families import save_backbone

from ptd.commands.predict import predict
from ptd.commands.train import train
from ptd.config import DataConfig, TaskConfig, parse_config
from ptd.runs.sampler import LETTERS
from ptd.runs.samples_log import read_samples, write_samples
from ptd.tasks import make_task
from ptd.types import Sample

STEPS = 12
TEXTS = ["aaaa", "bbbb", "abba", "zzzz " * 100, "aab", "bba"]
ROWS: dict[str, list[dict[str, Any]]] = {
    "classification": [{"text": text, "label": "first" if text[0] == "a" else "other"} for text in TEXTS],
    "cloze": [{"said": text, "label": "first" if text[0] == "a" else "other"} for text in TEXTS],
    "token_classification": [
        {"tokens": ["anna", "saw", "york"], "tags": ["B-PER", "O", "B-LOC"]},
        {"tokens": ["the", "cat"], "tags": ["O", "O"]},
        {"tokens": ["york", "is", "old"], "tags": ["B-LOC", "O", "O"]},
    ],
    "question_answering": [
        {"question": "who?", "context": "anna lives in york", "answers": ["anna"]},
        {"question": "where?", "context": "in the town of york" + " far" * 20, "answers": []},
    ],
}
TASKS: dict[str, dict[str, Any]] = {
    "cloze": {
        "kind": "classification",
        "patterns": ["{v:2}{said} is {mask}"],
        "verbalizer": {"first": ["x"], "other": ["y"]},
    },
    "question_answering": {"kind": "question_answering", "doc_stride": 4},
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"), "llama")


@pytest.mark.parametrize("name", ROWS)
def test_a_run_keeps_what_predict_says(tmp_path: Path, backbone: Path, name: str) -> None:
    rows, count = ROWS[name], len(ROWS[name]) - 1
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = {
        "backbone": {"path": str(backbone), "dtype": "float32"},
        "method": {"name": "p_tuning" if name == "cloze" else "p_tuning_v2"},
        "task": TASKS.get(name, {"kind": name}),
        "data": {"train": str(data), "eval": str(data), "max_length": 48},
        "train": {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 0.05, "samples": count},
        "output_dir": str(out),
    }
    train(parse_config(run))
    samples = read_samples(out)
    assert [sample["step"] for sample in samples] == [0] * count + [STEPS] * count
    answers = predict(str(data), adapter=str(out))[:count]
    after = samples[count:]
    assert [each["prompt"][:4] for each in samples] == 2 * [first_word(row)[:4] for row in rows[:count]]
    for row, answer, sample in zip(rows, answers, after, strict=False):
        check(name, row, answer, sample)
        assert 0 <= sample["score"] <= 1
        assert max(len(sample[key]) for key in ("prompt", "reference", "text")) <= LETTERS
    assert [each["score"] for each in samples[:count]] != [each["score"] for each in after]

    page = (out / "report.html").read_text(encoding="utf-8")
    wrong = sum(not sample["right"] for sample in after)
    assert f"Wrong, most confident first: {wrong} of {count}" in page
    assert f"Right, most confident first: {count - wrong} of {count}" in page
    assert page.count("<dt>before training</dt>") == page.count(f"<dt>after step {STEPS}</dt>") == count
    assert f"({after[0]['score']:.2f})" in page


def first_word(row: dict[str, Any]) -> str:
    return str(row.get("text") or row.get("said") or " ".join(row.get("tokens", [])) or row["question"])


def check(name: str, row: dict[str, Any], answer: dict[str, Any], sample: dict[str, Any]) -> None:
    """Assert that a sample is the answer that ``ptd predict`` gives for the row."""
    if name in ("classification", "cloze"):
        given = answer["predicted_label"]
        assert (sample["text"], sample["reference"], sample["right"]) == (given, row["label"], given == row["label"])
        assert sample["score"] == pytest.approx(answer["probabilities"][given], rel=1e-4)
    elif name == "token_classification":
        given, gold = answer["predicted_tags"], row["tags"]
        assert sample["right"] == (given == gold)
        wrong = [p for p, one, other in zip(answer["probabilities"], given, gold, strict=True) if one != other]
        assert sample["score"] == pytest.approx(max(wrong) if wrong else min(answer["probabilities"]), rel=1e-4)
        if "B-PER" in gold:
            assert sample["reference"] == "PER: anna; LOC: york"
    else:
        assert sample["text"] == (answer["answer"] or "(no answer)")
        assert sample["score"] == pytest.approx(answer["score"], rel=1e-4)
        assert sample["right"] == (answer["answer"] in (row["answers"] or [""]))


def test_a_context_is_shown_from_a_little_before_its_answer() -> None:
    task = make_task(TaskConfig(kind="question_answering"), DataConfig(), "encoder")
    assert not task.generates
    context = "so " * 100 + "it is york, they say"
    rows = Dataset.from_list([{"question": "where?", "context": context, "answers": ["york"]}])
    (right,) = task.samples([{"answer": "York", "score": 0.5}], rows)
    assert right.right, "as the official evaluation: case does not count"
    asked, shown = right.prompt.split("\n")
    assert asked == "where?"
    assert shown.startswith("…")
    assert shown.endswith("it is york, they say")
    assert len(shown) < 160
    (wrong,) = task.samples([{"answer": "", "score": 0.5}], rows)
    assert (wrong.reference, wrong.text, wrong.right) == ("york", "(no answer)", False)


def test_words_that_were_not_seen_are_mistakes_of_no_certainty() -> None:
    config = TaskConfig(kind="token_classification", labels=["N", "V"])
    task = make_task(config, DataConfig(), "encoder")
    assert not task.generates
    rows = Dataset.from_list([{"tokens": ["a", "cat"], "tags": ["N", "V"]}])
    (sample,) = task.samples([{"tags": ["N", "N"], "probabilities": [0.9, None]}], rows)
    assert sample == Sample("a cat", "a/N cat/V", "a/N cat/N", 0.0, False)


def test_samples_of_a_step_replace_those_of_later_ones(tmp_path: Path) -> None:
    write_samples(tmp_path, 0, [Sample("in", "label", "answer", 0.25, False), Sample("in", "reference", "text")])
    write_samples(tmp_path, 9, [Sample("old", "", "")])
    write_samples(tmp_path, 5, [Sample("new", "", "")])
    assert read_samples(tmp_path) == [
        {"step": 0, "prompt": "in", "reference": "label", "text": "answer", "score": 0.25, "right": False},
        {"step": 0, "prompt": "in", "reference": "reference", "text": "text"},
        {"step": 5, "prompt": "new", "reference": "", "text": ""},
    ]


def test_rouge_knows_every_script():
    from rouge_score.rouge_scorer import RougeScorer

    from ptd.runs.scores import text_metrics

    for text in ("привет мир", "你好，世界", "größer als", "مرحبا بالعالم", "👍🎉"):
        assert text_metrics([text], [text])["rouge_l"] == 100
    assert text_metrics(["gräßer"], ["größer"])["rouge_l"] == 0
    assert text_metrics(["你好"], ["你们"])["rouge_l"] == 50
    one, other = "The cat_sat, on 2 mats!", "the dog sat on two mats"
    assert text_metrics([other], [one])["rouge_l"] == pytest.approx(
        100 * RougeScorer(["rougeL"]).score(one, other)["rougeL"].fmeasure
    )
