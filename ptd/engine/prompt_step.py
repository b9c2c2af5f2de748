"""Reduce at the prompt: an exact optimizer step of the prompt encoder communicates only the prompt's gradient.

The encoder's input does not depend on data. So (1) the encoder runs once per step, and its detached output is the leaf;
(2) all micro-batches of all ranks accumulate gradients at the leaf; (3) the leaf's gradient is summed over the ranks
and divided by the global number of supervised tokens; (4) the encoder's backward pass runs once with that gradient.
Because the backward pass is linear, this equals ordinary data parallelism, whatever the size of the encoder.

A readout with its own parameters (a trained head) depends on the data. Its gradients are summed over the ranks
directly, in one flat buffer.

Several prompts may be trained at once, each with its own `PromptStep`. Their backward passes end at different leaves,
so nothing mixes; `finish_step` only sends their sums and gradients over the network together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ptd.async_copy import AsyncHostCopy, together
from ptd.checkpoint.run_state import ResumableOptimizer, state_tensors
from ptd.distributed.network_meter import NetworkMeter
from ptd.distributed.ranks import Ranks
from ptd.engine.loss_scale import LossScale
from ptd.engine.optimizers import OPTIMIZERS
from ptd.engine.phases import PhaseClock
from ptd.readouts import Reading, Readout
from ptd.types import Batch, PromptEncoder, PromptState


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step over all ranks. ``loss`` is the mean over all predictions.

    ``loss_scale``: the loss scale of this step, if any; ``overflow``: the step was skipped because the loss scale was
    too high, and the scale was lowered for the next step. ``stop``: a rank was asked to stop.
    """

    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    skipped: bool
    loss_scale: float | None = None
    overflow: bool = False
    stop: bool = False


@dataclass
class StepSums:
    """The sums of one step over the micro-batches of this rank.

    ``loss``: fp64 scalar, without the loss scale; the mean loss of a step is its sum over all ranks divided by the sum
    of their ``weight``. ``stop``: whether this rank was asked to stop.
    """

    loss: Tensor
    weight: Tensor | float = 0.0
    tokens: int = 0
    supervised_tokens: int = 0
    stop: bool = False

    @staticmethod
    def zero(device: torch.device) -> StepSums:
        return StepSums(torch.zeros((), dtype=torch.float64, device=device))

    def tensor(self) -> Tensor:
        """Return the fields in order, fp64 ``[5]``."""
        return together([self.loss, self.weight, self.tokens, self.supervised_tokens, self.stop], self.loss.device)

    def add(self, reading: Reading, batch: Batch) -> None:
        """Add a micro-batch."""
        weight = reading.weight
        self.loss += reading.loss.detach()
        self.weight = self.weight + (weight.detach().double() if isinstance(weight, Tensor) else weight)
        self.tokens += batch.tokens
        self.supervised_tokens += batch.supervised_tokens


class PendingResult:
    """The result of a step that a GPU may not have finished yet."""

    def __init__(self, numbers: Tensor, scaled: bool) -> None:
        self._numbers, self._scaled = AsyncHostCopy(numbers), scaled

    def read(self) -> StepResult:
        """Wait for this step, but not for work queued after it, and return its result."""
        loss, norm, tokens, supervised, stop, finite, scale, overflow = self._numbers.read()
        used = scale if self._scaled else None
        return StepResult(
            loss, norm, int(tokens), int(supervised), not finite, used, overflow=bool(overflow), stop=bool(stop)
        )


