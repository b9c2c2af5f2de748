"""Runs that are trained together over one backbone: each learns exactly what it would have learned alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ptd.commands.sweep import sweep
from ptd.commands.train import train
from ptd.config import parse_varied, sweep_cells
from ptd.runs.metrics_log import read_records

KINDS: dict[str, dict[str, Any]] = {
    "direct": {"name": "prefix", "num_virtual_tokens": 4},
    "mlp": {"name": "prefix", "num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 8},
    "soft": {"name": "prompt", "num_virtual_tokens": 4},
}
SAME = ("loss", "grad_norm", "lr", "eval_loss", "frozen_loss", "tokens", "supervised_tokens")


@pytest.fixture
def raw(backbone_dir: Path, rows_file: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def build(kind: str, **train: Any) -> dict[str, Any]:
        return {
            "backbone": {"path": str(backbone_dir), "dtype": "float32"},
            "method": copy.deepcopy(KINDS[kind]),
            "data": {"train": str(rows_file), "eval": str(rows_file), "max_length": 48},
            "train": {
                "max_steps": 8, "per_device_train_batch_size": 3, "learning_rate": 0.05, "warmup_steps": 2,
                "logging_steps": 1, "eval_steps": 4, "save_steps": 2, **train,
            },
            "output_dir": str(tmp_path / "sweep"),
        }  # fmt: skip

    return build


def close(one: Any, other: Any) -> bool:
    return bool(one == other if isinstance(one, int) else abs(one - other) <= 1e-6 * max(1.0, abs(other)))


def assert_alike(together: Path, alone: Path) -> None:
    """Check losses, norms, evaluations and the adapter of a run against those of the same run alone."""
    found, want = read_records(together), read_records(alone)
    assert [record["step"] for record in found] == [record["step"] for record in want]
    for here, there in zip(found, want, strict=True):
        assert {key for key in SAME if key in here} == {key for key in SAME if key in there}
        assert all(close(here[key], there[key]) for key in SAME if key in here), (here, there)
    for name in ("adapter", "best"):
        mine, theirs = (load_file(folder / name / "adapter_model.safetensors") for folder in (together, alone))
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert (mine[key] - tensor).abs().max() <= 2e-6 * tensor.abs().max(), key


VARIED = ["train.learning_rate=5e-2,2e-2", "train.seed=0,3", "method.num_virtual_tokens=3,5"]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_runs_together_are_as_each_alone(raw: Any, kind: str, packing: bool, tmp_path: Path) -> None:
    whole = raw(kind)
    whole["data"]["packing"] = packing
    cells = sweep_cells(whole, parse_varied(VARIED), "run.yaml")
    found = sweep(cells)
    assert len(cells) == len(found["cells"]) == 8
    values = {cell["name"]: cell["value"] for cell in found["cells"]}
    assert found["best"]["name"] == min(values, key=lambda name: values[name])
    for cell in cells[1::3]:
        alone = cell.config.model_copy(update={"output_dir": tmp_path / f"alone-{cell.name}"})
        train(alone)
        assert_alike(cell.config.output_dir, alone.output_dir)
