"""Labels of rows: which values are the same label, which columns are not sets of labels, which labels are unknown."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Json, Sequence, Value
from families import tiny_tokenizer

from ptd.config import DataConfig, TaskConfig
from ptd.tasks import Task, make_task
from ptd.types import IGNORE_INDEX, UserError
from ptd.values import name_of


def data_of(labels: list[Any], column: str = "label") -> Dataset:
    """Return rows as they are read from a JSON file: values keep their types."""
    texts = (
        {"text": [f"t{row}" for row in range(len(labels))]} if column == "label" else {"tokens": [["a"]] * len(labels)}
    )
    kind = Value("string") if all(isinstance(label, str) for label in labels) else Json()
    feature = Value("string") if column == "label" else Sequence(Value("string"))
    return Dataset.from_dict({**texts, column: labels}, features=Features({next(iter(texts)): feature, column: kind}))


def make(**settings: Any) -> Task:
    return make_task(TaskConfig(**{"kind": "classification", **settings}), DataConfig(), "encoder")


def learned(labels: list[Any], **settings: Any) -> tuple[str, ...]:
    return make(**settings).fit(data_of(labels), "train.csv").labels


def refusal(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    return str(caught.value)


def test_a_whole_number_is_one_label_however_it_is_written() -> None:
    rows = data_of([1, 1.0, "1", "1.0", " 1", 0, 0.0, "0"])
    task = make().fit(rows, "train.csv")
    assert task.labels == ("0", "1")
    examples = task.tokenize(rows, tiny_tokenizer(), what="train.csv")
    targets = [int(labels[labels != IGNORE_INDEX][0]) for _, labels in (examples[row] for row in range(len(rows)))]
    assert targets == [1, 1, 1, 1, 1, 0, 0, 0]
    # The same holds for the labels in the run file.
    assert make(labels=[0, 1.0]).labels == ("0", "1")
    assert make(labels=[0, 1], class_weights={1: 2.0, "0": 1.0}).config.class_weights == {"1": 2.0, "0": 1.0}
    with pytest.raises(ValueError, match="names a label twice"):
        TaskConfig(kind="classification", class_weights={1: 2.0, "1.0": 1.0})
    with pytest.raises(ValueError, match="is not a label name"):
        TaskConfig(kind="classification", labels=["a", None])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["pos ", "pos", " neg\n", "neg"], ("neg", "pos")),
        ([10, 9, 0, 1], ("0", "1", "9", "10")),
        ([-1, 1, 1, -1], ("-1", "1")),
        ([True, False], ("False", "True")),
        ([f"c{row % 30}" for row in range(90)], tuple(sorted(f"c{row}" for row in range(30)))),
        ([row % 30 for row in range(90)], tuple(map(str, range(30)))),
        (["x1", "x2", "x3", "x4"], ("x1", "x2", "x3", "x4")),
        (["007", "008"], ("007", "008")),
        (["2020-01-02", "2021-02-03"], ("2020-01-02", "2021-02-03")),
    ],
)
def test_what_is_a_set_of_labels(labels: list[Any], expected: tuple[str, ...]) -> None:
    if labels == [10, 9, 0, 1]:
        labels = labels * 2  # whole numbers with gaps, each more than once
    assert learned(labels) == expected


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (
            [0.73, 0.12, 0.5, 0.9],
            "has fractions (0.12, 0.5, 0.73, 0.9), each of which would become a label of its own; ptd has no",
        ),
        (["0.73", "0.12"], "has fractions (0.12, 0.73)"),
        (["0,73", "1,5"], "has fractions"),
        ([1.0, 1.5, 1.0, 1.5], "has fractions (1.5)"),
        ([1e-5, 1.0], "has fractions (1e-05)"),
        (
            [12, 450, 999, 3],
            "has 4 different whole numbers with gaps between them (3, 12, 450, 999), which look like meas",
        ),
        ([row * 37 for row in range(25)] * 9, "has 25 different whole numbers with gaps"),
        ([f"id{row}" for row in range(40)], "has 40 different labels among 40 values (id0, id1, id10"),
        (["Pos", "pos", "neg", "neg"], "has labels that look alike, 'Pos' and 'pos'"),
        (["caf\u00e9", "cafe\u0301"], "has labels that look alike"),
        (["nan", "1", "0"], "has the text 'nan', which usually stands for a missing value"),
        ([0, 1, "pos", "neg"], "mixes kinds of values (row 1 has 0, row 3 has 'pos')"),
        ([True, 0, 1, True], "mixes kinds of values (row 1 has True, row 2 has 0)"),
    ],
)
def test_what_is_none(labels: list[Any], said: str) -> None:
    message = refusal(learned, labels)
    assert message.startswith("task.labels: 'label' in train.csv ")
    assert said in message
    assert message.endswith("list them in task.labels")
    # Values that task.labels lists are accepted as labels.
    names = list(dict.fromkeys(map(name_of, labels)))
    task = make(labels=names).fit(data_of(labels), "train.csv")
    assert task.labels == tuple(names)
    assert len(task.tokenize(data_of(labels), tiny_tokenizer(), what="train.csv")) == len(labels)


def test_numbers_are_called_a_regression() -> None:
    for labels in ([0.73, 0.12], [12, 450, 999, 3]):
        assert "ptd has no task that predicts numbers (regression)" in refusal(learned, labels)


@pytest.mark.parametrize("missing", [None, float("nan"), "", "  "])
def test_a_row_without_a_label_is_refused(missing: Any) -> None:
    for settings in ({}, {"labels": ["a", "b"]}):
        task = make(**settings)
        rows = data_of(["a", "b", missing])
        said = refusal(
            task.tokenize if settings else task.fit, rows, *([tiny_tokenizer()] if settings else []), what="t"
        )
        assert said.startswith("row 3 of t has ")
        assert "'label'" in said


def test_hidden_labels_of_a_hub_data_set() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, -1]}, features=features)
    said = refusal(make().fit, rows, "glue")
    assert "row 3 of glue: 'label' is -1 (−1 usually stands for a hidden label)" in said
    assert "only the numbers from 0 to 1 stand for labels (neg, pos)" in said
    assert make().fit(rows.select([0, 1]), "glue").labels == ("neg", "pos")


@pytest.mark.parametrize("names", [["", "pos"], ["pos", "pos "]])
def test_names_that_a_data_set_gives_are_names(names: list[str]) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    assert "of which one is blank or repeated" in refusal(make().fit, rows, "glue")


def test_an_unknown_label_is_compared_with_the_known_ones() -> None:
    task = make().fit(data_of(["pos", "neg", "pos"]), "train.csv")
    said = refusal(task.tokenize, data_of(["pos", "Neg"]), tiny_tokenizer(), what="eval.csv")
    assert (
        "row 2 of eval.csv has the label 'Neg', but the labels are neg, pos (is 'neg' meant?); correct the row" in said
    )


def tags(rows: list[list[Any]], **settings: Any) -> Task:
    return make_task(TaskConfig(kind="token_classification", **settings), DataConfig(), "encoder").fit(
        Dataset.from_dict(
            {"tokens": [["a"] * len(row) for row in rows], "tags": rows},
            features=Features({"tokens": Sequence(Value("string")), "tags": Json()}),
        ),
        "t",
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([["O ", "B-X"], ["O", "B-X"]], ("B-X", "O")),
        ([[0, 1.0], ["1", 0]], ("0", "1")),
        ([["O", "B-PER"], [0, 1]], "'tags' in t mixes kinds of values (row 1 has 'O', row 2 has 0)"),
        ([["O", "B-per"], ["O", "B-PER"]], "'tags' in t has labels that look alike, 'B-PER' and 'B-per'"),
        ([[0.5, 0.25]], "'tags' in t has fractions (0.25, 0.5)"),
        ([[0, -100]], "row 1 of t: 'tags' has the tag -100, but tags are numbered from 0"),
        ([["O", None]], "row 1 of t: an item of 'tags' has to be a label (text or a number), but is NoneType"),
        ([["O", " "]], "row 1 of t: an item of 'tags' has to be a label (text or a number), but is str (' ')"),
        ([["O", ["B-X"]]], "row 1 of t: an item of 'tags' has to be a label (text or a number), but is list"),
    ],
)
def test_tags_follow_the_same_rule(rows: list[list[Any]], expected: tuple[str, ...] | str) -> None:
    if isinstance(expected, tuple):
        assert tags(rows).labels == expected
    else:
        assert expected in refusal(tags, rows)


def test_a_tag_beyond_the_names_is_no_name() -> None:
    task = tags([["O", "B-X"]], labels=["O", "B-X"])
    rows = Dataset.from_dict({"tokens": [["a", "b"]], "tags": [[0, 5]]})
    said = refusal(task.tokenize, rows, tiny_tokenizer(), what="t")
    assert "row 1 of t: an item of 'tags' is 5, but only the numbers from 0 to 1 stand for labels (O, B-X)" in said
