"""Loss scaling of float16 backbones: `LossScale` alone, and in runs of `ptd.commands.train` in this process.

test_steps.py tests it on several ranks.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ptd.engine.loss_scale import LARGEST, LossScale
from ptd.runs.metrics_log import read_records
from ptd.types import UserError

Start = Callable[..., list[str]]
# float16 rounds each number by up to 5e-4 of its value. The largest errors measured over the methods are 1.2e-3 for the
# loss and 3e-3 for the gradient's norm; the gradient's cosine is 1 - 5e-6.
LOSS_TOLERANCE, NORM_TOLERANCE, COSINE = 3e-3, 1e-2, 0.999
METHODS: dict[str, dict[str, Any]] = {
    "prefix": {
        "name": "prefix",
        "num_virtual_tokens": 4,
        "prefix_projection": True,
        "encoder_hidden_size": 16,
        "init": "random",
    },
    "prompt": {"name": "prompt", "num_virtual_tokens": 4},
    "p_tuning_v2": {"name": "p_tuning_v2", "num_virtual_tokens": 4},
    "head": {"name": "head"},
}


# ---- the loss scale alone


def test_it_falls_with_every_overflow_down_to_one() -> None:
    scale = LossScale(power=2)
    assert [(scale.update(finite=False), scale.value) for _ in range(4)] == [
        (True, 2.0),
        (True, 1.0),
        (False, 1.0),
        (False, 1.0),
    ]


def test_it_rises_after_a_window_without_overflow() -> None:
    scale = LossScale(power=3, window=3)
    steps = [True, True, False, True, True, True, True, True, True, True]
    assert not any(scale.update(finite=step) for step in steps[:2])
    assert scale.update(finite=steps[2])
    assert [(scale.update(finite=step), scale.value)[1] for step in steps[3:]] == [4, 4, 8, 8, 8, 16, 16]


def test_it_starts_as_torchs_does_and_stays_finite() -> None:
    assert LossScale().value == torch.amp.GradScaler("cpu").get_scale()
    assert LossScale().window == torch.amp.GradScaler("cpu").get_growth_interval()
    scale = LossScale(power=64, window=1)
    scale.update(finite=True)
    assert scale.value == LARGEST


def test_without_one_nothing_is_scaled_or_kept() -> None:
    scale, loss = LossScale.none(), torch.tensor(3.0)
    assert scale.apply(loss) is loss
    assert not scale.update(finite=False)
    assert not any(scale.update(finite=True) for _ in range(3000))
    assert (scale.used, scale.value, scale.tensors()) == (False, 1.0, {})


# ---- through ptd.commands.train


@pytest.fixture(scope="module")
def start(backbone_dir: Path, rows_file: Path, train_here: Start, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """``start(folder, "prefix", {"train.seed": 3})`` trains in float16 into ``folder``; returns the notes."""
    labelled = tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    rows = [{"text": f"row {index} of many", "label": "ab"[index % 2]} for index in range(12)]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings: dict[str, Any] = {
        "backbone": {"path": str(backbone_dir), "dtype": "float16"},
        "data": {"max_length": 64},
        "train": {
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "save_steps": 1,
            "save_total_limit": 30,
        },
    }

    def run(
        folder: Path, method: str = "prefix", changes: dict[str, Any] | None = None, *, stop: int | None = None
    ) -> list[str]:
        raw = {**copy.deepcopy(settings), "method": METHODS[method], "output_dir": str(folder)}
        reads_labels = method in ("p_tuning_v2", "head")
        raw["task"] = {"kind": "classification" if reads_labels else "causal_lm"}
        raw["data"]["train"] = str(labelled if reads_labels else rows_file)
        for key, value in (changes or {}).items():
            section, name = key.split(".")
            raw[section][name] = value
        return train_here(raw, stop=stop)

    return run


def series(folder: Path, key: str) -> list[Any]:
    return [record[key] for record in read_records(folder) if key in record]


def kept(folder: Path, step: int) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:06d}" / "shard-00001-model-00001-of-00001.safetensors")


def first_gradient(folder: Path, part: str = "", *, behind: int = 0) -> Tensor:
    """Return AdamW's first moment after the first step that was not skipped: a tenth of the clipped gradient.

    ``behind``: number of further steps, for parameters that have had no gradient until then.
    """
    step = 1 + series(folder, "skipped_steps").index(0) + behind
    moments = {name: tensor for name, tensor in kept(folder, step).items() if name.startswith("optimizer.exp_avg.")}
    return torch.cat([moments[name].flatten() for name in sorted(moments) if part in name])


@pytest.mark.parametrize("method", METHODS)
def test_training_is_that_of_float32(start: Start, tmp_path: Path, method: str) -> None:
    small = {"train.initial_scale_power": 10}  # no step overflows: all runs take the same steps
    start(tmp_path / "float32", method, {"backbone.dtype": "float32"})
    start(tmp_path / "float16", method, small)
    start(tmp_path / "recomputed", method, {**small, "backbone.gradient_checkpointing": True})
    for name in ("float16", "recomputed"):
        assert series(tmp_path / name, "loss_scale") == [1024.0] * 3
        assert series(tmp_path / name, "skipped_steps") == [0] * 3
        assert series(tmp_path / name, "loss") == pytest.approx(
            series(tmp_path / "float32", "loss"), rel=LOSS_TOLERANCE
        )
        assert series(tmp_path / name, "grad_norm") == pytest.approx(
            series(tmp_path / "float32", "grad_norm"), rel=NORM_TOLERANCE
        )
        gradients = [first_gradient(tmp_path / folder) for folder in (name, "float32")]
        assert cosine_similarity(*gradients, dim=0) >= COSINE
    assert series(tmp_path / "float32", "loss_scale") == []
    assert kept(tmp_path / "float16", 3).keys() - kept(tmp_path / "float32", 3).keys() == {
        "loss_scale.value",
        "loss_scale.good_steps",
    }


def test_a_gradient_too_small_for_float16_survives(start: Start, tmp_path: Path) -> None:
    """The class weights cancel in the mean, but not in the sums whose gradient passes through the backbone."""
    tiny = {"task.class_weights": {"a": 1e-9, "b": 1e-9}}
    start(tmp_path / "float32", "p_tuning_v2", {"backbone.dtype": "float32", **tiny})
    start(tmp_path / "scaled", "p_tuning_v2", {**tiny, "train.initial_scale_power": 32})
    start(tmp_path / "unscaled", "p_tuning_v2", {**tiny, "train.initial_scale_power": 0})
    # The head starts at zero, so no gradient passes through it in the first step.
    true, scaled, unscaled = (
        first_gradient(tmp_path / name, "encoder", behind=1) for name in ("float32", "scaled", "unscaled")
    )
    assert true.norm() > 0
    assert not unscaled.any()
    assert cosine_similarity(scaled, true, dim=0) >= COSINE
    assert scaled.norm() == pytest.approx(float(true.norm()), rel=NORM_TOLERANCE)


def test_overflow_lowers_the_scale_skips_and_goes_on(start: Start, tmp_path: Path) -> None:
    """More steps in a row may be skipped for overflows than for a loss that is not finite."""
    notes = start(tmp_path / "run", changes={"train.initial_scale_power": 32, "train.max_steps": 24})
    skipped, scales = (series(tmp_path / "run", key) for key in ("skipped_steps", "loss_scale"))
    count = sum(skipped)
    assert count > 12
    assert skipped == [1] * count + [0] * (24 - count)
    assert scales == [2.0 ** (32 - min(step, count)) for step in range(24)]
    said = [note for note in notes if "skipped" in note]
    assert said[0] == "step 1 skipped on all ranks: a gradient overflowed; loss scale lowered to 2.14748e+09"
    assert len(said) == count
    assert all("loss scale lowered to" in note for note in said)
    before, behind = kept(tmp_path / "run", 1), kept(tmp_path / "run", count)
    assert all(torch.equal(behind[name], before[name]) for name in before if not name.startswith("loss_scale"))
    assert series(tmp_path / "run", "loss")[-1] is not None
    assert kept(tmp_path / "run", 24)["optimizer.step.encoder.embedding"] == 24 - count


def test_a_loss_that_is_not_finite_is_no_overflow(start: Start, tmp_path: Path) -> None:
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.lm_head.weight[5, 0] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    changes = {"backbone.path": str(tmp_path / "broken"), "train.max_steps": 12}
    with pytest.raises(UserError, match="10 steps in a row"):
        start(tmp_path / "run", changes=changes)
    assert series(tmp_path / "run", "loss_scale") == [2.0**16] * 9


def test_gradients_that_are_not_finite_at_scale_one_end_the_run(start: Start, tmp_path: Path) -> None:
    """With class weights of 1e30, float16 cannot represent the gradient at any loss scale."""
    changes = {"task.class_weights": {"a": 1e30, "b": 1e30}, "train.max_steps": 40}
    with pytest.raises(UserError, match="10 steps in a row"):
        start(tmp_path / "run", "p_tuning_v2", changes)
    # In the first step no gradient passes through the head, which starts at zero.
    assert series(tmp_path / "run", "loss_scale") == [2.0**16, *(2.0 ** max(0, 16 - step) for step in range(16 + 9))]


def test_resumed_run_is_bit_identical(start: Start, tmp_path: Path) -> None:
    """The backbone is stored in float16, and the loss scale falls, rises and falls again."""
    tiny_model("llama").half().save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    changes = {
        "backbone.path": str(tmp_path / "half"),
        "backbone.dtype": "auto",
        "train.initial_scale_power": 18,
        "train.loss_scale_window": 3,
        "train.max_steps": 16,
        "train.save_steps": 6,
    }
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    start(whole, changes=changes)
    start(resumed, changes=changes, stop=8)
    assert "continuing from step-000006" in start(resumed, changes=changes)
    for key in ("loss", "grad_norm", "loss_scale"):
        assert series(resumed, key) == series(whole, key)
    scales = series(whole, "loss_scale")
    moves = [after / before for before, after in pairwise(scales)]
    assert {0.5, 1.0, 2.0} == set(moves[6:])  # after the checkpoint as well
    assert 0 < kept(whole, 6)["loss_scale.good_steps"] < 3
    for step in (6, 12, 16):
        there, here = kept(whole, step), kept(resumed, step)
        assert there.keys() == here.keys()
        assert all(torch.equal(there[name], here[name]) for name in there)
