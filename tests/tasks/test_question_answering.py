"""Extractive question answering: windows and their labels, the loss, spans over windows, and SQuAD's metrics."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import AutoModelForQuestionAnswering

from ptd.config import DataConfig, TaskConfig
from ptd.data.batches import packed_batch, padded_batch
from ptd.readouts.spans import END, START
from ptd.tasks import make_task
from ptd.tasks.question_answering import best_span, parse_answers
from ptd.types import IGNORE_INDEX, HeadSettings, UserError

support = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("support.py"))))

CONTEXT = "anna lives in york. her cat, tom, is 12 years old"
ROWS = [
    {"question": "who lives?", "context": CONTEXT, "answers": {"text": ["anna"], "answer_start": [0]}},
    {"question": "how old is tom?", "context": CONTEXT, "answers": {"text": ["12 years"], "answer_start": [37]}},
    {"question": "why?", "context": "no reason", "answers": {"text": [], "answer_start": []}},
]


def make(*, max_length: int = 64, **options: Any):
    return make_task(TaskConfig(kind="question_answering", **options), DataConfig(max_length=max_length), "encoder")


def tokenized(task, tokenizer, rows=ROWS, **options):
    return task.tokenize(Dataset.from_list(rows), tokenizer, what="rows.jsonl", **options)


def windows_of(task, examples, rows=ROWS):
    return list(task.windows(examples, Dataset.from_list(rows)))


def refusal(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    return str(caught.value)


def pointed_at(examples, index: int, windows) -> str | None:
    """Return the text that a window's labels point at; None if they point at its first token."""
    labels = examples[index][1]
    candidates = labels[labels != IGNORE_INDEX]
    (start,), (end,) = np.flatnonzero(candidates & START), np.flatnonzero(candidates & END)
    assert start <= end
    if start == 0:
        assert end == 0
        return None
    window = windows[index]
    return window.context[window.characters[start][0] : window.characters[end][1]]


@pytest.mark.parametrize("name", support.ALL)
def test_labels_point_at_the_answer(name):
    examples = tokenized(make(max_length=96), support.ALL[name]())
    windows = windows_of(make(), examples)
    assert [window.row for window in windows] == [0, 1, 2]
    assert [pointed_at(examples, index, windows) for index in range(3)] == ["anna", "12 years", None]


def test_tokens_are_the_tokenizers_own_pair():
    tokenizer = support.bert()
    examples = tokenized(make(), tokenizer)
    for index, row in enumerate(ROWS):
        pair = tokenizer(row["question"], row["context"])
        here = slice(*examples.offsets[index : index + 2])
        assert examples.tokens[here].tolist() == pair["input_ids"]
        assert examples.token_types[here].tolist() == pair["token_type_ids"]
        candidates = np.flatnonzero(examples[index][1] != IGNORE_INDEX)
        context = [at for at, part in enumerate(pair.sequence_ids()) if part == 1]
        assert candidates.tolist() == [0, *context]
    assert tokenized(make(), support.roberta()).token_types is None


def test_a_line_ends_the_question_where_no_special_token_does():
    tokenizer = support.byte_level()
    assert tokenizer.decode(tokenized(make(max_length=96), tokenizer)[2][0].tolist()) == "why?\nno reason"
    assert "\n" not in tokenizer.decode(tokenized(make(max_length=96), support.ALL["llama"]())[2][0].tolist())


