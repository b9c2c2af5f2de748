"""One rule decides, for every column of every task, which cells are missing or blank and what they may hold."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from families import tiny_tokenizer

from ptd.config import DataConfig, TaskConfig
from ptd.data import load_rows
from ptd.tasks import make_task
from ptd.types import UserError
from ptd.values import is_blank, is_missing, name_of

support = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "tasks" / "support.py")))
NAN = float("nan")

# For each task: a valid row, the columns that may be blank, and the settings of the run file.
TASKS: dict[str, tuple[dict[str, Any], set[str], dict[str, Any]]] = {
    "prompts": ({"prompt": "a", "completion": "b"}, {"prompt"}, {}),
    "texts": ({"text": "a"}, set(), {"data": {"format": "text"}}),
    "template": (
        {"q": "a", "r": "b", "completion": "c"},
        {"q", "r"},
        {"data": {"prompt_template": "{q} {r} ="}},
    ),
    "seq2seq": ({"prompt": "a", "completion": "b"}, {"prompt"}, {"kind": "seq2seq_lm"}),
    "pairs": (
        {"text": "a", "pair": "b", "label": "x"},
        set(),
        {"kind": "classification", "task": {"labels": ["x", "y"]}},
    ),
    "patterns": (
        {"title": "a", "body": "b", "label": "x"},
        {"title", "body"},
        {"kind": "classification", "task": {"labels": ["x", "y"], "patterns": ["{title}: {body}"]}},
    ),
    "tags": (
        {"tokens": ["a"], "tags": ["x"]},
        set(),
        {"kind": "token_classification", "task": {"labels": ["x", "y"]}},
    ),
    "questions": (
        {"question": "a", "context": "b c", "answers": "c"},
        {"answers"},
        {"kind": "question_answering", "data": {"max_length": 96}},
    ),
}
ARCHITECTURES = {"seq2seq_lm": "encoder-decoder", "causal_lm": "decoder"}
CASES = [(task, column) for task, (row, _, _) in TASKS.items() for column in row]


def tokenize(name: str, rows: Dataset) -> Any:
    _, _, settings = TASKS[name]
    kind = settings.get("kind", "causal_lm")
    task = make_task(
        TaskConfig(kind=kind, **settings.get("task", {})),
        DataConfig(**{"max_length": 32, **settings.get("data", {})}),
        ARCHITECTURES.get(kind, "encoder"),
    )
    tokenizer = support.t5() if kind == "seq2seq_lm" else tiny_tokenizer()
    return task.tokenize(rows, tokenizer, what="rows.jsonl")


def rows_with(name: str, **changes: Any) -> Dataset:
    """Return two valid rows and a third row with ``changes``, as they are read from a JSON file."""
    row, _, _ = TASKS[name]
    columns = {key: [value, value, {**row, **changes}[key]] for key, value in row.items()}
    return Dataset(pa.table(columns))


def refusal(name: str, rows: Dataset) -> str:
    with pytest.raises(UserError) as caught:
        tokenize(name, rows)
    return str(caught.value)


@pytest.mark.parametrize(("name", "column"), CASES)
def test_a_missing_cell_is_refused_in_every_column(name: str, column: str) -> None:
    assert tokenize(name, rows_with(name)).report.rows == 3
    said = refusal(name, rows_with(name, **{column: None}))
    assert said.startswith("row 3 of rows.jsonl")
    assert f"'{column}'" in said
    assert "is missing" in said


@pytest.mark.parametrize(("name", "column"), [case for case in CASES if case[0] not in ("tags",)])
@pytest.mark.parametrize("blank", ["", " \t\n", "\u2028\xa0", "\ufeff\u200b"], ids=["none", "spaces", "wide", "zero"])
def test_a_blank_cell_is_refused_where_no_text_says_nothing(name: str, column: str, blank: str) -> None:
    if name == "seq2seq" and column == "prompt":
        blank = blank or " "  # its encoder needs at least one token, and T5's tokenizer returns none for an empty text
    rows = rows_with(name, **{column: blank})
    if column in TASKS[name][1]:
        assert tokenize(name, rows).report.rows == 3
        return
    said = refusal(name, rows)
    assert said.startswith(f"row 3 of rows.jsonl has an empty '{column}'")


@pytest.mark.parametrize("name", ["template", "patterns"])
def test_a_row_without_text_for_any_field_is_refused(name: str) -> None:
    columns = sorted(TASKS[name][1])
    said = refusal(name, rows_with(name, **dict.fromkeys(columns, " ")))
    assert said.startswith("row 3 of rows.jsonl has an empty ")
    assert all(repr(column) in said for column in columns)


def test_nan_is_missing_in_every_kind_of_file(tmp_path: Path) -> None:
    """NaN is missing: a numeric Parquet column has NaN where a CSV has an empty cell and JSON has null or NaN."""
    pq.write_table(pa.table({"q": [1.0, NAN], "completion": ["a", "b"]}), tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text('{"q": 1.0, "completion": "a"}\n{"q": NaN, "completion": "b"}\n')
    for file in ("t.parquet", "t.jsonl"):
        rows = load_rows(str(tmp_path / file), "train", what="data.train")
        task = make_task(TaskConfig(), DataConfig(prompt_template="{q} ="), "decoder")
        with pytest.raises(UserError, match=r"row 2 of it: 'q', which data.prompt_template uses, is missing"):
            task.tokenize(rows, tiny_tokenizer(), what="it")


def test_a_number_that_is_not_finite_is_not_written_into_a_template() -> None:
    rows = Dataset.from_dict({"q": [1.0, float("inf")], "completion": ["a", "b"]})
    task = make_task(TaskConfig(), DataConfig(prompt_template="{q} ="), "decoder")
    with pytest.raises(UserError, match=r"row 2 of it: 'q', which data.prompt_template uses, is inf"):
        task.tokenize(rows, tiny_tokenizer(), what="it")


def test_what_is_missing_and_what_is_blank() -> None:
    assert [is_missing(value) for value in (None, NAN, "", 0, False, "nan", [])] == [True, True, *[False] * 5]
    assert [is_blank(text) for text in ("", " \n", "\u2029", "\ufeff", "0", ".", "\u0301a", "👍🏽")] == [
        *[True] * 4,
        *[False] * 4,
    ]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        *((value, "1") for value in (1, 1.0, "1", "1.0", " 1 ", "1.00")),
        *((0.0, "0"), (-0.0, "0"), ("-0.0", "0"), (-1, "-1"), (2**70, str(2**70)), (1e22, str(10**22))),
        *((0.73, "0.73"), ("0.73", "0.73"), ("007", "007"), ("1.0.0", "1.0.0")),
        *((True, "True"), (False, "False"), (" pos\n", "pos"), ("a b", "a b")),
        *((value, None) for value in (None, NAN, float("inf"), "", " ", "\ufeff", [], {}, b"a")),
    ],
)
def test_names_of_labels(value: Any, name: str | None) -> None:
    assert name_of(value) == name


def test_a_column_of_nearly_that_name_is_named() -> None:
    rows = Dataset.from_dict({"Text": ["a"], " label": ["x"]})
    task = make_task(TaskConfig(kind="classification"), DataConfig(), "encoder")
    with pytest.raises(UserError, match=r"has no column 'label'.*is ' label' meant\?.*e.g. data.columns: {label: ' l"):
        task.fit(rows, "it")
    with pytest.raises(UserError, match=r"has no column 'prompt'"):
        make_task(TaskConfig(), DataConfig(), "decoder").tokenize(rows, tiny_tokenizer(), what="it")
