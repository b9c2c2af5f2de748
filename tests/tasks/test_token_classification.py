"""Token classification: labels on first sub-tokens, the loss of transformers' own heads, answers, seqeval's metrics."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import List as ListOf
from families import tiny_config
from sklearn.utils.class_weight import compute_class_weight
from transformers import AutoModelForTokenClassification

from ptd.config import DataConfig, TaskConfig
from ptd.data.batches import packed_batch, padded_batch
from ptd.tasks import make_task
from ptd.types import IGNORE_INDEX, HeadSettings, UserError

support = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("support.py"))))

ROWS = [
    {"tokens": ["anna", "lives", "in", "york", "."], "tags": ["B-PER", "O", "O", "B-LOC", "O"]},
    {"tokens": ["new", "york", "lives"], "tags": ["B-LOC", "I-LOC", "O"]},
    {"tokens": ["in"], "tags": ["O"]},
]
LABELS = ["B-LOC", "B-PER", "I-LOC", "O"]


def make(rows: list[dict] | Dataset = ROWS, *, max_length: int = 64, columns: dict | None = None, **settings: Any):
    config = TaskConfig(kind="token_classification", **settings)
    task = make_task(config, DataConfig(max_length=max_length, columns=columns or {}), "encoder")
    return task.fit(rows if isinstance(rows, Dataset) else Dataset.from_list(rows), "rows.jsonl")


def tokenized(task, tokenizer, rows=ROWS, **options):
    return task.tokenize(Dataset.from_list(rows), tokenizer, what="rows.jsonl", **options)


def refusal(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", support.ALL)
def test_words_are_read_as_in_a_text(name):
    tokenizer = support.ALL[name]()
    examples = tokenized(make(), tokenizer)
    for row, (tokens, _) in zip(ROWS, (examples[index] for index in range(3)), strict=True):
        assert tokens.tolist() == tokenizer(" ".join(row["tokens"]))["input_ids"]


@pytest.mark.parametrize("name", support.ALL)
def test_the_label_sits_on_the_first_sub_token(name):
    tokenizer = support.ALL[name]()
    task = make()
    assert task.labels == tuple(LABELS)
    examples = tokenized(task, tokenizer)
    tokens, labels = examples[0]
    places = np.flatnonzero(labels != IGNORE_INDEX)
    assert [LABELS[label] for label in labels[places]] == ROWS[0]["tags"]
    # A word's tokens begin at its label: the tokens before it are those of earlier words and special tokens.
    for word, place in enumerate(places):
        before = tokenizer.decode(tokens[:place].tolist(), skip_special_tokens=True)
        joined = "".join(ROWS[0]["tokens"][:word])
        assert before.replace(" ", "") == joined
    assert examples.report.supervised_tokens == 9


def test_label_positions_of_wordpiece():
    tokens, labels = tokenized(make(), support.bert())[0]
    texts = support.texts_of(support.bert(), tokens)
    assert texts == ["[CLS]", "a", "##n", "##n", "##a", "lives", "in", "y", "##o", "##r", "##k", ".", "[SEP]"]
    assert np.flatnonzero(labels != IGNORE_INDEX).tolist() == [1, 5, 6, 7, 11]


@pytest.mark.parametrize("family", ["bert", "roberta", "t5", "llama"])
@pytest.mark.parametrize("layout", [padded_batch, packed_batch])
def test_loss_and_scores_are_those_of_transformers(family, layout):
    """The reference is the family's own model for token classification, with its head copied into ours."""
    tokenizer = getattr(support, {"llama": "byte_level"}.get(family, family))()
    config = tiny_config(family, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=4)
    torch.manual_seed(0)
    reference = AutoModelForTokenClassification.from_config(config, dtype=torch.float32).eval()
    task = make()
    readout = task.readout(tokenizer, config.hidden_size, HeadSettings())
    head = reference.score if family == "llama" else reference.classifier
    readout.head.layers[0].load_state_dict(head.state_dict())
    examples = tokenized(task, tokenizer)
    body = reference.transformer.encoder if family == "t5" else reference.base_model
    with torch.no_grad():
        reading = readout(support.plain_run(body), layout(examples, np.arange(3)), scores=True)
        expected = 0.0
        for row, scores in enumerate(reading.scores):
            tokens, labels = (torch.from_numpy(side.astype(np.int64))[None] for side in examples[row])
            output = reference(input_ids=tokens, labels=labels)
            words = labels[0] != IGNORE_INDEX
            expected += output.loss.item() * int(words.sum())
            torch.testing.assert_close(scores, output.logits[0, words].log_softmax(-1), rtol=1e-4, atol=1e-5)
    assert reading.loss.item() == pytest.approx(expected, rel=1e-5)
    assert float(reading.weight) == 9


