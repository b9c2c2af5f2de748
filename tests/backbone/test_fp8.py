"""fp8 weights: products equal torch's, the prompt's gradient is close to the backbone's, and adapters carry over."""

from __future__ import annotations

import pytest
import torch
from families import VOCAB, save_backbone
from transformers import AutoTokenizer

from ptd.backbone import fingerprint, load_model
from ptd.backbone.fp8 import E4M3, Fp8Linear, check_device, to_fp8
from ptd.config import BackboneConfig, parse_config
from ptd.inject import Attachment, check_supported
from ptd.methods.prefix import PrefixEncoder
from ptd.quickstart import BACKBONE
from ptd.quickstart.task import make_rows
from ptd.types import UserError, same_backbone

CPU = torch.device("cpu")
IDS = torch.randint(5, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
FAMILIES = ("llama", "gpt2", "bert")
KNOWN = ("test_autograd_registration", "test_faketensor")  # the other checks multiply fp8 numbers; torch cannot


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_backbone(tmp_path_factory.mktemp(family), family, hidden_size=64) for family in FAMILIES}


def load(folder, quantization="none", output="body", dtype="float32"):
    config = BackboneConfig(path=str(folder), dtype=dtype, quantization=quantization)
    return load_model(config, output, device=CPU, check=check_supported)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_row_has_the_range_of_fp8_whatever_its_size():
    x = random(4, 64) * torch.tensor([[1e-12], [1.0], [1e12], [0.0]])
    rounded, scale = to_fp8(x)
    assert rounded.dtype == E4M3
    assert (rounded[:3].float().abs().amax(dim=1) == 448).all()
    error = (rounded.float() * scale - x).norm(dim=1)
    assert (error[:3] < 0.04 * x[:3].norm(dim=1)).all()
    assert error[3] == 0


def test_rows_are_contiguous_as_the_gpus_products_need_them():
    for x in (torch.randn(16, 32).t(), torch.randn(4, 16, 8).transpose(0, 2)[:, 0], torch.randn(16, 1).expand(16, 32)):
        rows, scale = to_fp8(x)
        assert rows.is_contiguous()
        assert torch.equal(rows.float(), (x / scale).to(rows.dtype).float())


def test_the_products_are_torchs_own():
    """Products equal torch's own, which are only the specification: on a CPU they take a thousand times as long."""
    layer = Fp8Linear(random(48, 32, seed=1), None)
    for inputs, weight, scale, product in (
        (random(6, 32), layer.weight.t(), layer.scale[None], lambda a, s: (a, s, layer.weight, layer.scale)),
        (random(6, 48), layer.weight, torch.ones(1, 32), lambda a, s: (a, s, layer.weight)),
    ):
        rows, row_scale = to_fp8(inputs)
        want = torch._scaled_mm(rows, weight, scale_a=row_scale, scale_b=scale, out_dtype=torch.bfloat16)
        name = torch.ops.ptd.fp8_linear if weight is not layer.weight else torch.ops.ptd.fp8_linear_input
        torch.testing.assert_close(name(*product(rows, row_scale)), want, rtol=2**-8, atol=0.02)


def test_the_operators_are_described_to_compilers_as_they_are():
    layer = Fp8Linear(random(48, 32, seed=1), None)
    rows, row_scale = to_fp8(random(6, 32))
    torch.library.opcheck(torch.ops.ptd.fp8_linear, (rows, row_scale, layer.weight, layer.scale), test_utils=KNOWN)
    back, back_scale = to_fp8(random(6, 48))
    torch.library.opcheck(torch.ops.ptd.fp8_linear_input, (back, back_scale, layer.weight), test_utils=KNOWN)


def test_the_gradient_is_that_of_the_rounded_weights():
    """The gradient is right for channels of very different sizes: backward sums along the axis of the weight scales."""
    weight = random(48, 32, seed=1) * torch.logspace(-3, 3, 48)[:, None]
    layer, x, gradient = Fp8Linear(weight, random(48)), random(3, 5, 32).requires_grad_(), random(3, 5, 48, seed=2)
    (got,) = torch.autograd.grad(layer(x), x, gradient)
    want = gradient @ (layer.weight.float() * layer.scale[:, None])
    assert (got - want).norm() < 0.05 * want.norm()
    assert layer(x).dtype == got.dtype == torch.float32


def gradient(model):
    attachment = Attachment(model)
    torch.manual_seed(1)
    encoder = PrefixEncoder(attachment.shape.layers, 5)
    attachment.set(encoder.state(encoder()))
    with torch.no_grad():  # like an evaluation between steps
        model(input_ids=IDS)
    hidden = model(input_ids=IDS).last_hidden_state
    (hidden * random(*hidden.shape)).sum().backward()
    return encoder.embedding.grad.flatten()


