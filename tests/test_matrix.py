"""Method × family × task: every combination that makes sense trains, changes only its own parameters, and reloads.

By default a selection runs in which every pair of (method, family), (method, task) and (family, task) occurs;
PTD_MATRIX_ALL=1 runs every combination (some minutes).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_backbone, tiny_config, tiny_tokenizer
from matrix import BACKBONES, BATCH, MARKED, METHODS, ROWS, STEPS, TASKS, covering, makes_sense, pairs
from torch import Tensor
from transformers import BertTokenizer

from ptd.commands.generate import Decoding
from ptd.commands.train import train
from ptd.config import parse_config
from ptd.data import load_rows
from ptd.distributed.ranks import Ranks
from ptd.engine.evaluation import HeldOut, scores_of
from ptd.engine.loop import Loop
from ptd.runs.generation import decode
from ptd.runs.scores import held_out_metrics
from ptd.runs.tuned import Tuned, load_tuned
from ptd.types import Reporter, UserError

ALL = os.environ.get("PTD_MATRIX_ALL") == "1"


# ---- which combinations make sense, and a selection of them

Case = tuple[str, str, str]
"""Method, family, task."""
LEGAL = [case for case in itertools.product(METHODS, BACKBONES, TASKS) if makes_sense(*case)]
CASES = LEGAL if ALL else sorted(covering(LEGAL), key=LEGAL.index)


def test_the_selection_has_every_pair_that_makes_sense() -> None:
    assert set().union(*map(pairs, CASES)) == set().union(*map(pairs, LEGAL))
    assert {METHODS[method]["name"] for method, _, _ in CASES} == {
        *("head", "hard_prompt", "prompt", "p_tuning", "prefix", "p_tuning_v2")
    }
    assert {family for _, family, _ in CASES} == set(BACKBONES)
    assert {task for _, _, task in CASES} == set(TASKS)


# ---- running a combination


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save a backbone of each family; return the folders by family."""
    folder = tmp_path_factory.mktemp("backbones")
    return {family: save_backbone(folder / family, family) for family in BACKBONES}


@dataclass
class WatchedLoop(Loop):
    """The engine's loop, which adds itself to ``loops`` and copies the trained tensors before the first step."""

    before: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.only,) = self.members
        self.before = copy_of(self.only.step.trained)
        loops.append(self)


loops: list[WatchedLoop] = []


def copy_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def settings(method: str, task: str, backbone: Path, rows: Path, out: Path) -> dict[str, Any]:
    marks = MARKED[task] if method == "p_tuning-marks" else {}
    data = {"train": str(rows), "eval": str(rows), "max_length": 40, **marks.get("data", {})}
    return {
        "backbone": {"path": str(backbone), "dtype": "float32"},
        "method": METHODS[method],
        "task": {**TASKS[task], **marks.get("task", {})},
        "data": data,
        "train": {
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": 4,
            "learning_rate": 0.01,
            "logging_steps": 1,
        },
        "output_dir": str(out),
    }