def test_class_weights_are_those_of_torch_and_scikit_learn():
    task = make(class_weights="balanced")
    tags = [tag for row in ROWS for tag in row["tags"]]
    balanced = compute_class_weight("balanced", classes=np.array(LABELS), y=np.array(tags))
    assert [task.class_weights[label] for label in LABELS] == pytest.approx(balanced.tolist())
    examples = tokenized(task, support.bert())
    batch = padded_batch(examples, np.arange(3))
    torch.manual_seed(1)
    hidden = torch.randn(batch.input_ids.numel(), 8)
    readout = task.readout(support.bert(), 8, HeadSettings(hidden_sizes=(5,)))
    reading = readout(lambda batch, ask: hidden[ask.positions], batch)
    expected = torch.nn.functional.cross_entropy(
        readout.head(hidden), batch.labels.flatten(), weight=torch.tensor(balanced, dtype=torch.float32)
    )
    torch.testing.assert_close(reading.loss / reading.weight, expected)
    assert reading.scores is None


def test_what_is_learned_comes_back_from_the_facts():
    task = make(class_weights="balanced")
    facts = task.facts()
    assert facts["labels"] == LABELS
    again = make_task(TaskConfig(**facts), DataConfig(), "encoder")
    assert (again.labels, again.class_weights) == (task.labels, task.class_weights)


def test_numbers_as_tags():
    numbers = [{"tokens": ["a", "b"], "tags": [10, 2]}]
    assert make(numbers).labels == ("2", "10")
    given = make(numbers, labels=LABELS)
    example = tokenized(given, support.bert(), [{"tokens": ["a", "b"], "tags": [0, 3]}])[0]
    assert example[1][[1, 2]].tolist() == [0, 3]
    features = Features({"tokens": ListOf(Value("string")), "ner": ListOf(ClassLabel(names=["O", "B-PER", "B-LOC"]))})
    rows = Dataset.from_dict({"tokens": [["anna", "in"]], "ner": [[1, 0]]}, features=features)
    task = make(rows, columns={"tags": "ner"})
    assert task.labels == ("O", "B-PER", "B-LOC")
    assert task.metrics([{"tags": ["B-PER", "O"]}], rows) == {
        "accuracy": 100.0, "precision": 100.0, "recall": 100.0, "f1": 100.0,
    }  # fmt: skip


def certain(task, tags: list[str]) -> torch.Tensor:
    """Return scores that give almost all probability to these tags."""
    choice = torch.tensor([task.labels.index(tag) for tag in tags])
    return torch.full((len(tags), len(task.labels)), -20.0).scatter(1, choice[:, None], 0.0)


def test_answers_and_their_entities():
    task = make()
    examples = tokenized(task, support.bert())
    answers = task.answers([certain(task, row["tags"]) for row in ROWS], examples, Dataset.from_list(ROWS))
    assert [answer["tags"] for answer in answers] == [row["tags"] for row in ROWS]
    assert answers[0]["entities"] == [
        {"type": "PER", "start": 0, "end": 1, "text": "anna"},
        {"type": "LOC", "start": 3, "end": 4, "text": "york"},
    ]
    assert answers[1]["entities"] == [{"type": "LOC", "start": 0, "end": 2, "text": "new york"}]
    assert answers[2] == {"tags": ["O"], "probabilities": [1.0], "entities": []}


