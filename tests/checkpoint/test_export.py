"""``ptd export`` and ``ptd import``: for each kind of adapter, what is transferred, left out or refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from families import save_backbone, tiny_model
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModel

from ptd.checkpoint import Adapter, load_adapter, save_adapter
from ptd.commands.export import export_adapter, import_adapter
from ptd.types import EmptyLayout, LayerShape, PrefixLayout, SoftLayout, UserError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by PEFT

P, HIDDEN = 4, 32


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    return {family: save_backbone(folder / family, family) for family in ("llama", "t5", "bert")}


def soft(backbone="some/backbone", task_type="CAUSAL_LM", **rest):
    flat = torch.randn(P, HIDDEN, generator=torch.Generator().manual_seed(1))
    return Adapter(flat, SoftLayout(HIDDEN), str(backbone), "main", task_type, "PROMPT_TUNING", **rest)


def peft_folder(backbone, folder, config, model=None):
    model = tiny_model("llama") if model is None else model
    model.name_or_path = str(backbone)
    theirs = get_peft_model(model, config)
    theirs.peft_config["default"].base_model_name_or_path = str(backbone)
    theirs.save_pretrained(folder)
    return theirs.eval()


def test_an_exported_prompt_is_pefts_alone(tmp_path):
    adapter = soft(facts={"fingerprint": "abc"})
    save_adapter(tmp_path / "ours", adapter)
    assert export_adapter(str(tmp_path / "ours"), tmp_path / "theirs") is None
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "theirs")
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, adapter.flat)
    assert model.peft_config["default"].revision == "main"


def test_the_name_of_the_backbone_can_be_changed(tmp_path):
    save_adapter(tmp_path / "ours", soft())
    export_adapter(str(tmp_path / "ours"), tmp_path / "theirs", base_model="a/model")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("a/model", None)


def test_a_head_stays_behind_and_this_is_said(tmp_path):
    save_adapter(tmp_path / "ours", soft(task_type="FEATURE_EXTRACTION", head={"weight": torch.ones(3, HIDDEN)}))
    note = export_adapter(str(tmp_path / "ours"), tmp_path / "theirs")
    assert note is not None
    assert str(tmp_path / "ours") in note
    assert not (tmp_path / "theirs" / "head.safetensors").exists()
    assert load_adapter(tmp_path / "theirs").head == {}


LAYERS = tuple(LayerShape(2, 8, 8, kind) for kind in ("encoder", "decoder", "cross"))
REFUSED = {
    "a head alone": (Adapter(torch.empty(0, 0), EmptyLayout(), "b", head={"w": torch.ones(2)}), "it has no prompt"),
    "tokens at marks": (
        Adapter(torch.ones(P, 8), SoftLayout(8, False), "b", None, "CAUSAL_LM", "P_TUNING"),
        "at marks",
    ),
    "an encoder-decoder's prefix": (
        Adapter(torch.ones(P, 96), PrefixLayout(LAYERS), "b", None, "SEQ_2_SEQ_LM", "PREFIX_TUNING"),
        "a prefix over an encoder-decoder",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_cannot_hold_is_refused(name, tmp_path):
    adapter, reason = REFUSED[name]
    save_adapter(tmp_path / "ours", adapter)
    with pytest.raises(UserError, match=reason):
        export_adapter(str(tmp_path / "ours"), tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("verb", [export_adapter, import_adapter])
def test_nothing_is_overwritten(verb, tmp_path):
    save_adapter(tmp_path / "ours", soft())
    with pytest.raises(UserError, match="already exists; give a new folder"):
        verb(str(tmp_path / "ours"), tmp_path / "ours")


@pytest.mark.parametrize("named", [True, False], ids=["by the adapter", "by --backbone"])
@pytest.mark.parametrize(("family", "task_type"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_an_imported_prompt_is_bound_to_its_backbone(family, task_type, named, backbones, tmp_path):
    config = PromptTuningConfig(task_type=task_type, num_virtual_tokens=P)
    peft_folder(backbones[family] if named else "", tmp_path / "theirs", config, tiny_model(family))
    import_adapter(str(tmp_path / "theirs"), tmp_path / "ours", backbone=None if named else str(backbones[family]))
    before, after = load_adapter(tmp_path / "theirs"), load_adapter(tmp_path / "ours")
    assert torch.equal(before.flat, after.flat)
    assert (after.backbone, after.task_type) == (str(backbones[family]), task_type)
    assert re.fullmatch("[0-9a-f]{12}-[0-9a-f]{12}", after.facts["fingerprint"])


def test_an_imported_prefix_learns_what_its_layers_are(backbones, tmp_path):
    body = AutoModel.from_pretrained(backbones["bert"], add_pooling_layer=False)
    config = PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=P)
    peft_folder(backbones["bert"], tmp_path / "theirs", config, body)
    import_adapter(str(tmp_path / "theirs"), tmp_path / "ours")
    assert load_adapter(tmp_path / "ours").layout == PrefixLayout((LayerShape(4, 8, 8, "encoder"),) * 2)


def test_what_does_not_fit_the_backbone_is_not_imported(backbones, tmp_path):
    flat = torch.ones(P, 16)
    save_adapter(tmp_path / "narrow", Adapter(flat, SoftLayout(16), "", None, "CAUSAL_LM", "P_TUNING"), peft_only=True)
    with pytest.raises(UserError, match=r"the backbone is unknown: .*--backbone"):
        import_adapter(str(tmp_path / "narrow"), tmp_path / "ours")
    with pytest.raises(UserError, match=r"made for input embeddings of size 16, but the backbone .*size 32"):
        import_adapter(str(tmp_path / "narrow"), tmp_path / "ours", backbone=str(backbones["llama"]))
    assert not (tmp_path / "ours").exists()
