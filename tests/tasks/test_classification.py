"""Classification: word scores compared with transformers alone, trained heads, layouts, labels, weights, refusals."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Json, Value
from families import tiny_model, tiny_tokenizer
from sklearn.utils.class_weight import compute_class_weight
from tokenizers import AddedToken
from torch import Tensor
from torch.nn.functional import cross_entropy

from ptd.config import DataConfig, TaskConfig
from ptd.data import Batches
from ptd.data.batches import packed_batch, padded_batch
from ptd.tasks import make_task
from ptd.types import IGNORE_INDEX, HeadSettings, UserError

support = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("support.py"))))

ROWS = [
    {"text": "lives in the end", "label": "up"},
    {"text": "a", "label": "down"},
    {"text": "no one lives in the in the", "label": "flat"},
    {"text": "i see", "label": "up"},
]
LABELS = ["up", "down", "flat"]
WORDS = {"up": ["in", "so good"], "down": ["the", "lives", "no"], "flat": ["meh"]}
PATTERNS = ["{text} it was {mask}.", "so {mask}! {text}"]
WEIGHTS = {"up": 0.5, "down": 2.0}


def make(architecture: str = "encoder", *, max_length: int = 64, columns: dict[str, str] | None = None, **options: Any):
    config = TaskConfig(kind="classification", **options)
    return make_task(config, DataConfig(max_length=max_length, columns=columns or {}), architecture)


def tokenized(task, tokenizer, rows=ROWS, **options):
    return task.tokenize(Dataset.from_list(list(rows)), tokenizer, what="rows.jsonl", **options)


def logits_run(model):
    return support.plain_run(lambda **given: SimpleNamespace(last_hidden_state=model(**given).logits))


def refusal(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    return str(caught.value)


# The reference uses strings, a tokenizer and a model, and nothing from ptd.


def log_q(model, ids: list[int], places: list[int], tokens: list[int]) -> Tensor:
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    return torch.stack([log_p[place, token] for place, token in zip(places, tokens, strict=True)]).sum()


def masked_word(model, tokenizer, pattern: str, text: str, word: str) -> Tensor:
    spaced = " " + word if pattern[pattern.index("{mask}") - 1] == " " else word
    tokens = tokenizer(spaced, add_special_tokens=False)["input_ids"]
    sentence = pattern.replace("{text}", text).replace("{mask}", tokenizer.mask_token * len(tokens))
    ids = tokenizer(sentence)["input_ids"]
    return log_q(model, ids, [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id], tokens)


def causal_word(model, tokenizer, pattern: str, text: str, word: str) -> Tensor:
    prompt = pattern[: pattern.index("{mask}")].replace("{text}", text)
    tokens = tokenizer((" " if prompt.endswith(" ") else "") + word, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt.rstrip(" "))["input_ids"]
    return log_q(model, ids + tokens, list(range(len(ids) - 1, len(ids) - 1 + len(tokens))), tokens)


def expected_log_p(word_of, model, tokenizer, patterns, verbalizer, rows) -> Tensor:
    """Return log-probabilities ``[rows, patterns, labels]`` in float64."""
    scores = [
        [
            [torch.stack([word_of(model, tokenizer, pattern, row["text"], word) for word in words]).mean()
             for words in verbalizer.values()]
            for pattern in patterns
        ]
        for row in rows
    ]  # fmt: skip
    return torch.tensor(scores, dtype=torch.float64).log_softmax(dim=-1)


def check_reading(task, tokenizer, model, log_p: Tensor, weights: dict[str, float] | None = None) -> None:
    examples = tokenized(task, tokenizer)
    readout = task.readout(tokenizer, 32, HeadSettings())
    assert list(readout.parameters()) == []
    assert readout.state_dict() == {}
    rows = np.array([2, 0, 3, 1])
    targets = torch.tensor([LABELS.index(ROWS[row]["label"]) for row in rows])
    weight = torch.tensor([(weights or {}).get(ROWS[row]["label"], 1.0) for row in rows])
    per_row = torch.stack([cross_entropy(log_p[rows, p], targets, reduction="none") for p in range(log_p.shape[1])])
    for batch in (padded_batch(examples, rows), packed_batch(examples, rows)):
        reading = readout(logits_run(model), batch, True)
        torch.testing.assert_close(reading.loss.double(), (weight * per_row.mean(dim=0)).sum(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(reading.weight, weight.sum())
        scores = torch.stack(reading.scores)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.exp().double(), log_p[rows].exp().mean(dim=1), rtol=1e-4, atol=1e-6)
        assert readout(logits_run(model), batch).scores is None


def roberta():
    """Return a RoBERTa tokenizer with the mask of the published checkpoints, which absorbs the space before it."""
    tokenizer = support.roberta()
    tokenizer.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True, normalized=False, special=True)})
    assert support.texts_of(tokenizer, tokenizer("in <mask>")["input_ids"]) == ["<s>", "in", "<mask>", "</s>"]
    return tokenizer


TOKENIZERS = {"bert": support.bert, "roberta": roberta}


@pytest.mark.parametrize("family", list(TOKENIZERS))
@pytest.mark.parametrize("patterns", [PATTERNS[:1], PATTERNS], ids=["one", "ensemble"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["even", "weighted"])
def test_words_at_masks_score_as_with_transformers_alone(family, patterns, weights):
    tokenizer = TOKENIZERS[family]()
    model = tiny_model(family, vocab_size=len(tokenizer))
    task = make(patterns=patterns, verbalizer=WORDS, class_weights=weights)
    log_p = expected_log_p(masked_word, model, tokenizer, patterns, WORDS, ROWS)
    check_reading(task, tokenizer, model, log_p, weights)
    assert (task.output, task.cloze, task.labels) == ("masked_lm", True, tuple(LABELS))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("specials", [False, True])
def test_words_behind_a_prompt_score_as_with_transformers_alone(family, specials):
    tokenizer = support.byte_level(specials=specials)
    model = tiny_model(family)
    verbalizer = {"up": ["+", "so"], "down": ["-", "=", "soon"], "flat": ["0"]}
    patterns = ["{text} it was {mask}.", "{text}\nA: >{mask} indeed"]
    log_p = expected_log_p(causal_word, model, tokenizer, patterns, verbalizer, ROWS)
    task = make("decoder", patterns=patterns, verbalizer=verbalizer)
    check_reading(task, tokenizer, model, log_p)
    assert task.output == "causal_lm"
    examples = tokenized(task, tokenizer)
    # After a space all words have two or more tokens: "+", "-", "=" and "0" share the sequence that ends in " ".
    assert examples.group == 3 + 3
    first = [
        tokenizer.decode(examples.tokens[a:b]) for a, b in zip(examples.offsets, examples.offsets[1:], strict=False)
    ]
    bos = "<s>" if specials else ""
    assert first[:6] == [
        f"{bos}lives in the end it was{tail}" for tail in (" ", " s", " soo")
    ] + [f"{bos}lives in the end\nA: >{tail}" for tail in ("", "s", "soo")]  # fmt: skip


def test_words_of_one_token_score_by_their_mean_logit():
    """As in PET, scores are a softmax over the labels' mean word logits; the normaliser of the vocabulary cancels."""
    tokenizer = support.bert()
    model = tiny_model("bert", vocab_size=len(tokenizer))
    words = {"up": ["in", "a"], "down": ["the", "lives", "."]}
    task = make(patterns=["{text} {mask}"], verbalizer=words)
    examples = tokenized(task, tokenizer, ROWS[:2])
    reading = task.readout(tokenizer, 32, HeadSettings())(logits_run(model), padded_batch(examples, np.arange(2)), True)
    for row, scores in zip(ROWS, reading.scores, strict=False):
        ids = tokenizer(f"{row['text']} [MASK]", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -2]
        means = [logits[tokenizer.convert_tokens_to_ids(list(label))].mean() for label in words.values()]
        torch.testing.assert_close(scores, torch.stack(means).log_softmax(dim=0), rtol=1e-5, atol=1e-5)


