"""Lion (Chen et al. 2023, *Symbolic Discovery of Optimization Algorithms*, arXiv:2302.06675, Algorithm 2).

torch has no Lion. bitsandbytes (0.50) has one, but its fp32 CUDA kernel adds the weight decay to the gradient, while
the paper and bitsandbytes' own CPU kernel shrink the parameter; DeepSpeed compiles its kernels on the user's machine.
The update is elementwise, so a few torch operations on each rank's part of a parameter are the whole algorithm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptd.engine.own_part import own_gradient, own_part, slices

STATE_BYTES = 4
"""Bytes of state per trained number."""
RATE = 1 / 2
"""Lion's learning rate per ``train.learning_rate``, which is AdamW's.

AdamW's update of a number is at most about its rate, Lion's is exactly its rate (benchmarks/README.md).
"""


class Lion(torch.optim.Optimizer):
    """Lion: the update of every number has the size of the learning rate. One fp32 number of state per number.

    With gradient g, moment m, learning rate η and weight decay λ, a step computes θ ← θ − η (sign(β₁ m + (1−β₁) g) +
    λ θ) and then m ← β₂ m + (1−β₂) g.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state before the first step: ``exp_avg``, the moment m, of the shape of the parameter."""
        return {"exp_avg": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            rate, (beta1, beta2) = group["lr"], group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(self.new_state(parameter))
                own, moment = own_part(parameter).view(-1), own_part(state["exp_avg"]).view(-1)
                gradient = own_gradient(parameter).reshape(-1)
                for part in slices(own):
                    direction = torch.lerp(moment[part], gradient[part], 1 - beta1).sign_()
                    own[part].mul_(1 - rate * group["weight_decay"]).sub_(direction, alpha=rate)
                    moment[part].lerp_(gradient[part], 1 - beta2)
