"""Whole runs on the GPU, started as a user starts them, reach the same numbers as on a CPU.

They finish, do not wait within a step, continue where they stopped, evaluate, and answer. The tests run a selection of
the combinations of (method, family, task, dtype, quantisation, attention), in which every pair of values that make
sense together occurs. PTD_MATRIX_ALL=1 runs all combinations, which takes hours.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_backbone
from matrix import MARKED, METHODS, TASKS, covering, makes_sense, pairs

from ptd.commands.generate import Decoding
from ptd.commands.train import train
from ptd.config import parse_config
from ptd.data import load_rows
from ptd.distributed.ranks import Ranks
from ptd.engine.evaluation import scores_of
from ptd.engine.loop import Loop
from ptd.engine.member import Member
from ptd.runs.generation import decode
from ptd.runs.tuned import load_tuned
from ptd.types import Preempted, Reporter
from tests.gpu_paper.device import Seen, watched

STEPS, BATCH = 4, 2
BACKBONES = ("llama", "mistral", "qwen3", "gemma2", "gpt2", "mixtral", "bert", "distilbert", "t5", "bart")
DTYPES = ("float32", "bfloat16", "float16")
QUANTISED = ("none", "int8", "nf4", "fp8")
ATTENTION = ("auto", "reference", "triton")
ALLOWED = {"float32": 2e-4, "bfloat16": 3e-2, "float16": 5e-3}
"""Highest relative difference of losses from a CPU's: in half precision, other kernels round at other places."""
ALLOWED_QUANTISED = {"none": 0.0, "int8": 0.05, "nf4": 0.0, "fp8": 0.1}
"""The same if the inputs of the products are rounded as well."""

Case = tuple[str, str, str, str, str, str]
"""Method, family, task, dtype, quantisation, attention."""


def legal(method: str, family: str, task: str, dtype: str, quantised: str, attention: str) -> bool:
    """Return whether ptd and this test can run the case: Triton's interpreter has no bfloat16 and is slow."""
    if not makes_sense(method, family, task):
        return False
    if attention == "triton" and (family, dtype, quantised) != ("llama", "float16", "none"):
        return False
    if attention == "triton" and method not in ("prefix-direct", "p_tuning_v2-mlp", "prompt"):
        return False
    return quantised == "none" or family in ("llama", "mistral", "qwen3", "gpt2", "bert", "t5")


LEGAL = [case for case in itertools.product(METHODS, BACKBONES, TASKS, DTYPES, QUANTISED, ATTENTION) if legal(*case)]
CASES = LEGAL if os.environ.get("PTD_MATRIX_ALL") == "1" else covering(LEGAL)


def test_the_selection_has_every_pair_that_makes_sense() -> None:
    assert set().union(*map(pairs, CASES)) == set().union(*map(pairs, LEGAL))


# ---- a run


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save a backbone of each family."""
    folder = tmp_path_factory.mktemp("backbones")
    return {family: save_backbone(folder / family, family) for family in BACKBONES}


@contextmanager
def on_the_host() -> Iterator[None]:
    """Hide the GPU inside this context, as on a machine without one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


class SeenLoop(Loop):
    """The engine's loop, which reports its current step or evaluation and is requested to stop in step ``stop_in``."""

    seen = Seen()
    stop_in: int | None = None

    def take_step(self, index: int, micro_batches: Any, members: Any = None) -> Any:
        if index + 1 == self.stop_in:
            self.request.signal = 1  # type: ignore[assignment]
        self.seen.doing = f"step {index + 1}"
        pending = super().take_step(index, micro_batches, members)
        self.seen.doing = "between steps"
        for parameter, state in self.members[0].step.optimizer.state.items():
            assert {tensor.device for tensor in state.values()} == {parameter.device}, state
        return pending

    def evaluate(self, number: int, member: Member) -> None:
        self.seen.doing = "evaluation"
        super().evaluate(number, member)
        self.seen.doing = "between steps"


def upstream(wait: tuple[str, str, str]) -> bool:
    """Return whether transformers or torch waits, and not ptd.

    BART's layers look for infinities in float16. Experts are multiplied one by one if no kernel multiplies all of them
    (one exists for bf16).
    """
    _, operation, where = wait
    return where.startswith("modeling_bart.py:") or operation == "aten._grouped_mm"


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in records(out) if "loss" in record]


def answers(out: Path, rows: Any) -> list[Any]:
    """Return what a user gets for the rows: generated text, or labels, tags or spans with probabilities."""
    ranks = Ranks.start()
    tuned = load_tuned(str(out / "adapter"), None, ranks)
    if tuned.task.generates:
        prompts, _ = tuned.task.prompts_and_references(rows, tuned.tokenizer, max_length=40, what="rows")
        return decode(tuned, prompts, Decoding(max_new_tokens=4), ranks, batch_size=4, reporter=Reporter())
    held_out = tuned.held_out(rows, 4, what="rows", labelled=False)
    scores = scores_of(held_out, tuned.prepared, tuned.readout, ranks, Reporter())
    return [score.float() for score in scores]


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # from Triton, in float16
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_run_is_a_cpus_and_waits_for_nothing(
    case: Case, backbones: dict[str, Path], labelled_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, family, task, dtype, quantised, attention = case
    marks, data = MARKED[task] if method == "p_tuning-marks" else {}, str(labelled_rows)

    def settings(out: Path) -> Any:
        raw = {
            "backbone": {
                "path": str(backbones[family]), "dtype": dtype, "quantization": quantised, "attention": attention
            },
            "method": METHODS[method],
            "task": {**TASKS[task], **marks.get("task", {})},
            "data": {"train": data, "eval": data, "max_length": 40, **marks.get("data", {})},
            "train": {
                "max_steps": STEPS, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": 4,
                "learning_rate": 0.01, "logging_steps": 1, "save_steps": 2,
            },
            "output_dir": str(out),
        }  # fmt: skip
        return parse_config(raw)

    monkeypatch.setattr("ptd.runs.training.Loop", SeenLoop)
    monkeypatch.setattr("ptd.commands.train.leave_report", lambda folder: None)
    out, reference = tmp_path / "gpu", tmp_path / "cpu"
    trains = method != "hard_prompt"
    with watched() as seen:
        SeenLoop.seen, SeenLoop.stop_in = seen, 1
        if trains:
            with pytest.raises(Preempted):
                train(settings(out))
        SeenLoop.stop_in = None
        result = train(settings(out))
    assert [wait for wait in seen.waited if wait[0].startswith("step ") and not upstream(wait)] == []
    under_way = [f"step {number}" for number in range(1, STEPS + 1) if trains] + ["evaluation"]
    assert all(seen.launches(doing) for doing in under_way), seen.launched
    with on_the_host():
        expected = train(settings(reference))
        rows = load_rows(str(labelled_rows), "train", what="rows")
    close = max(ALLOWED[dtype], ALLOWED_QUANTISED[quantised])
    assert len(losses(out)) == (STEPS if trains else 0)
    assert losses(out) == pytest.approx(losses(reference), rel=close)
    assert math.isfinite(result["eval_loss"])
    assert result["eval_loss"] == pytest.approx(expected["eval_loss"], rel=close)
    found = answers(out, rows)
    with on_the_host():
        wanted = answers(out, rows)
    if quantised == "none" and (dtype == "float32" or isinstance(wanted[0], torch.Tensor)):
        for one, other in zip(found, wanted, strict=True):
            if isinstance(other, str):
                assert one == other
            else:
                torch.testing.assert_close(one, other, rtol=close, atol=close)
    assert len(found) == len(wanted) >= len(rows)