def test_gradients_reach_what_the_backbone_puts_out():
    tokenizer = support.bert()
    task = make(patterns=PATTERNS, verbalizer=WORDS)
    batch = padded_batch(tokenized(task, tokenizer), np.arange(4))
    output = torch.randn(int((batch.labels != IGNORE_INDEX).sum()), len(tokenizer), requires_grad=True)
    task.readout(tokenizer, 32, HeadSettings())(lambda batch, ask: output, batch).loss.backward()
    assert (output.grad.abs().sum(dim=1) > 0).all()


def test_layout_of_a_cloze():
    tokenizer = support.bert()
    task = make(patterns=["{v:2}{text} was {mask}. {v:1}"], verbalizer={"up": ["in"], "down": ["no"]})
    examples = tokenized(task, tokenizer, ROWS[1:2] + ROWS[:1])
    assert (examples.group, len(examples), task.virtual_tokens) == (2, 2, 3)
    tokens, labels = (array.tolist() for array in examples[0])
    spelled = [tokenizer.convert_ids_to_tokens(token) if token >= 0 else token for token in tokens]
    start = ["[CLS]", -1, -2, "a", "w", "##a", "##s"]
    assert spelled == [*start, "[MASK]", ".", -3, "[SEP]", *start, "[MASK]", "[MASK]", ".", -3, "[SEP]"]
    read = [place for place, token in enumerate(spelled) if token == "[MASK]"]
    assert [place for place, label in enumerate(labels) if label != IGNORE_INDEX] == read
    assert {labels[place] for place in read} == {1}
    assert examples.report.supervised_tokens == 6


