"""The optimizers of ``train.optimizer``, compared with the papers in fp64 and with torch's and bitsandbytes' own.

worker_optimizers.py measures on two ranks, which share a wide layer.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from ptd.engine import own_part
from ptd.engine.adamw_8bit import AdamW8bit
from ptd.engine.lion import RATE, Lion
from ptd.engine.optimizers import OPTIMIZERS
from ptd.engine.prompt_step import Trained, build_optimizer
from ptd.methods.prefix import PrefixEncoder
from ptd.readouts.language_model import LanguageModel
from ptd.types import LayerShape, UserError

SHAPES = ((41, 301), (64,), (3, 1000, 7))
STEPS = 12
SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.97), "weight_decay": 0.3}


def parameters() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(4)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]


def gradients(decades: float = 3.0) -> list[list[Tensor]]:
    """Return the gradients of each step; their size changes by so many decades over the steps and along a tensor."""
    draw = torch.Generator().manual_seed(5)
    found = []
    for index in range(STEPS):
        sizes = [torch.logspace(0, decades, shape[-1]) * 10 ** (-index * decades / STEPS) for shape in SHAPES]
        found.append([size * torch.randn(shape, generator=draw) for size, shape in zip(sizes, SHAPES, strict=True)])
    return found


def run(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], steps: list[list[Tensor]]) -> None:
    for each in steps:
        for parameter, gradient in zip(trained, each, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


# ---- Lion


def test_lion_takes_the_steps_of_the_paper() -> None:
    """Chen et al. 2023, Algorithm 2, in fp64; the rate changes from step to step as a schedule changes it."""
    ours, paper = parameters(), [parameter.detach().double() for parameter in parameters()]
    moments = [torch.zeros_like(parameter) for parameter in paper]
    optimizer = Lion([{"params": ours[:1], "lr": 0.02}, {"params": ours[1:], "lr": 0.02}], **SETTINGS)
    (beta1, beta2), decay = SETTINGS["betas"], SETTINGS["weight_decay"]
    for index, step in enumerate(gradients()):
        rates = [0.02 / (index + 1), 0.5 * 0.02 / (index + 1), 0.5 * 0.02 / (index + 1)]
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        run(optimizer, ours, [step])
        for number, (gradient, rate) in enumerate(zip(step, rates, strict=True)):
            g, m, x = gradient.double(), moments[number], paper[number]
            c = beta1 * m + (1 - beta1) * g
            paper[number] = x - rate * (torch.sign(c) + decay * x)
            moments[number] = beta2 * m + (1 - beta2) * g
        for parameter, expected, moment in zip(ours, paper, moments, strict=True):
            torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(optimizer.state[parameter]["exp_avg"].double(), moment, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("slice_", [own_part.SLICE, 100])
def test_lion_equals_that_of_bitsandbytes_on_a_cpu(monkeypatch: pytest.MonkeyPatch, slice_: int) -> None:
    monkeypatch.setattr(own_part, "SLICE", slice_)
    ours, theirs = parameters(), parameters()
    run(Lion(ours, **SETTINGS), ours, gradients())
    run(bitsandbytes.optim.Lion(theirs, **SETTINGS), theirs, gradients())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_lions_rate_is_a_fixed_part_of_that_of_the_run() -> None:
    """One ``train.learning_rate`` serves every optimizer; only the factor differs, the same in every group."""
    encoder = PrefixEncoder([LayerShape(2, 8, 8)] * 2, 5, embedding_size=12, encoder_hidden_size=16)
    trained = Trained(encoder, LanguageModel())
    given: dict[str, Any] = {"learning_rate": 0.05, "betas": (0.9, 0.99), "epsilon": 1e-8, "weight_decay": 0.0}
    adamw, eight, lion = (build_optimizer(trained, name, **given).param_groups for name in OPTIMIZERS)
    assert [group["scale"] for group in eight] == [group["scale"] for group in adamw]
    assert [group["scale"] for group in lion] == [RATE * group["scale"] for group in adamw]
    assert all(group["lr"] == 0.05 * group["scale"] for group in (*adamw, *eight, *lion))


# ---- AdamW


@pytest.mark.parametrize("first", [True, False], ids=["state made by ptd", "state made by torch"])
def test_adamw_is_torchs_bit_for_bit(first: bool) -> None:
    encoder = PrefixEncoder([LayerShape(2, 8, 8)] * 2, 5, embedding_size=12, encoder_hidden_size=16)
    trained = Trained(encoder, LanguageModel())
    optimizer = build_optimizer(trained, learning_rate=0.02, betas=(0.9, 0.97), epsilon=1e-8, weight_decay=0.3)
    ours = list(encoder.parameters())
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    reference = torch.optim.AdamW(theirs, eps=1e-8, foreach=True, **SETTINGS)
    if first:
        for parameter in ours:
            optimizer.state[parameter].update(optimizer.new_state(parameter))
    draw = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        step = [torch.randn(parameter.shape, generator=draw) for parameter in ours]
        run(optimizer, ours, [step])
        run(reference, theirs, [step])
    for one, other in zip(ours, theirs, strict=True):
        assert one.equal(other)
        assert optimizer.state[one].keys() == reference.state[other].keys()
        assert all(value.equal(reference.state[other][name]) for name, value in optimizer.state[one].items())


# ---- AdamW with 8-bit moments


@pytest.mark.parametrize("slice_", [own_part.SLICE, 256, 5 * 256])
def test_8_bit_adamw_equals_bitsandbytes_bit_for_bit(monkeypatch: pytest.MonkeyPatch, slice_: int) -> None:
    monkeypatch.setattr(own_part, "SLICE", slice_)
    ours, theirs = parameters(), parameters()
    optimizer = AdamW8bit(ours, eps=1e-8, **SETTINGS)
    reference = bitsandbytes.optim.AdamW8bit(theirs, eps=1e-8, **SETTINGS)
    run(optimizer, ours, gradients())
    run(reference, theirs, gradients())
    for one, other in zip(ours, theirs, strict=True):
        assert one.equal(other)
        own, their = optimizer.state[one], reference.state[other]
        assert own["exp_avg"].equal(their["state1"])
        assert own["exp_avg_sq"].equal(their["state2"])
        assert own["exp_avg"].dtype == (torch.float32 if one.numel() < 4096 else torch.uint8)
        if one.numel() >= 4096:
            assert own["exp_avg_absmax"].flatten().equal(their["absmax1"])
            assert own["exp_avg_sq_absmax"].flatten().equal(their["absmax2"])
            assert own["exp_avg_table"].equal(their["qmap1"])
            assert own["exp_avg_sq_table"].equal(their["qmap2"])


def test_8_bit_adamw_is_near_adamw() -> None:
    """Against AdamW by hand in fp64, with gradients of similar sizes: the updates differ by the moments' rounding."""
    ours = parameters()
    paper = [parameter.detach().double() for parameter in parameters()]
    first, second = ([torch.zeros_like(parameter) for parameter in paper] for _ in range(2))
    rate, (beta1, beta2), decay = SETTINGS["lr"], SETTINGS["betas"], SETTINGS["weight_decay"]
    for index, step in enumerate(gradients(0.3), start=1):
        for number, gradient in enumerate(step):
            g = gradient.double()
            first[number] = beta1 * first[number] + (1 - beta1) * g
            second[number] = beta2 * second[number] + (1 - beta2) * g * g
            m, v = first[number] / (1 - beta1**index), second[number] / (1 - beta2**index)
            paper[number] = (1 - rate * decay) * paper[number] - rate * m / (v.sqrt() + 1e-8)
    run(AdamW8bit(ours, eps=1e-8, **SETTINGS), ours, gradients(0.3))
    for number, (start, end, expected) in enumerate(zip(parameters(), ours, paper, strict=True)):
        change, right = end.detach().double() - start.detach().double(), expected - start.detach().double()
        error = float((change - right).norm() / right.norm())
        low, high = (0.0, 1e-5) if SHAPES[number] == (64,) else (1e-4, 0.1)  # small parameters have fp32 moments
        assert low < error < high


