"""Backbones in 8 and 4 bits: the prompt's gradient is that of the dequantised weights, and adapters carry over."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from families import VOCAB, save_backbone

from ptd.backbone import fingerprint, load_model
from ptd.config import BackboneConfig, parse_config
from ptd.inject import Attachment, check_supported
from ptd.methods.prefix import PrefixEncoder
from ptd.types import UserError, same_backbone

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
CPU = torch.device("cpu")
IDS = torch.randint(5, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
WIDE = {"hidden_size": 128, "intermediate_size": 176, "num_attention_heads": 4}
"""4-bit blocks have 64 numbers; the row length of one layer is not a multiple of 64."""
FAMILIES = ("llama", "gpt2", "bert")
KINDS = ("int8", "nf4")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {}
    for family in FAMILIES:
        sizes = {**WIDE, "num_key_value_heads": 2} if family == "llama" else WIDE
        folders[family] = save_backbone(tmp_path_factory.mktemp(family), family, **sizes)
    return folders


def load(folder, quantization="none", **settings):
    config = BackboneConfig(path=str(folder), dtype="float32", quantization=quantization, **settings)
    return load_model(config, "body", device=CPU, check=check_supported)


def nf4_weight(layer):
    """Dequantise by the format: two codes per byte, and per block of 64 a scale in 8 bits itself (QLoRA, section 3)."""
    state, packed = layer.weight.quant_state, layer.weight.data.view(-1)
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1).long()
    nested = state.state2
    scales = nested.code[state.absmax.long()] * nested.absmax.repeat_interleave(nested.blocksize)[: len(state.absmax)]
    scales = (scales + state.offset).repeat_interleave(state.blocksize)
    return (state.code[codes] * scales[: len(codes)]).view(state.shape)


def plain_twin(folder, quantised):
    """Return the same model with the dequantised weights in ordinary layers."""
    plain = load(folder)
    layers = dict(plain.named_modules())
    for name, module in quantised.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = nf4_weight(module)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weight = module.weight.data.float() * module.weight.SCB[:, None] / 127
        else:
            continue
        own = layers[name]
        own.weight.data.copy_(weight if isinstance(own, torch.nn.Linear) else weight.T)  # GPT-2's are transposed
    return plain


def gradient(model):
    attachment = Attachment(model)
    torch.manual_seed(1)
    encoder = PrefixEncoder(attachment.shape.layers, 5)
    attachment.set(encoder.state(encoder()))
    with torch.no_grad():  # like an evaluation between steps
        model(input_ids=IDS)
    hidden = model(input_ids=IDS).last_hidden_state
    hidden.square().sum().backward()
    return hidden.detach(), encoder.embedding.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_the_dequantised_weights(folders, family, kind):
    quantised = load(folders[family], kind)
    linear = [m for m in quantised.modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]
    assert linear
    assert not any(parameter.requires_grad for parameter in quantised.parameters())
    twin = plain_twin(folders[family], quantised)
    (hidden, got), (wanted_hidden, want) = gradient(quantised), gradient(twin)
    # 4-bit weights are multiplied in fp32; LLM.int8 also rounds the inputs, row by row.
    tolerance = 1e-5 if kind == "nf4" else 0.05
    assert (hidden - wanted_hidden).norm() < tolerance * wanted_hidden.norm()
    assert (got - want).norm() < 2 * tolerance * want.norm()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_the_outlier_threshold_reaches_the_layers(folders, threshold):
    model = load(folders["llama"], "int8", int8_threshold=threshold)
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear8bitLt)]
    assert {layer.state.threshold for layer in layers} == {threshold}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_backbone_is_recognised(folders, family, tmp_path):
    prints = [fingerprint(load(folders[family], kind)) for kind in ("none", *KINDS)]
    assert all(same_backbone(prints[0], one) for one in prints)
    sizes = {**WIDE, "num_key_value_heads": 2} if family == "llama" else WIDE
    other = save_backbone(tmp_path, family, seed=1, **sizes)
    for kind in ("none", *KINDS):
        assert not any(same_backbone(fingerprint(load(other, kind)), one) for one in prints)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_in_few_bits_and_used_in_many(folders, kind, check_carried_over):
    backbone = {"path": str(folders["llama"]), "dtype": "float32", "quantization": kind}
    check_carried_over(backbone, near={"int8": 0.1, "nf4": 0.35}[kind])


def test_what_does_not_go_together_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match="int8_threshold: has no effect"):
        parse_config({"backbone": {"path": "x", "int8_threshold": 6}, "method": {"name": "prefix"}, "data": {}})
    saved = tmp_path / "saved"
    load(folders["llama"], "nf4").save_pretrained(saved)
    with pytest.raises(UserError, match="already quantised"):
        load(saved, "nf4")
    again = load(saved)
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in again.modules()), "it loads as it is"
    eight = tmp_path / "eight"
    load(folders["llama"], "int8").save_pretrained(eight)
    with pytest.raises(UserError, match=r"backbone\.sharding: .* in a form that cannot be sharded"):
        load_model(BackboneConfig(path=str(eight)), device=CPU, sharded=True)
    for settings, said in (
        ({"quantization": "int8", "sharding": "world"}, "cannot be sharded"),
        ({"offload": "cpu"}, "set sharding: node or world"),
        ({"sharding": "world", "offload": "nvme"}, "offload_folder: has to name a folder on the NVMe disk"),
        ({"sharding": "world", "sharding_group_size": 2}, "no effect without sharding: node"),
    ):
        with pytest.raises(UserError, match=said):
            parse_config({"backbone": {"path": "x", **settings}, "method": {"name": "prefix"}, "data": {}})
