"""`load_rows`: every kind of source, unchanged texts, and every refusal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

from ptd.data import load_rows, sources
from ptd.types import UserError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def load(source: str, split: str = "train") -> Dataset:
    return load_rows(source, split, what="data.train")


def refusal(source: str, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        load(source, split)
    return str(caught.value)


def test_reads_each_file_kind(tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows [1].parquet")
    for source in (
        write(tmp_path / "rows.jsonl", lines(*ROWS)),
        write(tmp_path / "array.json", "\ufeff \n" + json.dumps(ROWS, indent=1)),
        write(tmp_path / "lines.json", lines(*ROWS)),
        write(tmp_path / "rows.csv", "\ufeffprompt,completion\na,b\n\nc,d\n"),
        str(tmp_path / "rows [1].parquet"),
    ):
        assert load(source).to_list() == ROWS, source


def test_reads_folders(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(tmp_path / "many")
    (tmp_path / "plain").mkdir()
    Dataset.from_list(ROWS).to_parquet(tmp_path / "plain" / "train.parquet")
    assert load(str(tmp_path / "one")).to_list() == ROWS
    assert load(str(tmp_path / "many"), "test").to_list() == ROWS[:1]
    assert load(str(tmp_path / "plain")).to_list() == ROWS
    for folder in ("many", "plain"):
        message = refusal(str(tmp_path / folder), "validation")
        assert "has no split 'validation'" in message
        assert "train" in message
        assert "data.train_split" in message


def test_texts_are_unchanged(tmp_path):
    texts = ["2020-01-02T10:00Z", "12", "NA", "true", "null", '{"a": 1}', "é😀\u2028\x85", " x\r\n"]
    jsonl = load(write(tmp_path / "t.jsonl", lines(*({"completion": text} for text in texts))))
    assert jsonl["completion"][:] == texts
    dates = load(write(tmp_path / "d.jsonl", lines({"completion": "2020-01-02"}, {"completion": "2020-01-03"})))
    assert dates["completion"][:] == ["2020-01-02", "2020-01-03"]
    table = load(write(tmp_path / "t.csv", 'n,completion\n007,"a, ""b""\nc"\nNA,\n'))
    assert table.to_list() == [{"n": "007", "completion": 'a, "b"\nc'}, {"n": "NA", "completion": ""}]


def test_rows_may_differ_in_keys_and_kinds(tmp_path):
    rows = [{"a": "x"}, {"a": 3, "b": [{"role": "user", "c": None}]}, {"a": "12", "late": 1.5}]
    loaded = load(write(tmp_path / "mixed.jsonl", lines(rows[0]) + "\n" + lines(*rows[1:]))).to_list()
    assert loaded == [{"a": None, "b": None, "late": None, **row} for row in rows]
    assert [type(row["a"]) for row in loaded] == [str, int, str]


def test_a_changed_file_is_read_anew(tmp_path):
    source = write(tmp_path / "rows.jsonl", lines({"a": "old"}))
    assert load(source)["a"][:] == ["old"]
    write(tmp_path / "rows.jsonl", lines({"a": "new"}))
    assert load(source)["a"][:] == ["new"]


def test_an_unchanged_file_is_not_parsed_again(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"b": "x", "a": 1}\n{"c": null}\n')
    opened, open_text = [], sources.open_text
    monkeypatch.setattr(
        sources, "open_text", lambda *given, **named: opened.append(given) or open_text(*given, **named)
    )
    first = load_rows(str(path), "train", what="data.train")
    assert len(opened) == 2  # the columns, then the rows
    second = load_rows(str(path), "train", what="data.train")
    assert len(opened) == 2
    assert (list(first), first.features) == (list(second), second.features)
    for stored in (Path(datasets.config.HF_DATASETS_CACHE) / "ptd-columns").iterdir():
        stored.write_text(stored.read_text()[:5])  # as after a crash
    assert list(load_rows(str(path), "train", what="data.train")) == list(first)
    assert len(opened) == 3
    path.write_text('{"b": "x", "a": "1"}\n{"c": null}\n')
    assert list(load_rows(str(path), "train", what="data.train")) == [
        {"b": "x", "a": "1", "c": None},
        {"b": None, "a": None, "c": None},
    ]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("x.jsonl", '{"a": 1}\n\n{"a": \n', "x.jsonl, line 3 is not valid JSON"),
        ("x.jsonl", '{"a": "1"}\n[1, 2]\n', "x.jsonl, line 2 is not an object but [1, 2]"),
        ("x.json", '[{"a": 1},\n {"a": }]', "x.json, line 2 is not valid JSON"),
        ("x.json", '[{"a": 1}, 5]', "element 2 is not an object but 5"),
        ("x.jsonl", "", "has no rows"),
        ("x.json", "[]", "has no rows"),
        ("x.csv", "", "has no rows"),
        ("x.csv", "a,b\n", "has no rows"),
        ("x.csv", "a,b\n1,2\n1,2,3\n", "line 3 has 3 values, but the first line names 2 columns"),
        ("x.csv", "a,a\n1,2\n", "names a column twice"),
        ("x.csv", "a;b\n1;2\n", "x.csv appears to be separated by semicolons: its first line, 'a;b', has no comma"),
        ("x.csv", "a;b\n1,5;2\n", "appears to be separated by semicolons"),
        ("x.csv", '\ufeff"a";"b"\n1;2\n', "appears to be separated by semicolons"),
        ("x.csv", "a\tb\n1\t2\n", "x.csv appears to be separated by tabs"),
        ("x.csv", "a|b\n1|2\n", "x.csv appears to be separated by vertical bars"),
        # Without `strict` the first quoted value would include the second row, and no error would be raised.
        ("x.csv", 'a,b\n"one,1\ntwo "x",0\n', "line 3 is not valid CSV: ',' expected after '\"'"),
        ("x.csv", 'a\n"one\ntwo\n', "line 3 is not valid CSV: unexpected end of data"),
        ("x.jsonl", '{"a": 1, "a": 2}\n', "line 1 cannot be read as JSON: the key 'a' is given twice in one object"),
        ("x.json", '[{"a": 1}, {"b": {"c": 1, "c": 2}}]', "the key 'c' is given twice in one object"),
        ("x.jsonl", '{"a": "x"}\n{"a": "\\ud83d"}\n', "line 2 has half of a character (\\ud83d alone)"),
        ("x.jsonl", '{"a": 1}\0', "x.jsonl: it is not UTF-8 text (it has null bytes)"),
        ("x.tsv", "a\tb\n1\t2\n", "only .jsonl, .json, .csv, .parquet can be read; convert it: python -c"),
        ("x.parquet", "not parquet", "x.parquet cannot be read: ArrowInvalid"),
        ("x.txt", "a", "x.txt is a .txt file, but only .json"),
        ("x", "a", "is a suffixless file"),
    ],
)
def test_refuses_a_bad_file(tmp_path, name, text, expected):
    message = refusal(write(tmp_path / name, text))
    assert message.startswith("data.train: ")
    assert expected in message


def test_the_command_that_is_advised_makes_commas(tmp_path):
    """The advised command converts semicolons with quoted values, and tabs with quotes that belong to the texts.

    SST-2 and GLUE have files of the second kind.
    """
    for name, text, rows in (
        ("x.csv", '\ufeffa;b\n"1;2";"x\ny"\n', [{"a": "1;2", "b": "x\ny"}]),
        ("x.tsv", 'a\tb\n"the best\t1, 2\n', [{"a": '"the best', "b": "1, 2"}]),
    ):
        command = refusal(write(tmp_path / name, text)).partition(": python -c ")[2]
        subprocess.run(f"{sys.executable} -c {command}", shell=True, check=True, cwd=tmp_path)
        assert load(str(tmp_path / "commas.csv")).to_list() == rows


def test_lines_of_rows_end_in_three_ways_only(tmp_path):
    """Only LF, CR and CRLF end a row: JSON strings may contain U+2028 and NEL, and CSV values any character."""
    text = "a\u2028b\u2029c\x85d"
    row = json.dumps({"a": text}, ensure_ascii=False)
    assert load(write(tmp_path / "x.jsonl", f"{row}\r{row}\r\n{row}\n"))["a"][:] == [text] * 3
    (tmp_path / "x.csv").write_bytes(f'a,b\r"x\ry",{text}\x0c\r'.encode())
    assert load(str(tmp_path / "x.csv")).to_list() == [{"a": "x\ry", "b": f"{text}\x0c"}]


def test_what_is_no_number_is_missing(tmp_path):
    rows = load(write(tmp_path / "x.jsonl", '{"a": NaN, "b": "x"}\n{"a": 1.5}\n')).to_list()
    assert rows == [{"a": None, "b": "x"}, {"a": 1.5, "b": None}]


def test_a_folder_of_tables_is_read_as_the_tables_are(tmp_path):
    """CSV values in a folder stay text, although `datasets` reads ``007`` as a number and ``NA`` as missing."""
    (tmp_path / "tables").mkdir()
    write(tmp_path / "tables" / "my_train.csv", "a,b\n007,NA\n1.50,null\n")
    write(tmp_path / "tables" / "dev-set.csv", "\ufeffa,b\n008,x\n")
    assert load(str(tmp_path / "tables")).to_list() == [{"a": "007", "b": "NA"}, {"a": "1.50", "b": "null"}]
    assert load(str(tmp_path / "tables"), "validation").to_list() == [{"a": "008", "b": "x"}]
    assert "has no split 'test'" in refusal(str(tmp_path / "tables"), "test")
    write(tmp_path / "tables" / "dev-set.csv", "a;b\n1;2\n")
    assert "appears to be separated by semicolons" in refusal(str(tmp_path / "tables"), "validation")


def test_home_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", lines(*ROWS))
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "folder")
    assert load("~/rows.jsonl").to_list() == load("~/folder").to_list() == ROWS
    assert sources.check_source("~/rows.jsonl", what="data.train").startswith("~/rows.jsonl (")


def test_refuses_bytes_that_are_not_text(tmp_path):
    for name in ("x.jsonl", "x.csv"):
        (tmp_path / name).write_bytes(b'{"a": "\xff"}\n')
        assert "is not UTF-8 text" in refusal(str(tmp_path / name))


def test_a_missing_file_names_its_neighbours(tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl", lines(*ROWS))
    assert "there is no file or folder" in refusal(str(tmp_path / "trian.jsonl"))
    assert "train.jsonl" in refusal(str(tmp_path / "trian.jsonl"))
    monkeypatch.chdir(tmp_path)
    assert "relative paths start at" in refusal("data/train.jsonl")


def test_an_empty_dataset_is_refused(tmp_path):
    Dataset.from_dict({"a": []}).save_to_disk(tmp_path / "empty")
    assert "has no rows" in refusal(str(tmp_path / "empty"))
    (tmp_path / "nothing").mkdir()
    assert "cannot be loaded" in refusal(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionError("no network"), "the hub is unreachable (no network)"),
        (datasets.exceptions.DatasetNotFoundError("x"), "nor a dataset on the Hugging Face hub"),
        (ValueError("Unknown split \"train\". Should be one of ['test']."), "has no split 'train'; it has 'test'"),
        (ValueError("Config name is missing. Pick one"), "write it as NAME:CONFIG"),
    ],
)
def test_hub_refusals(monkeypatch, error, expected):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(sources, "load_dataset", fail)
    message = refusal("owner/name")
    assert message.startswith("data.train: owner/name")
    assert expected in message


def test_hub_names_may_carry_a_configuration(monkeypatch):
    asked = []
    monkeypatch.setattr(
        sources, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or Dataset.from_list(ROWS)
    )
    load("openai/gsm8k:main", "train[:10]")
    load("squad-v1.1")
    assert asked == [(("openai/gsm8k", "main"), {"split": "train[:10]"}), (("squad-v1.1", None), {"split": "train"})]


def test_ranks_may_read_at_the_same_time_without_noise_or_litter(tmp_path):
    source = write(tmp_path / "rows.jsonl", lines(*({"a": str(number)} for number in range(5000))))
    script = (
        "import sys; from ptd.data import load_rows; print(len(load_rows(sys.argv[1], 'train', what='data.train')))"
    )
    (tmp_path / "cwd").mkdir()
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), *sys.path])),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, source],
            cwd=tmp_path / "cwd",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert [rank.communicate() for rank in ranks] == [("5000\n", "")] * 2
    assert list((tmp_path / "cwd").iterdir()) == []


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_file_written_again_with_its_old_size_and_time_is_read_again(tmp_path, suffix):
    """A changed file of the same size and time is read again; rsync -t, tar and image layers leave such files."""
    path = tmp_path / f"rows{suffix}"

    def write(label):
        if suffix == ".parquet":
            Dataset.from_list([{"label": label}]).to_parquet(path)
        else:
            path.write_text(json.dumps({"label": label}) + "\n" if suffix == ".jsonl" else f"label\n{label}\n")
        os.utime(path, (1_700_000_000, 1_700_000_000))

    for label in ("a", "b"):
        write(label)
        assert load_rows(str(path), "train", what="data.train")[0]["label"] == label