def test_every_length_of_word_sees_the_same_text():
    tokenizer = support.bert()
    task = make(patterns=["{text}: {mask}"], verbalizer={"up": ["in"], "down": ["soon"]}, max_length=12)
    examples = tokenized(task, tokenizer, [{"text": "abcdefghijkl", "label": "up"}])
    tokens = tokenizer.convert_ids_to_tokens(examples.tokens.tolist())
    cut = ["[CLS]", "a", "##b", "##c", "##d", "##e"]
    assert ":" not in tokenizer.get_vocab()
    assert tokens == [*cut, "[UNK]", "[MASK]", "[SEP]", *cut, "[UNK]", *["[MASK]"] * 4, "[SEP]"]
    assert examples.report.texts_cut == 1


def test_words_as_they_stand_in_place():
    """A word is read with its space: in byte-level BPE, " in" and "in" are different tokens."""
    tokenizer = support.roberta()

    def tokens_read(pattern: str) -> list[str]:
        task = make(patterns=[pattern], verbalizer={"up": ["in"], "down": [" li "]})
        readout = task.readout(tokenizer, 32, HeadSettings())
        return tokenizer.convert_ids_to_tokens(readout.tokens.tolist())

    assert tokens_read("{text} x {mask}") == tokens_read("{text} {mask}") == ["Ġin", "Ġli"]
    assert tokens_read("{v:1} {mask}{text}") == ["Ġin", "Ġli"]
    assert tokens_read("{text} ({mask})") == tokens_read("{mask} {text}") == ["in", "l", "i"]


PLAIN = [{"text": "lives in", "label": 1}, {"text": "the", "label": 0}, {"text": "in in", "label": 1}]


