"""``ptd predict`` adds to each row the prediction that transformers computes from the same backbone and head."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import save_backbone, tiny_model, tiny_tokenizer
from transformers import AutoModel, AutoModelForCausalLM

from ptd.checkpoint import Adapter, save_adapter
from ptd.commands.predict import predict
from ptd.commands.train import train
from ptd.config import DataConfig, TaskConfig, parse_config
from ptd.tasks import make_task
from ptd.types import EmptyLayout, HeadSettings, UserError

support = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "tasks" / "support.py")))

WORDS = [["anna", "lives", "in", "york"], ["the", "cat", "in", "the", "old", "town"], ["a", "-"]]
QUESTIONS = [
    {"id": "x7", "question": "who lives?", "context": "anna lives in the old town of york, 12 miles away"},
    {"id": "x8", "question": "why?", "context": "no"},
]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """Save a tiny BERT with a WordPiece tokenizer; return its folder."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = support.bert()
    tiny_model("bert", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def head_adapter(folder: Path, backbone: Path, outputs: int, task: dict[str, Any], **data: Any) -> torch.nn.Linear:
    """Save an adapter that is a random linear head; return the head."""
    torch.manual_seed(0)
    head = torch.nn.Linear(32, outputs)
    with torch.no_grad():
        head.weight.mul_(5)
    made = make_task(TaskConfig(**task), DataConfig(**data), "encoder")
    names = [name for name, _ in made.readout(support.bert(), 32, HeadSettings()).named_parameters()]
    facts = {"method": {"name": "head"}, "task": made.facts(), "data": data}
    tensors = dict(zip(names, (head.weight, head.bias), strict=True))
    save_adapter(folder, Adapter(torch.empty(0, 0), EmptyLayout(), str(backbone), head=tensors, facts=facts))
    return head


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def scores_of(backbone: Path, head: torch.nn.Linear, encoded) -> torch.Tensor:
    with torch.no_grad():
        return head(AutoModel.from_pretrained(backbone).eval()(**encoded).last_hidden_state[0])


@pytest.mark.parametrize("packing", [True, False])
def test_tags(tmp_path, backbone, packing):
    labels = ["B-LOC", "I-LOC", "O"]
    task = {"kind": "token_classification", "labels": labels}
    head = head_adapter(tmp_path / "adapter", backbone, 3, task, packing=packing)
    rows = write(tmp_path / "rows.jsonl", [{"id": index, "tokens": words} for index, words in enumerate(WORDS)])
    found = predict(rows, adapter=str(tmp_path / "adapter"), batch_size=2)
    assert [row["id"] for row in found] == [0, 1, 2]
    for words, row in zip(WORDS, found, strict=True):
        assert row["tokens"] == words
        encoded = support.bert()(words, is_split_into_words=True, return_tensors="pt")
        firsts = [encoded.word_ids().index(word) for word in range(len(words))]
        probabilities = scores_of(backbone, head, encoded)[firsts].softmax(-1)
        assert row["tags"] == [labels[index] for index in probabilities.argmax(-1)]
        assert row["probabilities"] == pytest.approx(probabilities.max(-1).values.tolist(), rel=1e-4)
        assert all(" ".join(words[e["start"] : e["end"]]) == e["text"] for e in row["entities"])
    assert len({tag for row in found for tag in row["tags"]}) > 1, "the head tells words apart"


def test_the_rows_own_labels_stay(tmp_path, backbone):
    head_adapter(tmp_path / "adapter", backbone, 2, {"kind": "token_classification", "labels": ["N", "V"]})
    rows = write(tmp_path / "rows.jsonl", [{"tokens": ["a", "cat"], "tags": ["anything", "goes"]}])
    (row,) = predict(rows, adapter=str(tmp_path / "adapter"))
    assert row["tags"] == ["anything", "goes"]
    assert set(row["predicted_tags"]) <= {"N", "V"}


def test_answers(tmp_path, backbone):
    task = {"kind": "question_answering", "doc_stride": 8, "max_answer_length": 6}
    head = head_adapter(tmp_path / "adapter", backbone, 2, task, max_length=32)
    found = predict(write(tmp_path / "rows.jsonl", QUESTIONS), adapter=str(tmp_path / "adapter"), batch_size=3)
    assert [row["id"] for row in found] == ["x7", "x8"], "one answer a row, of however many windows"
    for given, row in zip(QUESTIONS, found, strict=True):
        encoded = support.bert()(
            given["question"], given["context"], truncation="only_second", max_length=32, stride=8,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        best, least = (float("-inf"), ""), 0.0
        for window, ids in enumerate(encoded["input_ids"]):
            types = torch.tensor([encoded["token_type_ids"][window]])
            logits = scores_of(backbone, head, {"input_ids": torch.tensor([ids]), "token_type_ids": types})
            context = [at for at, part in enumerate(encoded.sequence_ids(window)) if part == 1]
            log_probs = logits[[0, *context]].double().log_softmax(0)
            least = min(least, float(log_probs[0].sum()))
            for i in range(len(context)):
                for j in range(i, min(i + 6, len(context))):
                    score = float(log_probs[i + 1, 0] + log_probs[j + 1, 1])
                    begin, _ = encoded["offset_mapping"][window][context[i]]
                    _, end = encoded["offset_mapping"][window][context[j]]
                    best = max(best, (score, given["context"][begin:end]))
        score, text = best if best[0] >= least else (least, "")
        assert row["answer"] == text
        assert row["score"] == pytest.approx(torch.tensor(score).exp().item(), rel=1e-3)
        assert row["context"] == given["context"]


def test_labels_of_texts(tmp_path, backbone):
    task = {"kind": "classification", "labels": ["bad", "good", "so so"]}
    head = head_adapter(tmp_path / "adapter", backbone, 3, task)
    texts = [" ".join(words) for words in WORDS]
    rows = Dataset.from_list([{"text": text, "label": "?"} for text in texts])
    rows.to_csv(tmp_path / "rows.csv", index=False)
    for text, row in zip(texts, predict(str(tmp_path / "rows.csv"), adapter=str(tmp_path / "adapter")), strict=True):
        expected = scores_of(backbone, head, support.bert()(text, return_tensors="pt"))[0].softmax(-1).tolist()
        assert list(row["probabilities"].values()) == pytest.approx(expected, rel=1e-4)
        assert (row["label"], row["text"]) == ("?", text)
        assert row["predicted_label"] == max(row["probabilities"], key=row["probabilities"].get)


def test_an_adapter_that_writes_is_refused(tmp_path):
    save_backbone(tmp_path / "llama")
    facts = {"method": {"name": "prefix"}, "task": {"kind": "causal_lm"}, "data": {}}
    save_adapter(tmp_path / "adapter", Adapter(torch.empty(0, 0), EmptyLayout(), str(tmp_path / "llama"), facts=facts))
    rows = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match="trained to generate text, not to label rows; use ptd generate"):
        predict(rows, adapter=str(tmp_path / "adapter"))


def test_zero_shot_needs_no_training_rows(tmp_path):
    """A run with a hard prompt saves an adapter, which labels rows with the frozen model's own probabilities."""
    backbone = save_backbone(tmp_path / "backbone", "llama")
    rows = write(tmp_path / "rows.jsonl", [{"text": text, "label": label} for text, label in [("ab", "x"), ("b", "y")]])
    result = train(
        parse_config(
            {
                "backbone": {"path": str(backbone), "dtype": "float32"},
                "method": {"name": "hard_prompt"},
                "task": {
                    "kind": "classification",
                    "patterns": ["{text}:{mask}"],
                    "verbalizer": {"x": "p", "y": ["q", "r"]},
                },
                "data": {"eval": rows, "max_length": 64},
                "output_dir": str(tmp_path / "out"),
            }
        )
    )
    assert result["steps"] == 0
    found = predict(write(tmp_path / "new.jsonl", [{"text": "abc"}]), adapter=str(tmp_path / "out"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(backbone), tiny_tokenizer()
    with torch.no_grad():
        logits = model(**tokenizer("abc:", return_tensors="pt")).logits[0, -1]
    p, q, r = (logits[tokenizer(word)["input_ids"][0]] for word in "pqr")
    want = torch.stack([p, (q + r) / 2]).softmax(0).tolist()
    assert [found[0]["probabilities"][label] for label in "xy"] == pytest.approx(want, rel=1e-5)
