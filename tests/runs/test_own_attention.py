"""Runs on backbones that keep their own attention code: a prefix in the cache of Bloom, a soft prompt on Mamba."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, save_backbone
from peft import PeftModel
from transformers import AutoModelForCausalLM

import ptd
from ptd.commands.evaluate import evaluate
from ptd.commands.generate import generate
from ptd.commands.plan import build_blank, without_data
from ptd.config import parse_config
from ptd.runs.metrics_log import read_records
from ptd.types import UserError

IDS = torch.randint(6, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, rows_file: Path) -> Callable[..., dict[str, Any]]:
    folder = tmp_path_factory.mktemp("own")

    def of(family: str, method: str, **backbone: Any) -> dict[str, Any]:
        path = folder / family
        if not path.exists():
            save_backbone(path, family)
        return {
            "backbone": {"path": str(path), **backbone},
            "method": {"name": method, "num_virtual_tokens": 4},
            "data": {"train": str(rows_file), "max_length": 64},
            "train": {"max_steps": 6, "per_device_train_batch_size": 22, "logging_steps": 1},
            "output_dir": str(folder / f"{family}-{method}"),
        }

    return of


@pytest.mark.filterwarnings("ignore:.*own cache:UserWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by PEFT
def test_a_prefix_is_trained_through_the_cache_and_is_peft_s_prefix(settings, train_here):
    config = settings("bloom", "prefix", gradient_checkpointing=True)
    notes = train_here(config)
    (said,) = [note for note in notes if note.startswith("backbone.attention")]
    assert "goes through the model's own cache, which is slower" in said
    assert "rows are padded, not packed" in said
    out = Path(config["output_dir"])
    losses = [record["loss"] for record in read_records(out) if "loss" in record]
    assert losses[-1] < losses[0]
    tuned = ptd.load(AutoModelForCausalLM.from_pretrained(config["backbone"]["path"]), out / "adapter")
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(config["backbone"]["path"]), str(out / "adapter")
    )
    with torch.no_grad():
        difference = tuned.model(input_ids=IDS).logits - theirs.eval()(input_ids=IDS).logits
    assert difference.abs().max() < 1e-4
    result = evaluate(config["data"]["train"], adapter=str(out / "adapter"))
    assert result["loss"] < losses[0]
    assert len(generate(["1 times 1 is ", "20 times 0 is "], adapter=str(out / "adapter"))) == 2


def test_a_soft_prompt_is_trained_on_a_model_without_attention(settings, train_here):
    config = settings("mamba", "prompt")
    notes = train_here(config)
    assert any("has no cache of keys and values" in note for note in notes)
    losses = [record["loss"] for record in read_records(Path(config["output_dir"])) if "loss" in record]
    assert losses[-1] < losses[0]
    assert len(generate(["1 times 1 is ", "20 times 0 is "], adapter=str(Path(config["output_dir"]) / "adapter"))) == 2
    with pytest.raises(UserError, match=r"type 'mamba' take no prefix, .*; use method prompt or method p_tuning"):
        train_here(settings("mamba", "prefix"))


def test_compiling_such_a_backbone_is_refused(settings, train_here):
    with pytest.raises(UserError, match=r"backbone\.compile: a bloom backbone keeps its own attention code"):
        train_here(settings("bloom", "prefix", compile=True) | {"output_dir": settings("bloom", "x")["output_dir"]})


def test_a_plan_counts_such_a_backbone_without_data(settings):
    with without_data(None):
        blank = build_blank(parse_config(settings("bloom", "prefix")), "cpu")
    assert [layer.kv_heads for layer in blank.prepared.shape.layers] == [4, 4]
    assert not blank.prepared.attachment.packable