def test_a_text_or_a_pair_is_what_the_tokenizer_makes_of_it():
    for name, build in support.ALL.items():
        tokenizer = build()
        for rows in (PLAIN, [{**row, "pair": "no one"} for row in PLAIN]):
            task = make(max_length=9).fit(Dataset.from_list(rows), "rows")
            examples = tokenized(task, tokenizer, rows)
            texts = [[row[key] for row in rows] for key in ("text", "pair") if key in rows[0]]
            tokenizer.truncation_side = "right"
            expected = tokenizer(*texts, truncation=True, max_length=9)
            types = expected.get("token_type_ids")
            for row in range(len(rows)):
                tokens, labels = examples[row]
                assert tokens.tolist() == expected["input_ids"][row], name
                assert labels.tolist() == [rows[row]["label"], *[IGNORE_INDEX] * (len(tokens) - 1)]
            if name == "bert" and "pair" in rows[0]:
                assert examples.token_types.tolist() == [type for row in types for type in row]
            elif name in ("bert", "roberta", "gpt"):
                assert examples.token_types is None
            whole = tokenizer(*texts)["input_ids"]
            assert examples.report.texts_cut == sum(len(ids) > 9 for ids in whole)


@pytest.mark.parametrize(
    ("architecture", "family", "pooling", "expected"),
    [
        ("encoder", "bert", "auto", "cls"),
        ("encoder", "bert", "mean", "mean"),
        ("encoder", "bert", "last", "last"),
        ("decoder", "llama", "auto", "last"),
        ("encoder-decoder", "bert", "auto", "mean"),
    ],
)
def test_a_trained_head_reads_the_pooled_hidden_states(architecture, family, pooling, expected):
    tokenizer = support.bert()
    model = tiny_model(family, vocab_size=len(tokenizer)).base_model
    task = make(architecture, labels=[0, 1], class_weights={"1": 3.0})
    torch.manual_seed(0)
    readout = task.readout(tokenizer, 32, HeadSettings(pooling=pooling, hidden_sizes=(7,)))
    assert [tuple(parameter.shape) for parameter in readout.parameters()] == [(7, 32), (7,), (2, 7), (2,)]
    torch.nn.init.normal_(readout.head.layers[-1].weight)  # its initial values are zero
    rows = [{**row, "pair": "a the"} for row in PLAIN]
    examples = tokenized(task, tokenizer, rows)
    logits = []
    for row in rows:
        given = tokenizer(row["text"], row["pair"], return_tensors="pt")
        if family != "bert":
            del given["token_type_ids"]
        with torch.no_grad():
            hidden = model(**given).last_hidden_state[0]
        logits.append(readout.head({"cls": hidden[0], "last": hidden[-1], "mean": hidden.mean(dim=0)}[expected]))
    targets = torch.tensor([row["label"] for row in rows])
    loss = cross_entropy(torch.stack(logits), targets, torch.tensor([1.0, 3.0]), reduction="sum")

    def body(**given):
        if family != "bert":
            given.pop("token_type_ids", None)
        return model(**given)

    for batch in (padded_batch(examples, np.arange(3)), packed_batch(examples, np.arange(3))):
        reading = readout(support.plain_run(body), batch, True)
        torch.testing.assert_close(reading.loss, loss, rtol=1e-5, atol=1e-5)
        assert float(reading.weight) == 7.0
        torch.testing.assert_close(
            torch.stack(reading.scores), torch.stack(logits).log_softmax(dim=1), rtol=1e-5, atol=1e-5
        )
        reading.loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in readout.parameters())


def test_patterns_without_masks_are_layouts_for_a_head():
    tokenizer = support.bert()
    patterns = ["{v:1} {text} in {v:1}", "the {v:2} {text}"]
    task = make(labels=[0, 1], patterns=patterns)
    assert (task.output, task.cloze, task.virtual_tokens) == ("body", False, 2)
    examples = tokenized(task, tokenizer, PLAIN)
    assert examples.group == 2
    spelled = [tokenizer.convert_ids_to_tokens(token) if token >= 0 else token for token in examples[1][0].tolist()]
    assert spelled == ["[CLS]", -1, "the", "in", -2, "[SEP]", "[CLS]", "the", -1, -2, "the", "[SEP]"]
    assert np.flatnonzero(examples[1][1] != IGNORE_INDEX).tolist() == [0, 6]
    hidden = torch.randn(6, 32)
    readout = task.readout(tokenizer, 32, HeadSettings())
    reading = readout(lambda batch, ask: hidden, padded_batch(examples, np.arange(3)), True)
    log_p = readout.head(hidden).log_softmax(dim=-1).view(3, 2, 2)
    targets = torch.tensor([1, 0, 1])
    losses = [cross_entropy(log_p[:, pattern], targets, reduction="sum") for pattern in range(2)]
    torch.testing.assert_close(reading.loss, sum(losses) / 2)
    torch.testing.assert_close(torch.stack(reading.scores).exp(), log_p.exp().mean(dim=1))


