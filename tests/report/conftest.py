"""Fixture that writes folders like those of runs, with any number of records and with hostile strings."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WriteRun = Callable[..., Path]
SPIKE = 97.0


def split(number: int, ranks: int) -> dict[str, float]:
    """Return the phases of a step of half a second; the first step of a run takes ten seconds."""
    reduce = 0.06 if ranks > 1 else 0.0
    phases = {"data": 0.01, "encoder": 0.02, "forward": 0.16, "backward": 0.23, "reduce": reduce, "optimizer": 0.015}
    return {**phases, "other": (10.0 if number == 1 else 0.5) - sum(phases.values())}


def record(number: int, steps: int, noise: random.Random, ranks: int) -> dict[str, Any]:
    several = {"slowest_rank": number % ranks, "slowest_rank_seconds": 0.4, "mean_rank_seconds": 0.38}
    return {
        "step": number,
        "loss": 2 * math.exp(-3 * number / steps) + 0.3 + abs(noise.gauss(0, 0.03)),
        "lr": 5e-3 * (1 - number / steps),
        "grad_norm": abs(noise.gauss(0.5, 0.1)),
        "tokens": 1600,
        "supervised_tokens": 800,
        "tokens_per_second": 31000 + noise.gauss(0, 900),
        "step_seconds": 10.0 if number == 1 else 0.5,
        "phase_seconds": split(number, ranks),
        "peak_memory_bytes": 21 * 2**30,
        "network_bytes": 52_000_000 if ranks > 1 else 0,
        "network_bytes_between_nodes": 2_000_000 if ranks > 1 else 0,
        "skipped_steps": 0,
        **(several if ranks > 1 else {}),
    }


@pytest.fixture(scope="session")
def write_run() -> WriteRun:
    """Return ``write_run(folder, steps=40, ranks=4, train={…}, label="<b>")``, which writes the files of such a run.

    One step in the middle has a loss of `SPIKE`, and one has no loss. ``label`` appears wherever text of a user may
    appear. ``labels``: the samples are this many classified rows, not continued prompts; without ``splits``: the
    records have no phases, as in an older version; ``alone``: the loss of the frozen backbone; ``facts``: further keys
    of run.json.
    """

    def write(
        folder: Path,
        *,
        steps: int = 40,
        ranks: int = 4,
        status: str = "finished",
        train: dict[str, Any] | None = None,
        label: str = "a plain word",
        labels: int = 0,
        splits: bool = True,
        alone: float | None = None,
        **facts: Any,
    ) -> Path:
        folder.mkdir(parents=True)
        noise, lines = random.Random(steps), []
        if alone is not None:
            figures = {"frozen_loss": alone, "frozen_accuracy": 12.5, "frozen_rows": 400, "frozen_train_loss": alone}
            lines.append({"step": 0, **figures})
        for number in range(1, steps + 1):
            lines.append(record(number, steps, noise, ranks))
            if not splits:
                del lines[-1]["phase_seconds"]
            if number % max(1, steps // 10) == 0:
                figures = {"eval_loss": lines[-1]["loss"] + 0.1, "eval_accuracy": 100 * number / steps}
                lines.append({"step": number, **figures, f"eval_{label}": 1 / number, "eval_rows": 400})
        trained = [line for line in lines if "loss" in line]
        trained[steps // 2]["loss"], trained[steps // 3]["loss"] = SPIKE, None
        samples = [
            {"step": step, "prompt": f"name: {label}", "reference": f"It is {label}.", "text": f"{text} {label}"}
            for step, text in ((0, "and and"), (steps, "This is"))
        ]
        if labels:
            samples = [
                {
                    "step": step,
                    "prompt": f"{row}: {label}",
                    "reference": label,
                    "text": f"not {label}",
                    "score": noise.random(),
                    "right": step > 0 and row % 3 == 0,
                }
                for step in (0, steps)
                for row in range(labels)
            ]
        config = {
            "backbone": {"path": f"models/{label}", "dtype": "bfloat16"},
            "method": {"name": "prefix", "num_virtual_tokens": 16},
            "task": {"kind": "causal_lm", "labels": [label]},
            "data": {"train": f"{label}.jsonl", "prompt_template": label},
            "train": {"learning_rate": 5e-3, "seed": 0, **(train or {})},
            "output_dir": str(folder),
        }
        half = steps // 2
        starts = [
            {"started": "2026-01-02T03:04:05+00:00", "from_step": 0, "how": "failed", "step": half, "error": label},
            {"started": "2026-01-02T04:04:05+00:00", "from_step": half, "how": status, "step": steps},
        ]
        run = {
            "status": status,
            "config": config,
            "command": ["/somewhere/ptd/cli.py", "train", "run.yaml", f"data.train={label}"],
            "versions": {"python": "3.11.7", "ptd": "0.1.0", "torch": "2.13.0", "deepspeed": label},
            "world_size": ranks,
            "device": f"GPU {label}",
            "attempts": starts,
            "started": starts[0]["started"],
            "trained_parameters": 5_240_000,
            "result": {"steps": steps, "seconds": 4000.0, "best": {"loss": 0.4, "step": steps}},
            **facts,
        }
        for name, rows in (("metrics.jsonl", lines), ("samples.jsonl", samples)):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
        return folder

    return write