# ---- state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bytes_of_the_state(name: str) -> None:
    """`bytes_to_write` and `ptd plan` count with ``state_bytes``; real tensors decide."""
    encoder = PrefixEncoder([LayerShape(4, 32, 32)] * 2, 5, embedding_size=64, encoder_hidden_size=512)
    trained = Trained(encoder, LanguageModel())
    optimizer = build_optimizer(trained, name, learning_rate=0.01, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.0)
    states = [optimizer.new_state(parameter) for parameter in encoder.parameters()]
    held = sum(tensor.nbytes for state in states for tensor in state.values())
    assert held == pytest.approx(OPTIMIZERS[name].state_bytes * trained.count(), rel=0.03)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_a_gradient_does_not_change(name: str) -> None:
    encoder = PrefixEncoder([LayerShape(2, 8, 8)] * 2, 5, embedding_size=12, encoder_hidden_size=512)
    optimizer = build_optimizer(
        Trained(encoder, LanguageModel()), name, learning_rate=0.1, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.5
    )
    before = [parameter.detach().clone() for parameter in encoder.parameters()]
    given, *others = encoder.parameters()
    given.grad = torch.ones_like(given)
    optimizer.step()
    assert not given.equal(before[0])
    assert all(parameter.equal(value) for parameter, value in zip(others, before[1:], strict=True))