def answers(tuned: Tuned, rows: Any) -> list[Any]:
    """Return what a user gets for the rows: generated texts, or labels, tags or spans with probabilities."""
    ranks = Ranks.start()
    if tuned.task.generates:
        prompts, _ = tuned.task.prompts_and_references(rows, tuned.tokenizer, max_length=40, what="rows")
        return decode(tuned, prompts, Decoding(max_new_tokens=4), ranks, batch_size=4, reporter=Reporter())
    examples = tuned.task.tokenize(rows, tuned.tokenizer, what="rows", labelled=False)
    held_out = HeldOut(tuned.task, examples, rows, 4, tuned.task.data.packing, tuned.tokenizer.pad_token_id)
    scores = scores_of(held_out, tuned.prepared, tuned.readout, ranks, Reporter())
    return tuned.task.answers(scores, examples, rows)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_trains_its_own_parameters_and_comes_back(
    case: Case, backbones: dict[str, Path], rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, family, task = case
    out = tmp_path / "out"
    loops.clear()
    monkeypatch.setattr("ptd.runs.training.Loop", WatchedLoop)
    # The curve is drawn in the same way whatever was trained, and takes half as long again as everything else.
    monkeypatch.setattr("ptd.commands.train.leave_report", lambda folder: None)
    result = train(parse_config(settings(method, task, backbones[family], rows_file, out)))
    (loop,) = loops
    run = json.loads((out / "run.json").read_text())
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    # There are three finite steps (none if nothing is trained) and an evaluation.
    steps = 0 if method == "hard_prompt" else STEPS
    losses = [record["loss"] for record in records if "loss" in record]
    assert (result["steps"], len(losses)) == (steps, steps)
    assert all(map(math.isfinite, (*losses, result["eval_loss"])))

    # The frozen backbone was measured where that is possible: without a head and without virtual tokens in the text.
    alone = [record for record in records if "frozen_loss" in record]
    asked = method not in ("hard_prompt", "p_tuning-marks") and not list(loop.only.step.readout.parameters())
    assert [record["step"] for record in alone] == [0] * asked
    assert all(math.isfinite(record["frozen_train_loss"]) for record in alone)

    # Everything that is trained has changed, and nothing else has.
    trained = {name for name, parameter in loop.only.step.trained.named_parameters() if parameter.requires_grad}
    after = copy_of(loop.only.step.trained)
    assert {name for name, tensor in after.items() if not torch.equal(tensor, loop.before[name])} == trained
    assert sum(after[name].numel() for name in trained) == run["trained_parameters"]
    assert bool(trained) == (method != "hard_prompt")

    # After saving and loading: the same backbone bit for bit, the same loss and metrics, the same answers.
    tuned = load_tuned(str(out / "adapter"), None, Ranks.start())
    backbone, untouched = loop.prepared.model.state_dict(), tuned.prepared.model.state_dict()
    assert list(backbone) == list(untouched)
    assert [name for name, tensor in backbone.items() if not torch.equal(tensor, untouched[name])] == []
    assert all(parameter.grad is None for parameter in loop.prepared.model.parameters())
    rows = load_rows(str(rows_file), "train", what="rows")
    metrics = held_out_metrics(tuned, rows, Ranks.start(), batch_size=4, reporter=Reporter())
    evaluated = {key.removeprefix("eval_"): value for key, value in result.items() if key.startswith("eval_")}
    assert metrics == pytest.approx(evaluated, rel=1e-6)
    loop.prepared.attachment.set(loop.only.step.state())
    assert loop.only.held_out is not None
    in_memory = Tuned(loop.prepared, tuned.tokenizer, None, loop.only.held_out.task, loop.only.step.readout)
    found = answers(tuned, rows)
    assert found == answers(in_memory, rows)
    assert len(found) == len(ROWS)
    assert any(found)


# ---- combinations that make no sense

CLOZE = TASKS["cloze"]
FRONT = {"name": "p_tuning"}
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str, str]] = {
    # family, method, task, data; what the message says is wrong, and what to do about it
    "hard_prompt without words": (
        *("bert", METHODS["hard_prompt"], {"kind": "classification"}, {}),
        "hard_prompt reads labels off the language model's words, but this task .* does not; set",
        "with a pattern that has {mask}, .* and task.verbalizer, or choose another method",
    ),
    "hard_prompt for text": (
        *("llama", METHODS["hard_prompt"], {"kind": "causal_lm"}, {}),
        "this task .task.kind causal_lm. does not; set",
        "set task.kind: classification",
    ),
    "hard_prompt without a mask token": (
        *("bert without mask", METHODS["hard_prompt"], CLOZE, {}),
        "the tokenizer .* has no mask token",
        "use a backbone that was trained to fill masks, or remove {mask}",
    ),
    "label word unknown to the tokenizer": (
        *("bert of few letters", METHODS["hard_prompt"], CLOZE, {}),
        "task.verbalizer.bad: the word 'x' is unknown to the tokenizer",
        "give another word",
    ),
    "words without a label": (
        *("bert", METHODS["hard_prompt"], {**CLOZE, "labels": ["bad", "good", "fair"]}, {}),
        "task.verbalizer: has no word for the label 'fair'",
        "give it at least one",
    ),
    "a mask without words": (
        *("bert", METHODS["prompt"], {"kind": "classification", "patterns": ["{text} {mask}"]}, {}),
        "task.verbalizer gives no words",
        "set it, e.g. to",
    ),
    "a field behind a decoder's mask": (
        *("llama", METHODS["prompt"], {**CLOZE, "patterns": ["{mask} {text}"]}, {}),
        "after {mask}, which a decoder does not see",
        "put {mask} at the end",
    ),
    "p_tuning_v2 with words": (
        *("roberta", METHODS["p_tuning_v2-direct"], CLOZE, {}),
        "p_tuning_v2 trains a head .*, but this task reads labels off the words at {mask}",
        "set method.name: prefix",
    ),
    "p_tuning_v2 for text": (
        *("t5", METHODS["p_tuning_v2-direct"], {"kind": "seq2seq_lm"}, {}),
        "task.kind seq2seq_lm has none",
        "or method.name: prefix",
    ),
    "head with words": (
        *("llama", METHODS["head"], CLOZE, {}),
        "head trains a head .*, but this task reads labels off the words",
        "set method.name: hard_prompt",
    ),
    "head for text": (
        *("llama", METHODS["head"], {"kind": "causal_lm"}, {}),
        "task.kind causal_lm has none",
        "set task.kind: classification, token_classification or question_answering",
    ),
    "marks of another method, in a pattern": (
        *("bert", METHODS["prompt"], {"kind": "classification", "patterns": ["{v:2} {text}"]}, {}),
        "virtual tokens, which only method p_tuning trains",
        "remove the marks or set method.name: p_tuning",
    ),
    "marks of another method, in a template": (
        *("bart", METHODS["prefix-direct"], {"kind": "seq2seq_lm"}, {"prompt_template": "{v:2} {prompt}"}),
        "virtual tokens, which only method p_tuning trains",
        "remove the marks or set method.name: p_tuning",
    ),
    "p_tuning without virtual tokens, classification": (
        *("bert", FRONT, {"kind": "classification"}, {}),
        "the virtual tokens of a template, but the template has none",
        "write them, for example task.patterns: .* or set method.num_virtual_tokens",
    ),
    "p_tuning without virtual tokens, text": (
        *("llama", FRONT, {"kind": "causal_lm"}, {}),
        "the virtual tokens of a template, but the template has none",
        "write them, for example data.prompt_template: .* or set method.num_virtual_tokens",
    ),
    "p_tuning without virtual tokens, tags": (
        *("bert", FRONT, {"kind": "token_classification"}, {}),
        "the virtual tokens of a template, but the template has none",
        "set method.num_virtual_tokens",
    ),
    "p_tuning with two numbers of virtual tokens": (
        *("bert", METHODS["p_tuning-front"], {"kind": "classification", "patterns": ["{v:2} {text}"]}, {}),
        "got 3, but the {v:n} marks of the template are 2 virtual tokens",
        "remove the key or the marks",
    ),
    "words on an encoder-decoder": (
        *("t5", METHODS["prompt"], CLOZE, {}),
        "the backbone is an encoder-decoder",
        "set task.kind: seq2seq_lm with the label's word as completion, or train a head",
    ),
    "text by an encoder": (
        *("bert", METHODS["prompt"], {"kind": "causal_lm"}, {}),
        "causal_lm needs a decoder, but the backbone is an encoder",
        "set task.kind: classification",
    ),
    "text by the wrong kind, one way": (
        *("llama", METHODS["prompt"], {"kind": "seq2seq_lm"}, {}),
        "seq2seq_lm needs an encoder-decoder, but the backbone is a decoder",
        "set task.kind: causal_lm",
    ),
    "text by the wrong kind, the other way": (
        *("t5", METHODS["prompt"], {"kind": "causal_lm"}, {}),
        "causal_lm needs a decoder, but the backbone is an encoder-decoder",
        "set task.kind: seq2seq_lm",
    ),
}


