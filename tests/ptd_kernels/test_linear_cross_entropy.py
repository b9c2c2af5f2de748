"""Compare the fused cross-entropy of a frozen output layer with torch's own, in fp64 and in the same precision.

PTD_TEST_DEVICE=cuda runs the tests on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import DEVICE
from ptd_kernels import linear_cross_entropy
from ptd_kernels.linear_cross_entropy.reference import reference

ROWS, WIDTH, VOCABULARY = 37, 24, 113


def inputs(dtype, scale=1.0):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=draw).to(DEVICE, dtype).requires_grad_()
    weight, bias = torch.randn(VOCABULARY, WIDTH, generator=draw) * scale, torch.randn(VOCABULARY, generator=draw)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=draw)
    return hidden, weight.to(DEVICE, dtype), bias.to(DEVICE, dtype), targets.to(DEVICE)


def exact(hidden, weight, bias, targets):
    wide = [None if x is None else x.detach().double() for x in (hidden, weight, bias)]
    wide[0].requires_grad_()
    losses = reference(*wide, targets)
    losses.backward(shares(losses))
    return losses.detach(), wide[0].grad


def shares(losses):
    """Return a different factor for the loss of each row, as several losses over one pass may have."""
    return torch.linspace(0.5, 2.0, len(losses)).to(losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_rows", [None, 1, 8, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_errs_no_more_than_torch(dtype, block_rows, with_bias):
    hidden, weight, bias, targets = inputs(dtype)
    bias = bias if with_bias else None
    want, want_gradient = exact(hidden, weight, bias, targets)
    errors = []
    for loss_of in (reference, lambda *given: linear_cross_entropy(*given, block_rows=block_rows)):
        hidden.grad = None
        losses = loss_of(hidden, weight, bias, targets)
        assert losses.dtype is torch.float32
        (losses * 3).backward(shares(losses))  # 3: a loss scale
        assert hidden.grad.dtype is dtype
        errors.append(
            ((losses - want).norm() / want.norm(), (hidden.grad / 3 - want_gradient).norm() / want_gradient.norm())
        )
    (loss_error, gradient_error), (own_loss_error, own_gradient_error) = errors
    assert own_loss_error <= 2 * loss_error + 1e-6
    assert own_gradient_error <= 2 * gradient_error + 1e-6


def test_a_target_of_no_probability_has_a_finite_loss():
    hidden, weight, _, targets = inputs(torch.float32, scale=500.0)
    want, want_gradient = exact(hidden, weight, None, targets)
    losses = linear_cross_entropy(hidden, weight, None, targets)
    losses.backward(shares(losses))
    assert (losses - want).norm() < 1e-5 * want.norm()
    assert (hidden.grad - want_gradient).norm() < 1e-5 * want_gradient.norm()


def test_without_gradients_nothing_is_kept_and_no_rows_are_no_loss():
    hidden, weight, bias, targets = inputs(torch.float32)
    with torch.no_grad():
        losses = linear_cross_entropy(hidden, weight, bias, targets)
    assert torch.allclose(losses, reference(hidden, weight, bias, targets))
    assert linear_cross_entropy(hidden[:0], weight, bias, targets[:0]).shape == (0,)


def test_what_it_cannot_do_is_refused():
    hidden, weight, bias, targets = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"not in torch\.float16"):
        linear_cross_entropy(hidden.half(), weight.half(), bias.half(), targets)
    with pytest.raises(ValueError, match="freeze them"):
        linear_cross_entropy(hidden, weight.requires_grad_(), bias, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_negative_target_has_no_part_in_it(dtype):
    hidden, weight, bias, targets = inputs(dtype)
    targets[::3] = -100
    left = targets >= 0
    every = linear_cross_entropy(hidden, weight, bias, targets, block_rows=8)
    every.sum().backward()
    gradient, hidden.grad = hidden.grad, None
    losses = linear_cross_entropy(hidden[left], weight, bias, targets[left])
    losses.sum().backward()
    assert (gradient[~left] == 0).all()
    rounding = 1e-6 if dtype is torch.float32 else 1e-2
    assert (gradient - hidden.grad).norm() <= rounding * gradient.norm()
    assert (every[~left] == 0).all()
    assert (every[left] - losses).norm() <= 1e-5 * losses.norm()
