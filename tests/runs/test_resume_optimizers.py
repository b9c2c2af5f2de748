"""A run that was stopped and continued equals an undisturbed run, bit for bit, with every optimizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ptd import cli
from ptd.checkpoint.files import write_json
from ptd.engine.optimizers import OPTIMIZERS
from ptd.runs.metrics_log import read_records
from ptd.types import UserError

STEPS, STOP, RESTART = 8, 5, 3
SETTINGS: dict[str, Any] = {
    # The last layer of the MLP has 64 × 128 numbers: more than the 4096 from which moments have 8 bits.
    "method": {
        "name": "prefix",
        "num_virtual_tokens": 4,
        "prefix_projection": True,
        "encoder_hidden_size": 128,
        "embedding_size": 12,
    },
    "train": {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "save_steps": RESTART,
        "logging_steps": 1,
        "report_to": [],
    },
}
SHARDED = {
    "deepspeed": {
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        }
    }
}


def settings_of(backbone: Path, rows: Path, optimizer: str, output: Path) -> dict[str, Any]:
    return {
        "backbone": {"path": str(backbone), "dtype": "float32"},
        "data": {"train": str(rows), "max_length": 64},
        **SETTINGS,
        "train": {**SETTINGS["train"], "optimizer": optimizer},
        "output_dir": str(output),
    }


def assert_the_same(whole: Path, resumed: Path, optimizer: str, files: int) -> None:
    """All losses, the adapter and every tensor of the last checkpoint are equal; the state is not trivial."""
    losses = [[record["loss"] for record in read_records(folder) if "loss" in record] for folder in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
    adapters = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (whole, resumed)]
    assert adapters[0] == adapters[1]
    last = Path("checkpoints") / f"step-{STEPS:06d}"
    names = sorted(path.name for path in (whole / last).glob("*.safetensors"))
    assert len(names) == files
    moments = 0
    for name in names:
        one, other = load_file(whole / last / name), load_file(resumed / last / name)
        assert one.keys() == other.keys()
        assert all(tensor.equal(other[key]) for key, tensor in one.items())
        coded = [key for key, tensor in one.items() if key.startswith("optimizer.") and tensor.dtype is torch.uint8]
        assert bool(coded) == (optimizer == "adamw_8bit")
        for key in coded:
            kind, _, parameter = key.removeprefix("optimizer.").partition(".")
            assert one[f"optimizer.{kind}_absmax.{parameter}"].any()
        moments += sum(bool(one[key].any()) for key in one if key.startswith("optimizer.exp_avg."))
    assert moments >= 4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_process(train_here: Any, backbone_dir: Path, rows_file: Path, tmp_path: Path, optimizer: str) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train_here(settings_of(backbone_dir, rows_file, optimizer, whole))
    again = settings_of(backbone_dir, rows_file, optimizer, resumed)
    train_here(again, stop=STOP)
    assert f"continuing from step-{RESTART:06d}" in train_here(again)
    assert_the_same(whole, resumed, optimizer, files=1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_ranks_with_zero3(
    launch: Any, train_here: Any, backbone_dir: Path, rows_file: Path, tmp_path: Path, optimizer: str
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_file = tmp_path / "run.yaml"
    raw = settings_of(backbone_dir, rows_file, optimizer, whole)
    run_file.write_text(yaml.safe_dump({**raw, **SHARDED}), encoding="utf-8")
    ptd_train = (Path(cli.__file__).with_name("__main__.py"), "train", run_file)
    launch(2, *ptd_train)
    launch(2, Path(__file__).with_name("worker_stop.py"), STOP, run_file, f"output_dir={resumed}")
    assert json.loads((resumed / "run.json").read_text(encoding="utf-8"))["status"] == "preempted"
    stopped = shutil.copytree(resumed, tmp_path / "stopped")
    launch(2, *ptd_train, f"output_dir={resumed}")
    assert_the_same(whole, resumed, optimizer, files=2)

    alone = {**raw, "output_dir": str(stopped)}
    if optimizer == "adamw_8bit":  # the layer that two ranks shared is whole here
        with pytest.raises(UserError, match="the blocks of a split layer belong to the ranks that held it: continue"):
            train_here(alone)
    else:
        train_here(alone)
        losses = [
            [record["loss"] for record in read_records(folder) if "loss" in record] for folder in (whole, stopped)
        ]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_another_optimizer_is_another_run(train_here: Any, backbone_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    train_here(settings_of(backbone_dir, rows_file, "adamw", tmp_path / "run"), stop=STOP)
    with pytest.raises(UserError, match=r"other settings \(.*train.optimizer: was 'adamw', is now 'lion'\)"):
        train_here(settings_of(backbone_dir, rows_file, "lion", tmp_path / "run"))


def test_a_run_from_before_the_key_continues_with_adamw(
    train_here: Any, backbone_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    raw = settings_of(backbone_dir, rows_file, "adamw", tmp_path / "run")
    train_here(raw, stop=STOP)
    described = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    del described["config"]["train"]["optimizer"]
    write_json(tmp_path / "run" / "run.json", described)
    with pytest.raises(UserError, match=r"train.optimizer: was 'adamw', is now 'lion'"):
        train_here({**raw, "train": {**raw["train"], "optimizer": "lion"}})
    assert f"continuing from step-{RESTART:06d}" in train_here(raw)