words = st.text(alphabet="abcé ,.", min_size=1, max_size=40).filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(support.ALL)), context=words, question=st.sampled_from(["a?", "ab c"]), data=st.data()
)
def test_windows_cover_the_context_and_point_at_the_answer(name, context, question, data):
    """Windows that contain the whole answer point at it, and the other windows point at no answer.

    At least one window contains the whole answer if the answer is not longer than the stride.
    """
    tokenizer = support.ALL[name]()
    inked = [place for place, character in enumerate(context) if not character.isspace()]
    start = data.draw(st.sampled_from(inked))
    stop = data.draw(st.sampled_from([place for place in inked if place >= start])) + 1
    stride = data.draw(st.integers(1, 6))
    gold = context[start:stop]
    row = {"question": question, "context": context, "answers": [{"text": gold, "answer_start": start}]}
    task = make(max_length=data.draw(st.integers(20, 28)), doc_stride=stride)
    examples = tokenized(task, tokenizer, [row])
    covered: set[int] = set()
    found = 0
    windows = windows_of(task, examples, [row])
    for index, window in enumerate(windows):
        tokens, _ = examples[index]
        assert len(tokens) <= task.data.max_length
        spans = window.characters[1:]
        covered.update(*(range(begin, end) for begin, end in spans))
        text = pointed_at(examples, index, windows)
        whole = spans[0][0] <= start and stop <= spans[-1][1]
        assert (text is not None) == whole
        if text is not None:
            found += 1
            # The tokens may extend beyond the answer, but only by part of a word.
            assert gold in text
            assert len(text.split()) == len(gold.split())
            if name in ("gpt", "llama", "left"):
                assert text == gold
    assert covered >= set(inked)
    if len(gold.encode()) <= stride:
        assert found


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("layout", [padded_batch, packed_batch])
def test_loss_and_scores_are_those_of_transformers(family, layout):
    """The reference is the family's own model, its head copied into ours and its logits restricted to candidates."""
    tokenizer = getattr(support, {"llama": "byte_level"}.get(family, family))()
    config = tiny_config(family, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    reference = AutoModelForQuestionAnswering.from_config(config, dtype=torch.float32).eval()
    task = make(max_length=40, doc_stride=8)
    readout = task.readout(tokenizer, config.hidden_size, HeadSettings())
    readout.head.layers[0].load_state_dict(reference.qa_outputs.state_dict())
    examples = tokenized(task, tokenizer)
    assert len(examples) > 3, "some context goes in windows"
    with torch.no_grad():
        run = support.plain_run(getattr(reference, reference.base_model_prefix))
        reading = readout(run, layout(examples, np.arange(len(examples))), scores=True)
        expected = 0.0
        for index, scores in enumerate(reading.scores):
            tokens, labels = (torch.from_numpy(side.astype(np.int64)) for side in examples[index])
            types = {}
            if examples.token_types is not None:
                here = slice(*examples.offsets[index : index + 2])
                types["token_type_ids"] = torch.from_numpy(examples.token_types[here].astype(np.int64))[None]
            output = reference(input_ids=tokens[None], **types)
            candidates = labels != IGNORE_INDEX
            logits = torch.stack([output.start_logits[0], output.end_logits[0]], dim=1)[candidates]
            torch.testing.assert_close(scores, logits, rtol=1e-4, atol=1e-5)
            for side, flag in enumerate((START, END)):
                target = (labels[candidates] & flag != 0).nonzero().flatten()
                expected += cross_entropy(logits[None, :, side], target).item() / 2
    assert reading.loss.item() == pytest.approx(expected, rel=1e-5)
    assert reading.weight == len(examples)


def test_gradients_are_finite_and_reach_every_candidate():
    examples = tokenized(make(max_length=40, doc_stride=8), support.bert())
    batch = padded_batch(examples, np.arange(len(examples)))
    torch.manual_seed(0)
    hidden = torch.randn(batch.input_ids.numel(), 8, requires_grad=True)
    readout = make().readout(support.bert(), 8, HeadSettings())
    torch.nn.init.normal_(readout.head.layers[-1].weight)  # its initial values are zero
    readout(lambda batch, ask: hidden[ask.positions], batch).loss.backward()
    reached = hidden.grad.abs().sum(dim=1) > 0
    assert torch.isfinite(hidden.grad).all()
    assert (reached == (batch.labels.flatten() != IGNORE_INDEX)).all()


def sure(window, span: tuple[int, int], height: float) -> torch.Tensor:
    """Return logits of a window that favour a span of candidates by ``height``."""
    logits = torch.zeros(len(window.characters), 2)
    logits[span[0], 0] = logits[span[1], 1] = height
    return logits


def test_answers_are_the_best_over_windows():
    task = make(max_length=24, doc_stride=8)
    examples = tokenized(task, support.bert())
    windows = windows_of(task, examples)
    mine = [index for index, window in enumerate(windows) if window.row == 1]
    assert len(mine) > 2
    scores = [sure(window, (0, 0), 5.0) for window in windows]
    scores[mine[1]] = sure(windows[mine[1]], (2, 3), 8.0)
    scores[mine[2]] = sure(windows[mine[2]], (1, 1), 6.0)
    answers = task.answers(scores, examples, Dataset.from_list(ROWS))
    assert len(answers) == 3
    window = windows[mine[1]]
    assert answers[1]["answer"] == CONTEXT[window.characters[2][0] : window.characters[3][1]]
    size = len(window.characters)
    assert answers[1]["score"] == pytest.approx((np.exp(8) / (np.exp(8) + size - 1)) ** 2, rel=1e-6)
    assert (answers[0]["answer"], answers[2]["answer"]) == ("", "")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(1, 9), st.integers(0, 10**6))
def test_best_span_is_that_of_all(tokens, longest, seed):
    log_probs = torch.randn(tokens, 2, generator=torch.Generator().manual_seed(seed)).double().log_softmax(0)
    score, start, end = best_span(log_probs, longest)
    every = {
        (i, j): float(log_probs[i, 0] + log_probs[j, 1])
        for i in range(tokens)
        for j in range(i, min(i + longest, tokens))
    }
    assert every[(start, end)] == score == max(every.values())


