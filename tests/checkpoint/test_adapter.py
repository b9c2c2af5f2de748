"""Adapter folders: what ptd writes PEFT loads, what PEFT writes ptd loads, and damage is named."""

from __future__ import annotations

import json

import pytest
import torch
from families import FAMILIES, VOCAB, tiny_model
from peft import (
    CartridgeConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

import ptd
from ptd.checkpoint import Adapter, load_adapter, save_adapter
from ptd.checkpoint.adapter import KEY
from ptd.types import BackboneShape, LayerShape, UserError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by PEFT

P = 4
CLOSE = 1e-4  # the task's bound; about 3e-6 measured
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
UNIFORM = (LayerShape(2, 8, 8),) * 2
MIXED = (LayerShape(2, 8, 8), LayerShape(2, 8, 6))


def outputs(model):
    """Logits and mean loss."""
    with torch.no_grad():
        result = model(input_ids=IDS, labels=IDS)
    return result.logits, result.loss


def assert_equal_outputs(one, other):
    for a, b in zip(outputs(one), outputs(other), strict=True):
        assert (a - b).abs().max() < CLOSE


def random_adapter(layers=UNIFORM, **facts):
    flat = torch.randn(P, sum(layer.numel for layer in layers), generator=torch.Generator().manual_seed(1))
    return Adapter(flat, layers, "some/backbone", facts=facts)


@pytest.fixture
def folder(tmp_path):
    save_adapter(tmp_path / "adapter", random_adapter(fingerprint="abc"))
    return tmp_path / "adapter"


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_ptd_saved(family, tmp_path):
    model = tiny_model(family)
    tuned = ptd.attach(model, "prefix", num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=8)
    tuned.save(tmp_path)
    assert_equal_outputs(model, PeftModel.from_pretrained(tiny_model(family), tmp_path).eval())


@pytest.mark.parametrize("make", ["prefix", "prefix with projection", "cartridge"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ptd_loads_what_peft_saved(family, make, tmp_path):
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P}
    config = {
        "prefix": PrefixTuningConfig(**common),
        "prefix with projection": PrefixTuningConfig(**common, prefix_projection=True, encoder_hidden_size=8),
        "cartridge": CartridgeConfig(**common, num_frozen_tokens=1),
    }[make]
    torch.manual_seed(0)
    theirs = get_peft_model(tiny_model(family), config).eval()
    theirs.save_pretrained(tmp_path)
    model = tiny_model(family)
    ptd.load(model, tmp_path)
    assert_equal_outputs(model, theirs)


@pytest.mark.parametrize("peft_only", [False, True])
def test_round_trip(tmp_path, peft_only):
    adapter = random_adapter(fingerprint="abc", method={"name": "prefix"})
    save_adapter(tmp_path, adapter, peft_only=peft_only)
    found = load_adapter(tmp_path)
    assert torch.equal(found.flat, adapter.flat)
    assert (found.layers, found.backbone, found.task_type) == (adapter.layers, adapter.backbone, "CAUSAL_LM")
    assert (found.facts.get("fingerprint") == "abc") is not peft_only
    assert (tmp_path / "ptd.json").exists() is not peft_only


def test_the_file_is_pefts(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    assert list(tensors) == [KEY]
    assert tensors[KEY].shape == (P, 2 * 2 * 16)
    assert tensors[KEY].dtype == torch.float32
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "PREFIX_TUNING"
    assert config["inference_mode"] is True
    assert (config["token_dim"], config["num_attention_heads"], config["num_layers"]) == (16, 2, 2)


def test_a_run_folder_stands_for_its_adapter(folder):
    assert torch.equal(load_adapter(folder.parent).flat, load_adapter(folder).flat)


def test_layers_of_different_size_are_kept_but_not_exported(tmp_path):
    adapter = random_adapter(MIXED)
    save_adapter(tmp_path / "own", adapter)
    assert not (tmp_path / "own" / "adapter_config.json").exists()
    assert load_adapter(tmp_path / "own").layers == MIXED
    with pytest.raises(UserError, match="PEFT's prefix format cannot hold that"):
        save_adapter(tmp_path / "peft", adapter, peft_only=True)
    assert not (tmp_path / "peft").exists()


def test_a_backbone_it_was_not_made_for_is_refused():
    adapter = random_adapter(fingerprint="abc")
    shape = BackboneShape("llama", 32, VOCAB, 64, UNIFORM)
    adapter.check_fits(shape, "abc", path="here")
    adapter.check_fits(shape, None, path="here")
    random_adapter().check_fits(shape, "abc", path="here")  # PEFT writes no fingerprint
    with pytest.raises(UserError, match=r"another backbone .*some/backbone"):
        adapter.check_fits(shape, "abd", path="here")
    with pytest.raises(UserError, match=r"2 layers of 2 kv heads × 8, but the backbone here has 1 layers"):
        adapter.check_fits(BackboneShape("llama", 32, VOCAB, 64, UNIFORM[:1]), "abc", path="here")


def weights(folder, tensors):
    save_file(tensors, folder / "adapter_model.safetensors")


def config(folder, **changes):
    (folder / "ptd.json").unlink()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_config(folder):
    (folder / "ptd.json").unlink()
    (folder / "adapter_config.json").unlink()


FLAT = torch.zeros(P, 64)
DAMAGES = {
    "weights missing": (lambda f: (f / "adapter_model.safetensors").unlink(), "cannot read .*safetensors"),
    "weights corrupted": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 100), "cannot read"),
    "weights cut": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
        "cannot read",
    ),
    "weights empty": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "cannot read"),
    "another key": (lambda f: weights(f, {"lora_A": FLAT}), r"\['lora_A'\] but no 'prompt_embeddings'"),
    "wrong width": (
        lambda f: weights(f, {KEY: FLAT[:, 1:].contiguous()}),
        r"has shape \(4, 63\), its configuration says \[4, 64\]",
    ),
    "no matrix": (lambda f: weights(f, {KEY: FLAT[0].clone()}), r"has shape \(64,\)"),
    "no tokens": (lambda f: weights(f, {KEY: FLAT[:0].clone()}), r"has shape \(0, 64\)"),
    "NaN": (lambda f: weights(f, {KEY: FLAT.clone().fill_(float("nan"))}), "not finite"),
    "infinity": (lambda f: weights(f, {KEY: FLAT.clone().fill_(float("inf"))}), "not finite"),
    "no configuration": (without_config, r"cannot read .*adapter_config\.json"),
    "configuration cut": (lambda f: (f / "adapter_config.json").write_text("{"), r"cannot read .*adapter_config\.json"),
    "configuration a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "has to hold a JSON object"),
    "facts cut": (lambda f: (f / "ptd.json").write_text("{"), r"cannot read .*ptd\.json"),
    "layers no list": (lambda f: (f / "ptd.json").write_text('{"layers": 3}'), "incomplete or damaged"),
    "layers too short": (lambda f: (f / "ptd.json").write_text('{"layers": [[2, 8]]}'), "incomplete or damaged"),
    "sizes missing": (lambda f: config(f, num_attention_heads=None), "incomplete or damaged"),
    "no heads": (lambda f: config(f, num_attention_heads=0), "incomplete or damaged"),
    "a LoRA": (lambda f: config(f, peft_type="LORA"), "PEFT adapter of type LORA; supported: PREFIX_TUNING, CARTRIDGE"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused(name, folder):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(UserError, match=rf"--adapter: .*{message}"):
        load_adapter(folder)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="--adapter: there is no folder"):
        load_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "foreign",
    [
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
    ],
    ids=["LORA", "PROMPT_TUNING"],
)
def test_adapters_of_other_methods_that_peft_wrote(foreign, tmp_path):
    get_peft_model(tiny_model("llama"), foreign).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"type {foreign.peft_type.value}"):
        load_adapter(tmp_path)