def test_fields_of_patterns_are_read_from_their_columns():
    tokenizer = support.bert()
    renamed = [{"words": row["text"], **{key: row[key] for key in row if key != "text"}} for row in ROWS]
    task = make(patterns=PATTERNS, verbalizer=WORDS, columns={"text": "words"})
    named = tokenized(task, tokenizer, renamed)
    for got, want in zip(named, tokenized(make(patterns=PATTERNS, verbalizer=WORDS), tokenizer, ROWS), strict=True):
        for each, expected in zip(got, want, strict=True):
            np.testing.assert_array_equal(each, expected)


def test_a_filler_runs_and_counts_nothing():
    tokenizer = support.bert()
    for task in (make(patterns=PATTERNS, verbalizer=WORDS), make(labels=LABELS)):
        examples = tokenized(task, tokenizer, ROWS[:1])
        batches = Batches(examples, rank=1, world_size=2, per_device_batch_size=1, packing=False)
        (filler,) = batches.step(0)
        ran: list[int] = []
        readout = task.readout(tokenizer, 32, HeadSettings())

        def run(batch, ask, ran=ran):
            ran.append(len(ask.positions))
            return torch.ones(len(ask.positions), 32)

        reading = readout(run, filler, True)
        assert ran == [1]
        assert (float(reading.loss), reading.weight, reading.scores) == (0.0, 0.0, [])


def test_labels_and_balanced_weights_are_learned_from_the_training_rows():
    names = ["b", "a", "b", "c", "b", "a"]
    rows = Dataset.from_list([{"body": "x", "kind": name} for name in names])
    columns = {"text": "body", "label": "kind"}
    task = make(columns=columns, class_weights="balanced").fit(rows, "data.train")
    assert task.labels == ("a", "b", "c")
    expected = compute_class_weight("balanced", classes=np.array(task.labels), y=np.array(names))
    readout = task.readout(support.bert(), 32, HeadSettings())
    np.testing.assert_allclose(readout.class_weights.numpy(), expected, rtol=1e-6)
    # A label without rows gets the weight 1; the others are balanced among themselves.
    given = make(columns=columns, class_weights="balanced", labels=["c", "z", "b", "a"]).fit(rows, "data.train")
    assert given.labels == ("c", "z", "b", "a")
    weights = given.readout(support.bert(), 32, HeadSettings()).class_weights
    np.testing.assert_allclose(weights.numpy(), [expected[2], 1.0, expected[1], expected[0]], rtol=1e-6)
    # The facts hold what was learned; an adapter rebuilds the task from them.
    facts = task.facts()
    assert facts["labels"] == ["a", "b", "c"]
    again = make_task(TaskConfig(**facts), DataConfig(columns=columns), "encoder")
    assert again.labels == task.labels
    tokens = [t.tokenize(rows, support.bert(), what="rows").digest() for t in (task, again)]
    assert tokens[0] == tokens[1]


def test_numbers_and_class_labels_are_names():
    rows = Dataset.from_list([{"text": "x", "label": number} for number in (1, 0, 1)])
    assert make().fit(rows, "rows").labels == ("0", "1")
    named = rows.cast(Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])}))
    task = make().fit(named, "rows")
    assert task.labels == ("no", "yes")
    assert [labels[0] for _, labels in task.tokenize(named, support.bert(), what="rows")] == [1, 0, 1]


