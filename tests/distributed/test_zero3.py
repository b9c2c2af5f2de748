"""Backbones sharded over four ranks as two nodes, compared with whole ones: weights, loss, gradient, memory, refusals.

worker_zero3.py runs all cases in one launch; each test here checks some of them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from families import save_backbone, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

WORKER = Path(__file__).with_name("worker_zero3.py")
TOLERANCE = 1e-5
TOKENS = 24  # per row, in worker_zero3.py
# A block of 4-bit numbers has 64 numbers. Of three layers, the check at attach time runs two.
WIDE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_hidden_layers": 3}
MATRIX = [
    (quantization, sharding, checkpointing)
    for quantization in ("none", "int8", "nf4")
    for sharding in ("none", "world", "node")
    for checkpointing in (False, True)
    if not (quantization == "int8" and sharding != "none")
]
LOADED = {
    "tied, in many files": ("llama-tied", {"sharding": "node"}, "causal_lm"),
    "tied, stored twice": ("llama-both", {"sharding": "world"}, "causal_lm"),
    "said to be tied, stored differently": ("llama-differs", {"sharding": "node"}, "causal_lm"),
    "experts that are put together": ("mixtral", {"sharding": "node"}, "causal_lm"),
    "transposed layers, bfloat16": ("gpt2", {"sharding": "world", "dtype": "bfloat16"}, "causal_lm"),
    "transposed layers, nf4": ("gpt2", {"sharding": "node", "quantization": "nf4"}, "causal_lm"),
    "float16": ("llama", {"sharding": "node", "dtype": "float16"}, "causal_lm"),
    "quantised already": ("llama-nf4", {"sharding": "world"}, "causal_lm"),
    "an encoder": ("bert", {"sharding": "node"}, "body"),
    "an encoder of two": ("t5", {"sharding": "world"}, "body"),
    "groups of one": ("llama", {"sharding": "node", "sharding_group_size": 1}, "causal_lm"),
    "groups of four": ("llama", {"sharding": "node", "sharding_group_size": 4}, "causal_lm"),
    "kept in host memory": ("llama", {"sharding": "node", "offload": "cpu"}, "causal_lm"),
    "nf4, kept in host memory": ("llama", {"sharding": "world", "offload": "cpu", "quantization": "nf4"}, "causal_lm"),
}
if os.environ.get("PTD_TEST_NVME") == "1":  # DeepSpeed compiles its reader first, which takes minutes
    LOADED["kept on a disk"] = ("llama-wide", {"sharding": "node", "offload": "nvme"}, "causal_lm")
GROUPS = {"world": 4, "node": 2}


def save_variants(folder: Path) -> dict[str, Path]:
    folders = {name: folder / name for name in ("llama-tied", "llama-both", "llama-differs", "llama-nf4")}
    folders["llama"] = save_backbone(folder / "llama", "llama", num_key_value_heads=2, **WIDE)
    for family in ("mixtral", "gpt2", "bert", "t5"):
        folders[family] = save_backbone(folder / family, family, **(WIDE if family == "gpt2" else {}))
    if "kept on a disk" in LOADED:  # a shard of less than 1 MiB would stay in memory
        wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4}
        folders["llama-wide"] = save_backbone(folder / "llama-wide", "llama", **wide)
    tied = tiny_model("llama", tie_word_embeddings=True)
    tied.save_pretrained(folders["llama-tied"], max_shard_size="20KB")
    assert len(list(folders["llama-tied"].glob("*.safetensors"))) > 2
    for name, change in (("llama-both", 0.0), ("llama-differs", 1.0)):
        tied.save_pretrained(folders[name])
        file = folders[name] / "model.safetensors"
        weights = load_file(file)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + change
        save_file(weights, file, metadata={"format": "pt"})
    save_quantised(folders["llama"], folders["llama-nf4"])
    for saved in folders.values():
        tiny_tokenizer().save_pretrained(saved)
    return folders


def save_quantised(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, device_map={"": "cpu"})
    model.save_pretrained(target)


@pytest.fixture(scope="module")
def measured(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sharding")
    folders = save_variants(folder)
    cases: dict[str, Any] = {}
    for quantization, sharding, checkpointing in MATRIX:
        settings = {"quantization": quantization, "sharding": sharding, "gradient_checkpointing": checkpointing}
        cases[name_of(quantization, sharding, checkpointing)] = {
            "backbone": {"path": str(folders["llama"]), "dtype": "float32", **settings},
            "checkpointing": checkpointing,
        }
    for name, (saved, settings, output) in LOADED.items():
        backbone = {"path": str(folders[saved]), "dtype": "float32", **settings}
        cases[name] = {"backbone": backbone, "output": output}
        if settings.get("offload") == "nvme":
            backbone["offload_folder"] = str(folder)
            cases[name]["zero"] = {"offload_param": {"buffer_size": 4_000_000, "buffer_count": 20}}
    tiny_model("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=10).save_pretrained(folder / "large")
    cases["memory"] = {"backbone": {"path": str(folder / "large"), "sharding": "world"}, "only_load": True}
    three = {"path": str(folders["llama"]), "sharding": "node", "sharding_group_size": 3}
    cases["groups of three"] = {"backbone": three}
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    launch(4, WORKER, folder / "cases.json", folder / "results.json")
    return dict(json.loads((folder / "results.json").read_text()))


def name_of(quantization: str, sharding: str, checkpointing: bool) -> str:
    return f"{quantization}, {sharding}, checkpointing {checkpointing}"


@pytest.mark.parametrize(("quantization", "sharding", "checkpointing"), MATRIX)
def test_loss_and_prefix_gradient_are_those_of_the_whole_backbone(
    measured: dict[str, Any], quantization: str, sharding: str, checkpointing: bool
) -> None:
    case = measured[name_of(quantization, sharding, checkpointing)]
    assert case["gradient_norm"] > 1e-3
    assert max(case["loss_error"], case["output_error"], case["gradient_error"]) <= TOLERANCE
    if sharding != "none":
        assert case["shards"] == [GROUPS[sharding]]
        assert case["whole"] == 0


def test_checkpointing_and_sharding_change_no_gradient(measured: dict[str, Any]) -> None:
    for quantization in ("none", "int8", "nf4"):
        norms = [measured[name_of(*one)]["gradient_norm"] for one in MATRIX if one[0] == quantization]
        assert max(norms) == pytest.approx(min(norms), rel=TOLERANCE)


@pytest.mark.parametrize(("quantization", "sharding", "checkpointing"), MATRIX)
def test_the_first_training_pass_recomputes_and_a_generation_behind_it_has_its_cache(
    measured: dict[str, Any], quantization: str, sharding: str, checkpointing: bool
) -> None:
    case = measured[name_of(quantization, sharding, checkpointing)]
    for found, whole in zip(case["runs"], case["runs_whole"], strict=True):
        assert found["trained"] == [TOKENS] * (1 + checkpointing)
        assert found["generated"] == [TOKENS, 1, 1, 1]
        assert found["text"] == whole["text"]


@pytest.mark.parametrize("name", LOADED)
def test_every_rank_has_the_weights_of_a_plain_load(measured: dict[str, Any], name: str) -> None:
    _, settings, _ = LOADED[name]
    case = measured[name]
    assert case["names"]
    assert not case["different"]
    group = settings.get("sharding_group_size") or GROUPS[settings["sharding"]]
    assert case["shards"] == [group]
    assert case["whole"] == 0 or group == 1
    assert len(set(case["fingerprints"])) == 1
    rounded = settings.get("dtype", "float32") != "float32"
    assert max(case["output_error"], case["gradient_error"]) <= (2e-2 if rounded else TOLERANCE)


def test_no_rank_ever_holds_the_whole_model(measured: dict[str, Any]) -> None:
    case = measured["memory"]
    slack = 40e6
    assert case["whole"] > 150e6, "or the bound says nothing"
    assert case["shard"] < 0.26 * case["whole"]
    assert case["peak"] <= case["shard"] + case["largest"] + slack < case["whole"]


def test_ranks_that_do_not_divide_are_refused(measured: dict[str, Any]) -> None:
    assert "sharding_group_size: 4 ranks do not divide into groups of 3" in measured["groups of three"]["refused"]