# ---- refusals


def test_8_bit_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name))
    with pytest.raises(UserError, match=r"adamw_8bit needs bitsandbytes, which is not installed; pip install 'ptd\[qu"):
        OPTIMIZERS["adamw_8bit"].check("cpu")
    OPTIMIZERS["adamw"].check("cpu")
    OPTIMIZERS["lion"].check("cpu")


def test_8_bit_on_a_device_without_its_kernels() -> None:
    OPTIMIZERS["adamw_8bit"].check("cpu")
    with pytest.raises(UserError, match=r"kernel optimizer_update_8bit_blockwise for the device xpu, which bitsandb"):
        OPTIMIZERS["adamw_8bit"].check("xpu")


# ---- two ranks


@pytest.fixture(scope="module")
def measured(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    results = tmp_path_factory.mktemp("optimizers") / "results.json"
    launch(2, Path(__file__).with_name("worker_optimizers.py"), results)
    return dict(json.loads(results.read_text()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_layer_that_two_ranks_share(measured: dict[str, Any], name: str) -> None:
    """Each rank's part takes the steps of the same optimizer on that part alone, bit for bit."""
    assert measured[name]["split"] == ["transform.0.weight", "transform.0.bias", "transform.2.weight"]
    assert measured[name]["different from the part alone"] == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_of_two_ranks_continues_bit_for_bit(measured: dict[str, Any], name: str) -> None:
    # Five parameters; in 8 bits two of them are large and have absmax and tables in addition to step and two moments.
    assert measured[name]["tensors"] == 5 + {"adamw": 5 * 3, "adamw_8bit": 5 * 3 + 2 * 4, "lion": 5}[name]
    assert measured[name]["different after loading"] == []
    assert measured[name]["different after more steps"] == []


def test_8_bit_moments_of_two_ranks_are_not_resharded(measured: dict[str, Any]) -> None:
    for name in ("adamw", "lion"):
        assert measured[name]["refusals on another number of ranks"] == []
    refusals = measured["adamw_8bit"]["refusals on another number of ranks"]
    assert len(refusals) == 2
    for refusal in refusals:
        assert "in the shape [2, 12], but this run needs [1, 24]; with train.optimizer: adamw_8bit" in refusal
