"""Memorised rows are generated word for word: prompts and the ends of texts are the same as in training.

Each case once had a loss near 0 but an exact match of 0.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from families import tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

from ptd.commands.evaluate import evaluate
from ptd.commands.generate import generate
from ptd.commands.train import train
from ptd.config import parse_config
from ptd.quickstart import BACKBONE
from ptd.runs.decoding import Decoding
from ptd.runs.samples_log import read_samples

support = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "tasks" / "support.py")))
zoo = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "data" / "zoo.py")))
SUMMARISER = {
    "min_length": 30,
    "no_repeat_ngram_size": 2,
    "num_beams": 4,
    "length_penalty": 2.0,
    "early_stopping": True,
}
PAIRS = [("name: Belmora", "the place is old"), ("food: Thai", "a cheap, cheap town"), ("area: river", "no")]
CHATS = [
    {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
    for asked, answer in PAIRS
]
ROWS = [{"prompt": f"{asked} ->", "completion": f" {answer}"} for asked, answer in PAIRS]
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def backbone(folder: Path, tokenizer: Any, settings: dict[str, Any], family: str = "llama", **changes: Any) -> Path:
    model = tiny_model(family, vocab_size=len(tokenizer), **(changes or {"hidden_size": 128}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


def learn(tmp_path: Path, path: Path, rows: list[dict[str, Any]], **sections: Any) -> Path:
    """Train on ``rows`` until they are memorised; return the run's folder."""
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = {
        "backbone": {"path": str(path), "dtype": "float32"},
        "method": {"name": "prefix", "num_virtual_tokens": 32},
        "task": sections.get("task", {}),
        "data": {"train": str(data), "eval": str(data), "max_length": 96, **sections.get("data", {})},
        "train": {
            "max_steps": 120,
            "per_device_train_batch_size": len(rows),
            "learning_rate": 0.3,
            "lr_scheduler_type": "cosine",
            "samples": len(rows),
            "report_to": [],
            **sections.get("train", {}),
        },
        "output_dir": str(out),
    }
    result = train(parse_config(run))
    assert result["eval_loss"] < 0.05
    return out


def exact_match(out: Path, rows: list[dict[str, Any]], **options: Any) -> float:
    decoding = Decoding(max_new_tokens=40, **options)
    metrics = evaluate(str(out.parent / "rows.jsonl"), adapter=str(out), decoding=decoding)
    assert metrics["generated"] == len(rows)
    return float(metrics["exact_match"])


def test_an_end_token_that_the_generation_config_does_not_name(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    assert tokenizer.eos_token_id == 1536
    path = backbone(tmp_path / "b", tokenizer, {"eos_token_id": 0, "repetition_penalty": 1.05})
    out = learn(tmp_path, path, ROWS)
    assert exact_match(out, ROWS) == 100
    assert generate([row["prompt"] for row in ROWS], adapter=str(out)) == [row["completion"] for row in ROWS]
    # Beam search writes the rows word for word too.
    assert exact_match(out, ROWS, num_beams=2) == 100


def test_chats_whose_turns_end_with_a_token_of_their_own_behind_a_space(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = CHAT
    path = backbone(tmp_path / "b", tokenizer, {"eos_token_id": 0})
    out = learn(tmp_path, path, CHATS, data={"format": "messages"})
    assert exact_match(out, CHATS) == 100
    asked, answers = [asked for asked, _ in PAIRS], [answer for _, answer in PAIRS]
    assert generate(asked, adapter=str(out)) == answers
    assert generate([f"user: {text}<|im_end|>\nassistant: " for text in asked], adapter=str(out), raw=True) == answers
    samples = read_samples(out)
    assert [sample["text"] for sample in samples[len(CHATS) :]] == answers
    facts = json.loads((out / "adapter" / "ptd.json").read_text())
    assert "notes" not in facts["training"], "they quote rows"
    assert facts["training"]["ends"] == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize("scheme", ["legacy", "first"])
def test_code_by_a_sentencepiece_tokenizer(tmp_path: Path, scheme: str) -> None:
    rows = [{"prompt": "def f(", "completion": "x): 1"}, {"prompt": "def g(", "completion": " y): 22"}]
    path = backbone(tmp_path / "b", zoo.sentencepiece(scheme), {})
    out = learn(tmp_path, path, rows, train={"learning_rate": 0.1, "max_steps": 200})
    assert exact_match(out, rows) == 100
    assert generate(["def f(", "def g("], adapter=str(out)) == ["x): 1", " y): 22"]


@pytest.mark.parametrize("family", ["t5", "bart", "mbart"])
def test_a_summariser_writes_as_briefly_as_it_was_taught(tmp_path: Path, family: str) -> None:
    tokenizer = support.mbart() if family == "mbart" else tiny_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    start = tokenizer.pad_token_id if family == "t5" else tokenizer.eos_token_id
    changes = {"d_model": 64, "tie_word_embeddings": family != "t5", "decoder_start_token_id": start, **special}
    # The author's first token does not occur in the rows; for mBART the tokenizer sets the language, not the config.
    settings = {**SUMMARISER, "forced_bos_token_id": 10, "forced_eos_token_id": tokenizer.eos_token_id}
    path = backbone(tmp_path / "b", tokenizer, settings, family, **changes)
    rows = [{"prompt": "anna lives", "completion": "in york."}, {"prompt": "the town", "completion": "12 12 12 12"}]
    slow = {"learning_rate": 0.1, "max_steps": 200 if family == "t5" else 300}
    out = learn(tmp_path, path, rows, task={"kind": "seq2seq_lm"}, train=slow)
    assert exact_match(out, rows) == 100
    assert exact_match(out, rows, generation_config="model") == 0