def test_rows_without_labels_have_the_same_tokens():
    tokenizer = support.bert()
    bare = [{"text": row["text"]} for row in ROWS]
    for task in (make(patterns=PATTERNS, verbalizer=WORDS), make(labels=LABELS)):
        labelled, examples = tokenized(task, tokenizer), tokenized(task, tokenizer, bare, labelled=False)
        assert (examples.tokens == labelled.tokens).all()
        assert ((examples.labels == IGNORE_INDEX) == (labelled.labels == IGNORE_INDEX)).all()
        assert "has no column 'label'" in refusal(tokenized, task, tokenizer, bare)


def test_answers_and_metrics():
    task = make(labels=LABELS)
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2], [0.2, 0.3, 0.5]])
    answers = task.answers(list(probabilities.log()), None, None)
    assert [answer["label"] for answer in answers] == ["up", "down", "up", "flat"]
    assert answers[0]["probabilities"] == pytest.approx({"up": 0.5, "down": 0.3, "flat": 0.2})
    metrics = task.metrics(answers, Dataset.from_list(ROWS))
    # Right: rows 1 and 2. F1: up 1/2, down 1, flat 0. MCC = (c·s − Σ p_k t_k) / √((s² − Σp²)(s² − Σt²)).
    assert metrics == pytest.approx({"accuracy": 50.0, "macro_f1": 50.0, "mcc": 100 * (2 * 4 - 6) / (16 - 6)})
    same = task.metrics([{"label": "up"}] * 2, Dataset.from_list([ROWS[0], ROWS[3]]))
    assert same == {"accuracy": 100.0, "macro_f1": 100.0, "mcc": 0.0}


CLOZE: dict[str, Any] = {"patterns": ["{text} {mask}"], "verbalizer": {"a": ["in"], "b": ["the"]}}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"patterns": []}, "task.patterns: the list is empty"),
        ({**CLOZE, "patterns": ["{mask}"]}, "'{mask}' has no {column} field"),
        ({**CLOZE, "patterns": ["{text} {mask} {mask}"]}, "has {mask} 2 times; every pattern needs it exactly once"),
        ({**CLOZE, "patterns": ["{text} {mask}", "{text}"]}, "'{text}' has {mask} 0 times"),
        ({**CLOZE, "patterns": ["{v:1} {text} {mask}", "{text} {mask}"]}, "the number of virtual tokens differs"),
        ({"patterns": ["{text} {mask}"]}, "task.verbalizer gives no words; set it"),
        ({**CLOZE, "patterns": ["{text}"]}, "task.verbalizer: has no effect without a {mask}"),
        ({"verbalizer": {"a": ["in"], "b": ["the"]}}, "task.verbalizer: has no effect without a {mask}"),
        ({**CLOZE, "labels": ["a", "b", "c"]}, "task.verbalizer: has no word for the label 'c'"),
        ({**CLOZE, "labels": ["b", "c"]}, "task.verbalizer: has no word for the label 'c'"),
        ({**CLOZE, "verbalizer": {"a": ["x"], "b": []}}, "task.verbalizer: has no word for the label 'b'"),
        ({**CLOZE, "labels": ["a"]}, "task.verbalizer: 'b' is not a label; the labels are a"),
        ({"labels": ["a"]}, "task.labels: ['a'] leaves nothing to choose from"),
        ({"labels": ["a", "b"], "class_weights": {"c": 1.0}}, "task.class_weights: 'c' is not a label"),
        ({"labels": ["a", "b"], "class_weights": {"a": 0.0}}, "task.class_weights.a: 0.0 is not a weight"),
        (
            {**CLOZE, "patterns": ["{body} {mask}"], "columns": {"text": "body"}},
            "data.columns.text: has no effect, because task.patterns has no field {text}",
        ),
        ({**CLOZE, "architecture": "encoder-decoder"}, "set task.kind: seq2seq_lm with the label's word as completion"),
        (
            {**CLOZE, "architecture": "decoder", "patterns": ["{mask}: {text}"]},
            "has a field or virtual tokens after {mask}, which a decoder does not see",
        ),
        ({**CLOZE, "architecture": "decoder", "patterns": ["{text} {mask} {v:1}"]}, "after {mask}"),
    ],
)
def test_refused_settings(options, expected):
    assert expected in refusal(make, **options)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"a": ["in"], "b": ["§"]}, "task.verbalizer.b: the word '§' is unknown to the tokenizer"),
        ({"a": ["in"], "b": ["  "]}, "task.verbalizer.b: the word '  ' has no tokens"),
        (
            {"a": ["in"], "b": ["the", "in"]},
            "task.verbalizer.b: the word 'in' has the same tokens as 'in' of label 'a'",
        ),
        ({"a": ["No"], "b": ["no"]}, "task.verbalizer.b: the word 'no' has the same tokens as 'No' of label 'a'"),
    ],
)
def test_refused_words(words, expected):
    task = make(patterns=["{text} {mask}"], verbalizer=words)
    assert expected in refusal(task.readout, support.bert(), 32, HeadSettings())
    rows = [{"text": "x", "label": "a"}]
    assert expected in refusal(tokenized, task, support.bert(), rows)


