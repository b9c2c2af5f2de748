"""Liger's kernels compute the same as transformers' code, and only the model that uses them is changed.

Without a GPU, they run in Triton's interpreter: the first test runs this file again with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import VOCAB, save_backbone, tiny_model

from ptd.backbone import load_model
from ptd.backbone.fusion import choose_fusion
from ptd.backbone.liger import FAMILIES, check_liger, use_liger
from ptd.backbone.load import checkpoint_layers
from ptd.backbone.shared_input import share_inputs
from ptd.config import BackboneConfig, parse_config
from ptd.data.batches import packed_batch, padded_batch
from ptd.engine.forward import Forward
from ptd.inject import Attachment, check_supported
from ptd.methods.prefix import PrefixEncoder
from ptd.readouts import Ask
from ptd.types import IGNORE_INDEX, DataReport, Examples, SoftTokens, UserError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("liger_kernel") is not None
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
runs = pytest.mark.skipif(
    not INSTALLED or (not INTERPRETED and DEVICE.type == "cpu"), reason="needs Liger, and a GPU or the interpreter"
)
LENGTHS = (4, 1, 3)
VARIANTS = {"prefix, padded": (False, False, False), "soft tokens, packed, recomputed": (True, True, True)}
DTYPES = [torch.float32] if DEVICE.type == "cpu" else [torch.float32, torch.bfloat16]
"""The interpreter computes in fp32. In bf16, the error against transformers' fp32 is at most twice its own in bf16."""


@pytest.mark.skipif(INTERPRETED or not INSTALLED or DEVICE.type == "cuda", reason="for a machine without a GPU")
def test_in_the_interpreter():
    path = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", path.name, "-k", "computes or stays"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=path.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    assert f"{2 * len(FAMILIES) + 1} passed" in done.stdout


def results(model, soft, packed):
    """Return the logits that have a target, and the prompt's gradient."""
    attachment = Attachment(model)
    flat = torch.randn(2, attachment.shape.hidden_size, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    if soft:
        attachment.set(SoftTokens(flat.requires_grad_(), in_front=True))
    else:
        encoder = PrefixEncoder(attachment.shape.layers, 2).to(DEVICE)
        flat = flat.repeat(1, encoder().shape[1])[:, : encoder().shape[1]].contiguous()
        attachment.set(encoder.state(flat.requires_grad_()))
    batch = (packed_batch if packed else padded_batch)(examples(), np.arange(len(LENGTHS)))
    positions = (batch.labels.flatten() != IGNORE_INDEX).nonzero().flatten()
    logits = Forward(attachment, DEVICE)(batch, Ask(positions))
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)).sum().backward()
    attachment.remove()
    return logits.detach(), flat.grad


def examples():
    tokens = np.random.default_rng(0).integers(5, VOCAB, sum(LENGTHS)).astype(np.int32)
    offsets = np.cumsum([0, *LENGTHS])
    return Examples.of_text(tokens, np.arange(len(tokens)) % 3 > 0, offsets, DataReport(len(LENGTHS), len(tokens), 0))


class Scalar(float):
    """A Python number with Triton's ``to``: interpreted kernels get Python numbers where compiled ones get scalars."""

    def to(self, dtype):
        return self