class Trained(nn.Module):
    """All trained modules: the prompt encoder, and the readout if it has parameters."""

    def __init__(
        self, encoder: PromptEncoder, readout: Readout, readout_rates: Mapping[str, float] | None = None
    ) -> None:
        """``readout_rates``: factors of the learning rate by name of a readout parameter; 1 if missing."""
        super().__init__()
        self.encoder, self.readout = encoder, readout
        self.readout_rates = dict(readout_rates or {})

    @property
    def units(self) -> bool:
        """Whether training uses the units of the backbone, with learning rates that do not depend on widths."""
        return self.encoder.units is not None or bool(self.readout_rates)

    def count(self) -> int:
        """Return the number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


class PromptStep:
    """The trained modules, their optimizer, and the reduction over ranks.

    Usage: ``state = step.encode()``; run micro-batches with ``state``, each ``step.loss_scale.apply(loss).backward()``
    with a summed loss; ``finish_step([step], [sums])``. The steps of several prompts of a run share ``ranks``,
    ``meter`` and ``clock``; the clock is told which of the `ptd.engine.phases.PHASES` begins.

    On a GPU no method here makes the host wait with fused AdamW: it decides on the GPU whether a step is skipped, and
    the result is read later. With another optimizer, `finish_step` waits once for that decision.
    """

    def __init__(
        self,
        trained: Trained,
        optimizer: ResumableOptimizer,
        ranks: Ranks,
        meter: NetworkMeter,
        max_grad_norm: float,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.trained, self.optimizer, self.ranks, self.meter = trained, optimizer, ranks, meter
        self.encoder, self.readout = trained.encoder, trained.readout
        self.max_grad_norm = max_grad_norm
        self.loss_scale = (loss_scale or LossScale.none()).to(ranks.device)
        self.clock = PhaseClock(ranks.device)
        self._flat: Tensor | None = None
        self._leaf: PromptState | None = None

    def flat(self) -> Tensor:
        """Return the encoder's output. A layer that is split over ranks returns an asynchronous tensor; the copy waits
        for it."""
        flat = self.encoder()
        return flat if isinstance(flat, nn.Parameter) else flat.clone()

    @torch.no_grad()
    def state(self) -> PromptState:
        """Return the current prompt without a gradient. Every rank calls this together."""
        return self.encoder.state(self.flat())

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a resumed run needs, by name, to be saved or loaded in place."""
        return state_tensors(self.trained, self.optimizer) | self.loss_scale.tensors()

    def encode(self) -> PromptState:
        """Run the encoder; return the leaf, at which the micro-batches accumulate their gradients."""
        with self.meter:
            self._flat = self.flat()
        self._leaf = self.encoder.state(self._flat.detach())
        for tensor in self._leaf.tensors():
            tensor.requires_grad_()
        return self._leaf

    def backward(self, gradient: Tensor, divisor: Tensor) -> None:
        """Run the encoder's backward pass, with the ``gradient`` of its flat output summed over all ranks."""
        assert self._flat is not None
        self._flat.backward(gradient.div_(divisor).to(self._flat.dtype))

    def update(self, totals: Tensor) -> PendingResult:
        """Clip and step, with the gradients of all ranks. ``totals``: the fields of `StepSums` summed over all ranks.

        All ranks skip the step if its loss or gradient is not finite.
        """
        loss, scale = totals[0] / totals[1], self.loss_scale.now()
        norm = self._grad_norm()
        finite, finite_loss = norm.isfinite(), loss.isfinite()
        # ``loss`` is the loss before scaling: if it is not finite, that says nothing about the loss scale.
        overflow = self.loss_scale.update(finite=finite, known=finite_loss)
        finite = finite & finite_loss
        self._step(norm, finite)
        self.optimizer.zero_grad(set_to_none=True)
        self._flat = self._leaf = None
        numbers = torch.stack([x.double() for x in (loss, norm, *totals[2:].unbind(), finite, scale, overflow)])
        return PendingResult(numbers, self.loss_scale.used)

    @property
    def trains_a_prompt(self) -> bool:
        """Whether the flat output that `encode` computed needs a gradient."""
        return self._flat is not None and self._flat.requires_grad

    def _step(self, norm: Tensor, finite: Tensor) -> None:
        """Clip to ``max_grad_norm`` and step if ``finite``; otherwise leave parameters and moments unchanged."""
        counts = finite.float()
        # The fused kernels read the decision from a device tensor, as they do for GradScaler.
        on_device = all(group.get("fused") for group in self.optimizer.param_groups)
        if not on_device and not float(counts):
            return
        if self.max_grad_norm > 0:
            self._scale(torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0))
        if on_device:
            self.optimizer.found_inf = 1 - counts  # type: ignore[attr-defined]
        self.optimizer.step()

    def head_gradient(self) -> Tensor | None:
        """Return the gradient of all parameters of the readout, in one flat tensor; None if it has none."""
        parameters = list(self.readout.parameters())
        if not parameters:
            return None
        flat = torch.zeros(sum(parameter.numel() for parameter in parameters), device=parameters[0].device)
        for part, parameter in zip(flat.split([each.numel() for each in parameters]), parameters, strict=True):
            if parameter.grad is not None:
                part.copy_(parameter.grad.flatten())
        return flat

    def set_head_gradient(self, flat: Tensor, divisor: Tensor) -> None:
        """Give the parameters of the readout the gradient ``flat``, summed over all ranks, divided by ``divisor``."""
        parameters = list(self.readout.parameters())
        parts = flat.div_(divisor).split([parameter.numel() for parameter in parameters])
        for part, parameter in zip(parts, parameters, strict=True):
            parameter.grad = part.view_as(parameter)

    def leaf_gradient(self) -> Tensor:
        """Return the gradient that the micro-batches accumulated at the leaf, as one flat fp32 tensor."""
        assert self._flat is not None
        assert self._leaf is not None
        gradient = torch.zeros_like(self._flat, dtype=torch.float32)
        for view, tensor in zip(self.encoder.state(gradient).tensors(), self._leaf.tensors(), strict=True):
            if tensor.grad is not None:
                view.copy_(tensor.grad)
        return gradient

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.trained.parameters() if parameter.grad is not None]

    def _grad_norm(self) -> Tensor:
        """Return the 2-norm of all gradients, the same on every rank."""
        squares = []
        for split in (True, False):
            part = [gradient for gradient in self._gradients() if isinstance(gradient, DTensor) is split]
            if part:
                norm = nn.utils.get_total_norm(part)
                squares.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).square())
        return torch.stack(squares).sum().sqrt()

    def _scale(self, factor: Tensor) -> None:
        for gradient in self._gradients():
            gradient.mul_(factor)