@pytest.fixture(scope="module")
def weightless(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save config and tokenizer of some backbones without weights: loading the weights fails, all else works."""
    folder = tmp_path_factory.mktemp("weightless")
    tokenizers: dict[str, Any] = {family: tiny_tokenizer() for family in ("llama", "bert", "roberta", "t5", "bart")}
    tokenizers["bert without mask"] = tiny_tokenizer()
    tokenizers["bert without mask"].mask_token = None
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "yes"]
    tokenizers["bert of few letters"] = BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)})
    for name, tokenizer in tokenizers.items():
        tiny_config(name.split()[0]).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in tokenizers}


def start(folder: Path, rows: Path, out: Path, method: Any, task: Any, data: Any) -> str:
    """Start a run that is refused; return the message."""
    raw = settings("prompt", "classification", folder, rows, out)
    with pytest.raises(UserError) as refusal:
        train(parse_config({**raw, "method": method, "task": task, "data": {**raw["data"], **data}}))
    return str(refusal.value)


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_before_the_weights_are_read(
    case: str, weightless: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    family, method, task, data, wrong, advice = REFUSED[case]
    message = start(weightless[family], rows_file, tmp_path / "out", method, task, data)
    assert re.search(pattern(wrong), message), message
    assert re.search(pattern(advice), message), message
    assert not (tmp_path / "out").exists()


def test_without_weights_a_run_that_makes_sense_fails_at_them(
    weightless: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    """This shows that the refusals above come before the weights are read."""
    message = start(weightless["bert"], rows_file, tmp_path / "out", METHODS["hard_prompt"], CLOZE, {})
    assert message.startswith("backbone.path: cannot load")
    assert not (tmp_path / "out").exists()


def pattern(text: str) -> str:
    """Return the regular expression with braces escaped."""
    return text.replace("{", r"\{").replace("}", r"\}")
