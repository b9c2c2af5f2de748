"""Liger's kernels compute the same as transformers' code, and only the model that uses them is changed.

Without a GPU, they run in Triton's interpreter: the first test runs this file again with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import VOCAB, save_backbone, tiny_model

from ptd.backbone import load_model
from ptd.backbone.liger import FAMILIES, check_liger, use_liger
from ptd.config import BackboneConfig, parse_config
from ptd.inject import Attachment, check_supported
from ptd.methods.prefix import PrefixEncoder
from ptd.types import UserError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("liger_kernel") is not None
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
runs = pytest.mark.skipif(
    not INSTALLED or (not INTERPRETED and DEVICE.type == "cpu"), reason="needs Liger, and a GPU or the interpreter"
)
LENGTHS = (7, 1, 9)


@pytest.mark.skipif(INTERPRETED or not INSTALLED or DEVICE.type == "cuda", reason="for a machine without a GPU")
def test_in_the_interpreter():
    path = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", path.name, "-k", "computes or stays"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=path.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    assert f"{2 * len(FAMILIES) + 1} passed" in done.stdout


def results(model, packed):
    """Return the logits and the prompt's gradient, for padded rows or for the same rows packed."""
    attachment = Attachment(model)
    torch.manual_seed(1)
    encoder = PrefixEncoder(attachment.shape.layers, 3).to(DEVICE)
    attachment.set(encoder.state(encoder()))
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, VOCAB, (length,), generator=draw).to(DEVICE) for length in LENGTHS]
    if packed:
        ends = torch.tensor((0, *LENGTHS), device=DEVICE).cumsum(0).int()
        bounds = {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(LENGTHS),
            "max_length_k": max(LENGTHS),
        }
        positions = torch.cat([torch.arange(length, device=DEVICE) for length in LENGTHS])[None]
        output = model(input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False, **bounds)
        hidden = output.logits[0]
    else:
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(max(LENGTHS), device=DEVICE) < torch.tensor(LENGTHS, device=DEVICE)[:, None]
        hidden = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[mask]
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    (hidden * weight).sum().backward()
    attachment.remove()
    return hidden.detach(), encoder.embedding.grad


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
        norm, activation = (importlib.import_module(f"liger_kernel.ops.{name}") for name in ("rms_norm", "geglu"))
        monkeypatch.setattr(norm, "rsqrt", lambda x: tl.rsqrt(x))
        monkeypatch.setattr(activation, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


@runs
@pytest.mark.usefixtures("interpretable")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_transformers_does(family, packed):
    plain, own = (tiny_model(family).to(DEVICE).eval().requires_grad_(False) for _ in range(2))
    own.load_state_dict(plain.state_dict())
    use_liger(own)
    for module in own.modules():
        if INTERPRETED and hasattr(module, "offset"):
            module.variance_epsilon, module.offset = Scalar(module.variance_epsilon), Scalar(module.offset)
    called = {name for name, module in own.named_modules() if "forward" in vars(module)}
    assert {name.rpartition(".")[2] for name in called} >= {"self_attn", "mlp", "norm", "input_layernorm"}
    for got, want in zip(results(own, packed), results(plain, packed), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


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
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"backbone\.liger: Liger is not installed; pip install 'ptd\[gpu\]'"):
        check_liger("llama", DEVICE)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match="need a GPU"):
        check_liger("llama", torch.device("cpu"))
    with pytest.raises(
        UserError, match="gpt2 is not among the families that ptd runs with Liger: gemma2, gemma3_text, llama"
    ):
        check_liger("gpt2", torch.device("cuda"))
    section = {"path": "x", "liger": True, "compile": True}
    with pytest.raises(UserError, match=r"liger: torch\.compile fuses the same"):
        parse_config({"backbone": section, "method": {"name": "prefix"}, "data": {}})