def rounded_twin(folder, rounded):
    """Return the same model with the rounded weights in ordinary layers."""
    plain = load(folder)
    layers = dict(plain.named_modules())
    for name, module in rounded.named_modules():
        if isinstance(module, Fp8Linear):
            weight = module.weight.float() * module.scale[:, None]
            layers[name].weight.data.copy_(weight if isinstance(layers[name], torch.nn.Linear) else weight.T)
    return plain


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_rounded_and_gradients_pass(folders, family):
    rounded = load(folders[family], "fp8")
    assert not any(parameter.requires_grad for parameter in rounded.parameters())
    layers = [module for module in rounded.modules() if isinstance(module, Fp8Linear)]
    assert len(layers) == {"llama": 14, "gpt2": 8, "bert": 12}[family]
    assert {layer.weight.element_size() for layer in layers} == {1}
    # Random layers of 64 channels are as sensitive to the rounding of their inputs as layers can be.
    want = gradient(rounded_twin(folders[family], rounded))
    assert torch.cosine_similarity(gradient(rounded), want, dim=0) > 0.96


def test_the_prompts_gradient_is_that_of_a_trained_backbone():
    rows, _ = make_rows(train_rows=4)
    text = " ".join(f"{row['prompt']}\n{row['completion']}" for row in rows)
    ids = AutoTokenizer.from_pretrained(BACKBONE)(text, return_tensors="pt").input_ids
    found = []
    for kind in ("none", "fp8"):
        attachment = Attachment(load(BACKBONE, kind, "causal_lm", dtype="bfloat16"))
        torch.manual_seed(1)
        encoder = PrefixEncoder(attachment.shape.layers, 16)
        attachment.set(encoder.state(encoder()))
        attachment.model(input_ids=ids, labels=ids).loss.backward()
        found.append(encoder.embedding.grad.flatten())
    assert torch.cosine_similarity(*found, dim=0) > 0.99


def test_embeddings_and_output_layer_stay_as_they_are(folders):
    model = load(folders["llama"], "fp8", "causal_lm")
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight.dtype == model.get_input_embeddings().weight.dtype == model.dtype == torch.float32


def test_what_a_model_keeps_in_float32_stays_there(tmp_path):
    """T5's ``wo`` stays in float32, unquantised, because T5 casts to the dtype of the next weight."""
    folder = save_backbone(tmp_path, "t5")
    model, plain = load(folder, "fp8"), load(folder)
    kinds = {name.rpartition(".")[2]: type(module) for name, module in model.named_modules()}
    assert kinds["wo"] is torch.nn.Linear
    assert kinds["q"] is Fp8Linear
    got, want = model(input_ids=IDS).last_hidden_state, plain(input_ids=IDS).last_hidden_state
    assert (got - want).norm() < 0.2 * want.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backbone_in_fp8_is_recognised(folders, family, tmp_path):
    prints = [fingerprint(load(folders[family], kind)) for kind in ("none", "fp8")]
    assert same_backbone(*prints)
    other = save_backbone(tmp_path, family, seed=1, hidden_size=64)
    assert not any(same_backbone(fingerprint(load(other, kind)), one) for kind in ("none", "fp8") for one in prints)


def test_trained_in_fp8_and_used_in_many_bits(folders, check_carried_over):
    backbone = {"path": str(folders["llama"]), "quantization": "fp8", "gradient_checkpointing": True}
    check_carried_over(backbone, near=0.05)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # from inductor and dynamo
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_torch_compile_keeps_the_result():
    layer, x, gradient = Fp8Linear(random(48, 32, seed=1), None), random(5, 32).requires_grad_(), random(5, 48)
    compiled = torch.compile(layer, dynamic=True)
    for run in (layer, compiled):
        output = run(x)
        (back,) = torch.autograd.grad(output, x, gradient)
        if run is layer:
            want = output.detach(), back
    torch.testing.assert_close((output.detach(), back), want)


def test_what_cannot_run_in_fp8_is_refused(folders, tmp_path, monkeypatch):
    backbone = {"path": "x", "quantization": "fp8", "sharding": "world"}
    with pytest.raises(UserError, match="fp8 weights cannot be sharded"):
        parse_config({"backbone": backbone, "method": {"name": "prefix"}, "data": {}})
    with pytest.raises(UserError, match=r"no linear layer whose sides are multiples of 16"):
        load(save_backbone(tmp_path, "llama", hidden_size=40, intermediate_size=40), "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=r"capability 8\.9 or higher .*, but this GPU is NVIDIA A100"):
        check_device(torch.device("cuda"))
