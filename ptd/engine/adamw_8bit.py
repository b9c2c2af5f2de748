"""AdamW with moments in 8 bits: bitsandbytes' block-wise kernels (Dettmers et al. 2022, arXiv:2110.02861).

A block is `BLOCK` consecutive numbers of a parameter's part on one rank. For each block, the state holds the largest
magnitude (``absmax``); for each number, a byte, which is an index into a table of 256 values between −1 and 1 (0 and 1
for the second moment). A moment is the product of both.

``bitsandbytes.optim.AdamW8bit`` computes the same values. It cannot be used itself: it does not know parameters that
are split over ranks (DTensor), it counts its steps in a Python integer, which a checkpoint cannot load in place, and
its CUDA kernels take the number of elements as a 32-bit integer, which overflows at 2³¹ numbers.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from ptd.engine.own_part import own_gradient, own_part, slices
from ptd.types import UserError

BLOCK = 256
"""Numbers per block, fixed in bitsandbytes' kernels."""
SMALLEST = 4096
"""Parameters with fewer numbers (biases, for example) have fp32 moments, as in bitsandbytes."""
STATE_BYTES = 2 + 2 * 4 / BLOCK
"""Bytes of state per number of a large parameter."""
KERNELS = ("optimizer_update_8bit_blockwise", "optimizer_update_32bit")
MOMENTS = ("exp_avg", "exp_avg_sq")


def check(device: str | None) -> None:
    """Raise `UserError` unless bitsandbytes is installed and has the kernels for this type of device.

    None: check for no device, for a trace without data. bitsandbytes has the kernels for CPUs since version 0.50.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "train.optimizer: adamw_8bit needs bitsandbytes, which is not installed; pip install 'ptd[quant]', or set "
            "train.optimizer: adamw"
        )
    import bitsandbytes

    for name in KERNELS if device is not None else ():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"bitsandbytes::{name}", str(device).upper()):
            raise UserError(
                f"train.optimizer: adamw_8bit needs bitsandbytes' kernel {name} for the device {device}, which "
                f"bitsandbytes {bitsandbytes.__version__} does not have; install a newer bitsandbytes, or set "
                "train.optimizer: adamw"
            )
    tables()


@cache
def tables() -> tuple[Tensor, Tensor]:
    """Return bitsandbytes' tables for the first moment (signed) and for the second moment, ``[256]`` each in fp32."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=True), create_dynamic_map(signed=False)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments take one byte per number each, plus four bytes per block of `BLOCK` numbers."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state before the first step.

        ``step``: the number of steps, on the CPU. ``exp_avg`` and ``exp_avg_sq``: bytes of the shape of the parameter
        and split as it is; of a small parameter, the moments themselves in fp32. Otherwise also ``…_absmax``,
        ``[ranks, blocks]`` in fp32, a row for each rank that holds a part of the parameter, and ``…_table``, ``[256]``.
        """
        state = {"step": torch.zeros((), dtype=torch.float32)}
        small = parameter.numel() < SMALLEST
        for name, table in zip(MOMENTS, tables(), strict=True):
            state[name] = torch.zeros_like(parameter, dtype=torch.float32 if small else torch.uint8)
            if not small:
                state[f"{name}_absmax"] = _absmax(parameter)
                state[f"{name}_table"] = torch.empty(len(table), device=own_part(parameter).device).copy_(table)
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state.update(self.new_state(parameter))
                    state["step"] += 1
                    _update(parameter, state, group)


def _absmax(parameter: Tensor) -> Tensor:
    """Return zeros ``[ranks, blocks]``; of a split parameter, each rank holds its own row."""
    shards = 1
    if isinstance(parameter, DTensor) and not all(placement.is_replicate() for placement in parameter.placements):
        shards = parameter.device_mesh.size()
        (dimension,) = (placement.dim for placement in parameter.placements if isinstance(placement, Shard))
        largest = -(-parameter.shape[dimension] // shards) * (parameter.numel() // parameter.shape[dimension])
        own = torch.zeros(1, -(-largest // BLOCK), device=own_part(parameter).device)
        return DTensor.from_local(own, parameter.device_mesh, [Shard(0)], run_check=False)
    return torch.zeros(1, -(-parameter.numel() // BLOCK), device=own_part(parameter).device)


def _update(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """Run bitsandbytes' kernel on this rank's part of the parameter, slice by slice (a slice has whole blocks)."""
    from bitsandbytes.functional import optimizer_update_8bit_blockwise, optimizer_update_32bit

    step, (beta1, beta2) = int(state["step"]), group["betas"]
    rate, epsilon, decay = group["lr"], group["eps"], group["weight_decay"]
    values, gradient = own_part(parameter).view(-1), own_gradient(parameter).reshape(-1)
    first, second = (own_part(state[name]).view(-1) for name in MOMENTS)
    absmax = [own_part(state[f"{name}_absmax"]).view(-1) for name in MOMENTS if f"{name}_absmax" in state]
    for part in slices(values):
        g, p, m, v = gradient[part], values[part], first[part], second[part]
        if not absmax:
            optimizer_update_32bit("adam", g, p, m, beta1, epsilon, step, rate, v, beta2, weight_decay=decay)
            continue
        scales = [of_all[part.start // BLOCK : -(-part.stop // BLOCK)] for of_all in absmax]
        tables_used = (state[f"{name}_table"] for name in MOMENTS)
        optimizer_update_8bit_blockwise(
            "adam", g, p, m, v, beta1, beta2, 0.0, 0.0, epsilon, step, rate, *tables_used, *scales, weight_decay=decay
        )