@pytest.fixture
def interpretable(monkeypatch):
    """Replace the functions of CUDA's libdevice, which cannot be interpreted."""
    if INTERPRETED:
        from triton import language as tl

        swiglu = importlib.import_module("liger_kernel.ops.swiglu")
        monkeypatch.setattr(swiglu, "float", Scalar, raising=False)
        names = ("rms_norm", "fused_add_rms_norm", "geglu")
        norm, fused, activation = (importlib.import_module(f"liger_kernel.ops.{name}") for name in names)
        for module in (norm, fused):
            monkeypatch.setattr(module, "rsqrt", lambda x: tl.rsqrt(x))
        monkeypatch.setattr(activation, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


@runs
@pytest.mark.usefixtures("interpretable")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_transformers_does(family, variant, dtype):
    soft, packed, recomputed = VARIANTS[variant]
    plain, own, exact = (tiny_model(family).to(DEVICE).eval().requires_grad_(False) for _ in range(3))
    own, plain = own.to(dtype), plain.to(dtype)
    use_liger(own)
    assert share_inputs(own) == (0 if family == "phi3" else 2 * len(own.model.layers))
    if recomputed:
        checkpoint_layers(own)
    for module in own.modules():
        if INTERPRETED and hasattr(module, "offset"):
            module.variance_epsilon, module.offset = Scalar(module.variance_epsilon), Scalar(module.offset)
    called = {name.rpartition(".")[2] for name, module in own.named_modules() if "forward" in vars(module)}
    assert called >= {"self_attn", "mlp", "norm", "input_layernorm"}
    assert type(own.model.layers[0]).__mro__[1] is type(plain.model.layers[0]), (
        "the layers add to the residual themselves"
    )
    got, written_out, want = (results(model, soft, packed) for model in (own, plain, exact))
    for ours, theirs, right in zip(got, written_out, want, strict=True):
        error, allowed = (ours - right).abs().max(), (theirs - right).abs().max()
        assert error <= 2 * allowed + 1e-5 * right.abs().max()


@runs
def test_every_other_model_stays_as_it_is(tmp_path):
    before, code = tiny_model("llama"), sys.modules["transformers.models.llama.modeling_llama"]
    names = dict(vars(code))
    backbone = {"path": str(save_backbone(tmp_path)), "dtype": "float32", "liger": True}
    load_model(BackboneConfig(**backbone), device=DEVICE, check=check_supported)
    assert dict(vars(code)) == names
    for model in (before, tiny_model("llama")):
        assert not any("forward" in vars(module) for module in model.modules())


def test_where_it_cannot_run_it_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="need a GPU, but the backbone is on the CPU; set liger: false"):
        check_liger("llama", "cpu")
    with pytest.raises(
        UserError, match="gpt2 is not among the families that ptd runs with Liger: gemma2, gemma3_text, llama"
    ):
        check_liger("gpt2", "cuda")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.8.4")
    with pytest.raises(
        UserError, match=r"Liger 0\.8\.4 is installed, but ptd needs a release <0\.9,>=0\.8\.5; pip install"
    ):
        check_liger("llama", "cuda")
    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(UserError, match=r"backbone\.liger: Liger is not installed; pip install 'ptd\[gpu\]', or set"):
        check_liger("llama", "cuda")
    section = {"path": "x", "liger": True, "compile": True}
    with pytest.raises(UserError, match=r"liger: torch\.compile fuses the same"):
        parse_config({"backbone": section, "method": {"name": "prefix"}, "data": {}})


def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize("sharding", ["none", "world"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_auto_takes_it_on_a_gpu_in_every_placement(monkeypatch, quantization, sharding):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.8.5")
    config = BackboneConfig(path="x", quantization=quantization, sharding=sharding)
    for family in FAMILIES:
        assert choose_fusion(config, family, "cuda").by == "liger"
        assert choose_fusion(config, family, "cpu").by == "transformers"
    other = choose_fusion(config, "gpt2", "cuda")
    assert other.by == "transformers"
    assert "gpt2 is not among the families" in str(other)
    monkeypatch.setattr("importlib.metadata.version", missing)
    without = choose_fusion(config, "llama", "cuda")
    assert without.by == "transformers"
    assert str(without).endswith("transformers' own code: Liger is not installed; pip install 'ptd[gpu]'")


def test_what_the_run_file_says_goes_first(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.8.5")
    chosen = {
        (liger, compiled): choose_fusion(BackboneConfig(path="x", liger=liger, compile=compiled), "llama", "cuda").by
        for liger in ("auto", True, False)
        for compiled in ("auto", True, False)
        if not liger is compiled is True
    }
    want = {(liger, compiled): "liger" for liger in ("auto", True) for compiled in ("auto", False)}
    want |= {("auto", True): "compile", (False, True): "compile"}
    assert chosen == want | {(False, "auto"): "transformers", (False, False): "transformers"}
