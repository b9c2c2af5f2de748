"""benchmarks/methods.py: the made data, tiny cells on both sides, and what becomes of them."""

from __future__ import annotations

import csv
import importlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from families import save_backbone
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # by PEFT
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),  # by PEFT, in its own generate()
]

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a module beside benchmarks/methods.py, as the script does."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def tasks(load) -> ModuleType:
    return load("methods_tasks")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return str(save_backbone(tmp_path_factory.mktemp("encoders") / "bert", "bert"))


def cell(load, side, method, task, **rest):
    given = {"rows": 16, "seed": 0, "learning_rate": 1e-2, "split": "test", "steps": 3, "eval_rows": 12}
    return load("methods_cells").Cell(side, method, task, **(given | rest))


def test_the_data_is_a_function_of_the_seed_and_smaller_sets_begin_larger_ones(tasks):
    for task in ("intents", "entities"):
        small, held_out = tasks.data_of(task, 3, 16, 20, "test")
        large, again = tasks.data_of(task, 3, 64, 20, "test")
        assert large[:16] == small
        assert again == held_out
        assert tasks.data_of(task, 4, 16, 20, "test")[0] != small
        assert tasks.data_of(task, 3, 16, 20, "dev")[1] != held_out


def test_intents_are_balanced(tasks):
    counts = Counter(row["label"] for row in tasks.intents(64, 0, 0))
    assert set(counts) == set(tasks.LABELS)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_test_rows_share_neither_sentences_nor_things_nor_names_with_training_rows(tasks):
    pairs = [tasks.THINGS, tasks.DISTRACTORS, tasks.SENTENCES, *tasks.NAMES.values()]
    pairs += [part for intent in tasks.INTENTS.values() for part in intent]
    for train, test in pairs:
        assert not set(train) & set(test)


def test_tags_are_well_formed_chunks(tasks):
    for row in tasks.entities(100, 0, 1):
        assert len(row["tokens"]) == len(row["tags"])
        for before, tag in zip(["O", *row["tags"]], row["tags"], strict=False):
            assert tag in tasks.TAGS
            assert not tag.startswith("I-") or before[2:] == tag[2:]
    assert {tag for row in tasks.entities(100, 0, 1) for tag in row["tags"]} == set(tasks.TAGS)


def test_intents_can_be_learned_but_words_alone_do_not_carry_over(tasks):
    rows, held_out = tasks.data_of("intents", 0, 512, 300, "test")
    _, like_training = tasks.data_of("intents", 0, 512, 300, "dev")
    vectorizer = CountVectorizer(ngram_range=(1, 2)).fit(row["text"] for row in rows)
    words = LogisticRegression(max_iter=500).fit(
        vectorizer.transform(row["text"] for row in rows), [row["label"] for row in rows]
    )

    def score(some):
        return words.score(vectorizer.transform(row["text"] for row in some), [row["label"] for row in some])

    assert score(like_training) > 0.9
    assert score(held_out) < 0.6


def test_a_cell_runs_on_both_sides_and_becomes_table_figure_and_record(load, encoder, tmp_path):
    run = load("methods_cells").run_cell
    choices = [("ptd", "prefix", "intents"), ("peft", "prefix", "intents")]
    choices += [("ptd", "p_tuning", "intents"), ("peft", "prompt", "entities"), ("ptd", "prompt", "entities")]
    cells = [cell(load, *choice) for choice in choices]
    results = {one: run(one, encoder) for one in cells}
    theirs = results[cells[1]]
    assert results[cells[0]]["trained_parameters"] == theirs["trained_parameters"]
    assert 0 <= theirs["accuracy"] <= 100
    assert theirs["peak_memory_bytes"] > 0
    assert "batch_size" in results[cells[3]]["error"], "PEFT does not take the virtual tokens off a tagger's output"

    origin = {"command": "python benchmarks/methods.py", "commits": ["abc"]}
    load("methods_report").report(results, {choices[0]: {1e-2: 50.0}}, tmp_path / "methods", origin)
    with (tmp_path / "methods.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["side"], row["method"], row["task"]) for row in rows] == [
        (side, method, task) for side, method, task in choices
    ]
    assert float(rows[0]["difference"]) == pytest.approx(results[cells[0]]["accuracy"] - theirs["accuracy"], abs=1e-3)
    assert rows[4]["verdict"] == "PEFT cannot"
    record = json.loads((tmp_path / "methods.json").read_text(encoding="utf-8"))
    assert {"command", "commits", "hardware", "versions", "date", "learning_rates"} <= set(record)
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")


def test_batches_for_peft_label_every_word_once(load, encoder, tmp_path):
    cells, tasks = load("methods_cells"), load("methods_tasks")
    for name, rows in zip(("train", "eval"), tasks.data_of("entities", 0, 16, 12, "test"), strict=True):
        cells.write_rows(tmp_path / f"{name}.jsonl", rows)
    padded = load("methods_peft").Rows(cell(load, "peft", "prefix", "entities"), encoder, tmp_path)
    batch = padded.batch("train", [3, 5])
    words = tasks.entities(16, 0, 0)
    for labels, mask, row in zip(batch["labels"], batch["attention_mask"], (words[3], words[5]), strict=True):
        assert [tasks.TAGS[label] for label in labels.tolist() if label != -100] == row["tags"]
        assert bool((labels[mask == 0] == -100).all())


def test_prefix_and_p_tuning_v2_are_one_computation_for_tags(load, encoder):
    run = load("methods_cells").run_cell
    results = [run(cell(load, "ptd", method, "entities"), encoder) for method in ("prefix", "p_tuning_v2")]
    for metric in ("loss", "f1", "accuracy", "trained_parameters"):
        assert results[0][metric] == results[1][metric]


def test_the_language_model_cell_writes_text_on_both_sides(load):
    from ptd.quickstart import BACKBONE

    for side in ("ptd", "peft"):
        one = cell(load, side, "prompt", "advert", rows=8, steps=1, eval_rows=3)
        result = load("methods_cells").run_cell(one, str(BACKBONE))
        assert result["trained_parameters"] == 32 * 256
        assert {"exact_match", "bleu", "perplexity"} <= set(result)


def test_a_known_cell_is_not_run_again(load, encoder, tmp_path):
    methods = load("methods")
    one = cell(load, "ptd", "head", "intents")
    result = load("methods_cells").run_cell(one, encoder)
    methods.Cells(tmp_path, 1, lambda task: encoder).keep(one, result)
    again = methods.Cells(tmp_path, 1, lambda task: encoder)
    assert again.run([one], "twice") == {one: result}
    assert again.key(replace(one, seed=1)) not in again.done


def test_both_sides_choose_their_learning_rates_from_one_grid(load):
    methods = load("methods")
    wanted = list(methods.choices(False))
    for side, task, method in wanted:
        assert len(methods.grid(task, method)) == 2
        assert side == "ptd" or ("ptd", task, method) in wanted
