"""Provide the check that every quantised backbone has to pass, no matter how it was quantised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptd.commands.evaluate import evaluate
from ptd.commands.train import train
from ptd.config import parse_config


@pytest.fixture
def check_carried_over(tmp_path: Path) -> Callable[..., None]:
    """Return a function that trains on ``backbone`` (settings) and evaluates the adapter with and without quantisation.

    ``near``: highest relative difference between the two losses.
    """

    def check(backbone: dict[str, Any], near: float) -> None:
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps({"prompt": f"{n} is", "completion": "ab" * n}) + "\n" for n in range(1, 9)))
        result = train(
            parse_config(
                {
                    "backbone": backbone,
                    "method": {"name": "prefix", "num_virtual_tokens": 4},
                    "data": {"train": str(rows), "eval": str(rows), "max_length": 64},
                    "train": {"max_steps": 12, "learning_rate": 0.1, "eval_steps": 6, "logging_steps": 1},
                    "output_dir": str(tmp_path / "out"),
                }
            )
        )
        records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        evaluated = [record["eval_loss"] for record in records if "eval_loss" in record]
        assert evaluated[-1] < evaluated[0], "it goes on learning after an evaluation"
        as_trained = evaluate(str(rows), adapter=str(tmp_path / "out"))
        assert as_trained["loss"] == pytest.approx(result["eval_loss"], rel=1e-6)
        whole = evaluate(str(rows), adapter=str(tmp_path / "out"), settings={"backbone": {"quantization": "none"}})
        assert whole["loss"] != pytest.approx(as_trained["loss"], rel=1e-6)
        assert whole["loss"] == pytest.approx(result["eval_loss"], rel=near)

    return check