def test_words_beyond_max_length_are_outside_and_count():
    task = make(max_length=7)
    examples = tokenized(task, support.bert())
    tokens, labels = examples[0]
    assert len(tokens) == 7
    assert tokens[-1] == support.bert().sep_token_id
    assert (labels != IGNORE_INDEX).sum() == 2  # anna (4 tokens) and lives
    answers = task.answers(
        [certain(task, ["B-PER", "B-PER"]), certain(task, ["B-LOC", "I-LOC"]), certain(task, ["O"])],
        examples,
        Dataset.from_list(ROWS),
    )
    assert answers[0]["tags"] == ["B-PER", "B-PER", "O", "O", "O"]
    assert answers[0]["probabilities"][2:] == [None] * 3
    assert answers[1]["tags"] == ["B-LOC", "I-LOC", "O"]
    # Right: anna, in, the full stop; new, york, lives; in. Wrong: lives, york.
    metrics = task.metrics(answers, Dataset.from_list(ROWS))
    assert metrics["accuracy"] == pytest.approx(100 * 7 / 9)


def test_span_metrics_of_a_hand_made_example():
    rows = [
        {"tokens": list("abcd"), "tags": ["B-PER", "I-PER", "O", "B-LOC"]},
        {"tokens": list("abc"), "tags": ["B-LOC", "O", "O"]},
    ]
    predicted = [{"tags": ["B-PER", "I-PER", "O", "O"]}, {"tags": ["B-LOC", "I-LOC", "B-PER"]}]
    # Predicted spans: a right PER, a LOC that is too long, a PER that is not in gold. Gold: PER found, two LOC missed.
    metrics = make().metrics(predicted, Dataset.from_list(rows))
    assert metrics == pytest.approx({"accuracy": 100 * 4 / 7, "precision": 100 / 3, "recall": 100 / 3, "f1": 100 / 3})


def test_labels_that_do_not_chunk_have_accuracy_only():
    rows = [{"tokens": ["a", "b", "c"], "tags": ["NOUN", "VERB", "NOUN"]}]
    task = make(rows)
    examples = tokenized(task, support.bert(), rows)
    answers = task.answers([certain(task, ["NOUN", "NOUN", "NOUN"])], examples, Dataset.from_list(rows))
    assert set(answers[0]) == {"tags", "probabilities"}
    assert task.metrics(answers, Dataset.from_list(rows)) == {"accuracy": pytest.approx(200 / 3)}


def test_without_labels_the_tags_are_not_needed():
    rows = [{"tokens": row["tokens"]} for row in ROWS]
    task = make()
    bare, whole = tokenized(task, support.bert(), rows, labelled=False), tokenized(task, support.bert())
    assert bare.tokens.tolist() == whole.tokens.tolist()
    assert ((bare.labels == IGNORE_INDEX) == (whole.labels == IGNORE_INDEX)).all()


def test_refusals():
    task, tokenizer = make(), support.bert()
    said = refusal(tokenized, task, tokenizer, [*ROWS, {"tokens": ["a", "b"], "tags": ["O"]}])
    assert "row 4 of rows.jsonl has 2 words but 1 tags" in said
    said = refusal(tokenized, task, tokenizer, [{"tokens": ["a"], "tags": ["B-ORG"]}])
    assert "row 1 of rows.jsonl has the tag 'B-ORG'" in said
    assert "B-LOC, B-PER" in said
    assert "has to be a list" in refusal(tokenized, task, tokenizer, [{"tokens": "a b", "tags": ["O"]}])
    assert "has no column 'tokens'" in refusal(tokenized, task, tokenizer, [{"words": ["a"], "tags": ["O"]}])
    assert "no word of" in refusal(tokenized, task, tokenizer, [{"tokens": [""], "tags": ["O"]}])
    assert "'X' is not a label" in refusal(make, class_weights={"X": 2.0})
    assert "at least two different tags" in refusal(make, [{"tokens": ["a"], "tags": ["O"]}])
    assert "method.pooling: mean has no effect" in refusal(task.readout, tokenizer, 8, HeadSettings(pooling="mean"))