def finish_step(steps: Sequence[PromptStep], sums: Sequence[StepSums]) -> list[PendingResult]:
    """End a step of one or several prompts: reduce, run the encoders' backward passes, clip and update each.

    The prompts of a step share their collectives, so their number does not change how many messages there are. Every
    prompt is divided by the weight of its own rows, clipped by its own norm, and skipped by itself if its loss or
    gradient is not finite.
    """
    ranks, meter, clock = steps[0].ranks, steps[0].meter, steps[0].clock
    clock.begin("reduce")
    with meter:
        totals = ranks.all_reduce(torch.stack([each.tensor() for each in sums]))
        divisors = [total[1] * step.loss_scale.now() for total, step in zip(totals, steps, strict=True)]
        prompts = [index for index, step in enumerate(steps) if step.trains_a_prompt]
        gradients = _summed([steps[index].leaf_gradient() for index in prompts], ranks)
        clock.begin("encoder")
        for index, gradient in zip(prompts, gradients, strict=True):
            steps[index].backward(gradient, divisors[index])
        clock.begin("reduce")
        found = {index: each for index, step in enumerate(steps) if (each := step.head_gradient()) is not None}
        for index, gradient in zip(found, _summed(list(found.values()), ranks), strict=True):
            steps[index].set_head_gradient(gradient, divisors[index])
        clock.begin("optimizer")
        return [step.update(total) for step, total in zip(steps, totals, strict=True)]


def _summed(tensors: list[Tensor], ranks: Ranks) -> list[Tensor]:
    """Return the tensors summed over all ranks, in one collective."""
    if len(tensors) == 1 or ranks.world_size == 1:
        return [ranks.all_reduce(tensor) for tensor in tensors]
    if not tensors:
        return []
    flat = ranks.all_reduce(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def build_optimizer(
    trained: Trained,
    name: str = "adamw",
    *,
    learning_rate: float,
    head_learning_rate: float | None = None,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> ResumableOptimizer:
    """Return the optimizer ``name`` with one group per factor of the learning rate (`PromptEncoder.rates`).

    Split (DTensor) and whole parameters are in separate groups, because foreach kernels cannot mix them. The schedule's
    learning rate is multiplied by the ``scale`` of a group, which includes the optimizer's own factor. ``epsilon`` has
    no effect on Lion. Raises `UserError` if ``name`` needs a package that is not installed.
    """
    offered = OPTIMIZERS[name]
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    parts: list[tuple[nn.Module, Mapping[str, float], float]] = [
        (trained.encoder, trained.encoder.rates(), 1.0),
        (trained.readout, trained.readout_rates, (head_learning_rate or learning_rate) / learning_rate),
    ]
    for module, rates, share in parts:
        for key, parameter in module.named_parameters():
            if parameter.requires_grad:
                group = isinstance(parameter, DTensor), offered.rate * share * rates.get(key, 1.0)
                groups.setdefault(group, []).append(parameter)
    # If nothing is trained, one empty group remains, because an optimizer requires one.
    used = groups or {(False, 1.0): []}
    given = [{"params": found, "lr": learning_rate * scale, "scale": scale} for (_, scale), found in used.items()]
    on_gpu = any(parameter.device.type == "cuda" for parameter in trained.parameters())
    settings = {"lr": learning_rate, "betas": betas, "epsilon": epsilon, "weight_decay": weight_decay}
    return offered.build(given, on_gpu=on_gpu, **settings)