def test_refuses_a_tokenizer_without_mask():
    message = refusal(tokenized, make(**CLOZE), support.byte_level(), [{"text": "x", "label": "a"}])
    assert "has no mask token to put there" in message
    assert tiny_tokenizer().mask_token_id is not None  # this tokenizer has a mask, but a decoder reads words without it
    examples = tokenized(make("decoder", **CLOZE), tiny_tokenizer(), [{"text": "x", "label": "a"}])
    assert tiny_tokenizer().mask_token_id not in examples.tokens


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        ([{"text": "x", "label": "z"}], {}, "row 1 of rows.jsonl has the label 'z', but the labels are a, b"),
        ([{"text": "x", "label": None}], {}, "row 1 of rows.jsonl has no 'label'"),
        ([{"text": "x", "label": ["a"]}], {}, "'label' has to be a label (text or a number), but is list"),
        ([{"text": "x", "label": "a"}, {"text": 3, "label": "a"}], {}, "'text' has to be text, but is int (3)"),
        ([{"text": "x", "pair": None, "label": "a"}], {}, "'pair' has to be text, but is missing"),
        ([{"text": "x", "label": "a"}], {"columns": {"pair": "other"}}, "rows.jsonl has no column 'other'"),
        ([{"text": "x", "label": "a"}], {"max_length": 2}, "data.max_length: 2 leaves no room next to 2 special"),
        (
            [{"text": "x", "label": "a"}],
            {"patterns": ["{body}"]},
            "task.patterns: {body} is not a column of rows.jsonl",
        ),
        (
            [{"text": "x", "label": "a"}],
            {"patterns": ["{text} in the"], "max_length": 3},
            "task.patterns: '{text} in the' takes more than data.max_length (3) tokens without its fields",
        ),
    ],
)
def test_refused_rows(rows, options, expected):
    mixed = len({type(row["text"]) for row in rows}) > 1  # JSON files may mix types
    features = Features({"text": Json(), "label": Value("string")}) if mixed else None
    data = Dataset.from_list(rows, features=features)
    task = make(labels=["a", "b"], **options)
    assert expected in refusal(task.tokenize, data, support.bert(), what="rows.jsonl")


def test_refuses_rows_without_a_token():
    rows = [{"text": "a", "label": "a"}, {"text": "", "label": "b"}]
    tokenizer = support.byte_level()
    for options in ({"labels": ["a", "b"]}, {"labels": ["a", "b"], "patterns": ["{text}"]}, CLOZE):
        message = refusal(tokenized, make("decoder", **options), tokenizer, rows)
        assert message.startswith("row 2 of rows.jsonl")
        assert "token" in message