def test_the_whole_way_back():
    """Scores that follow the labels give, across windows, the gold answers and metrics of 100."""
    task = make(max_length=30, doc_stride=8)
    for name in support.ALL:
        examples = tokenized(make(max_length=50, doc_stride=16), support.ALL[name]())
        scores = []
        for index in range(len(examples)):
            labels = torch.from_numpy(examples[index][1])
            flags = labels[labels != IGNORE_INDEX]
            scores.append(9.0 * torch.stack([flags & START != 0, flags & END != 0], dim=1))
        answers = task.answers(scores, examples, Dataset.from_list(ROWS))
        assert [answer["answer"] for answer in answers] == ["anna", "12 years", ""]
        assert task.metrics(answers, Dataset.from_list(ROWS)) == {"exact_match": 100.0, "f1": 100.0}


@pytest.mark.parametrize(
    ("prediction", "gold", "exact", "f1"),
    [
        ("the cat sat", "a cat sat.", 1, 1.0),
        ("cat", "the cat sat on", 0, 2 * 1 * (1 / 3) / (1 + 1 / 3)),
        ("cat cat", "cat", 0, 2 * 0.5 * 1 / 1.5),
        ("dog", "cat", 0, 0.0),
        ("", "", 1, 1.0),
        ("", "cat", 0, 0.0),
        ("the", "", 1, 1.0),
        ("  The  Cat's, an  OLD a-theme!", "cats old atheme", 1, 1.0),
    ],
)
def test_metrics_are_squads(prediction, gold, exact, f1):
    """Case, punctuation and articles are ignored; words are compared as bags; an empty answer can be right."""
    rows = Dataset.from_list([{"question": "q", "context": f"{gold} is", "answers": gold}])
    metrics = make().metrics([{"answer": prediction}], rows)
    assert metrics == pytest.approx({"exact_match": 100 * exact, "f1": 100 * f1})


def test_metrics_take_the_best_gold_answer():
    row = {**ROWS[0], "answers": {"text": ["anna lives", "anna"], "answer_start": [0, 0]}}
    rows = Dataset.from_list([row, row, ROWS[2]])
    given = [{"answer": "Anna"}, {"answer": "lives"}, {"answer": "no"}]
    assert make().metrics(given, rows) == pytest.approx({"exact_match": 100 / 3, "f1": 100 * (1 + 2 / 3) / 3})


def test_forms_of_answers():
    assert parse_answers({"text": ["in"], "answer_start": [11]}, CONTEXT, "row 1") == [("in", 11)]
    assert parse_answers([{"text": " in ", "answer_start": 10}], CONTEXT, "row 1") == [("in", 11)]
    assert parse_answers("york", CONTEXT, "row 1") == [("york", 14)]
    assert parse_answers(["york", "anna"], CONTEXT, "row 1") == [("york", 14), ("anna", 0)]
    for nothing in ("", [], {"text": [], "answer_start": []}, {"text": []}):
        assert parse_answers(nothing, CONTEXT, "row 1") == []


def test_without_labels_every_window_points_at_its_first_token():
    rows = [{"question": row["question"], "context": row["context"]} for row in ROWS]
    bare, whole = tokenized(make(), support.bert(), rows, labelled=False), tokenized(make(), support.bert())
    assert bare.tokens.tolist() == whole.tokens.tolist()
    assert {pointed_at(bare, index, windows_of(make(), bare)) for index in range(len(bare))} == {None}


def test_refusals():
    tokenizer = support.bert()
    moved = {**ROWS[0], "answers": {"text": ["anna"], "answer_start": [1]}}
    said = refusal(tokenized, make(), tokenizer, [ROWS[0], moved])
    assert "row 2 of rows.jsonl: at answer_start 1 the context has 'nna '" in said
    assert "does not contain the answer 'bob'" in refusal(parse_answers, "bob", CONTEXT, "row 1")
    assert "answers has 2 texts but 1" in refusal(parse_answers, {"text": ["a", "b"], "answer_start": [0]}, "a", "")
    assert "answers has to be" in refusal(parse_answers, 3, CONTEXT, "row 1")
    assert "has no 'answers'" in refusal(tokenized, make(), tokenizer, [{**ROWS[0], "answers": None}, ROWS[0]])
    said = refusal(tokenized, make(max_length=20, doc_stride=16), tokenizer)
    assert "row 1 of rows.jsonl: the question (" in said
    assert "task.doc_stride (16)" in said
    assert "'context' has to be text" in refusal(tokenized, make(), tokenizer, [{**ROWS[0], "context": " "}])
    task = make()
    assert "method.pooling: cls has no effect" in refusal(task.readout, tokenizer, 8, HeadSettings(pooling="cls"))
