"""Price the launches of a step on GPUs: a roofline over achieved rates, with a shortest time per launch.

A launch takes as long as its bytes at the bandwidth, its FLOPs at the rate of its kind, or `SHORTEST`, whichever is
longest. Launches run one after another, and the host is always ahead of the GPU.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from gpu_model_trace import PARTS, Launch, Step

SHORTEST = 3e-6
"""Seconds of the shortest kernel, back to back with others."""
ACCURACY = 0.15
"""Relative error that the prediction of a step may have. It is an estimate: no step has been measured."""


@dataclass(frozen=True)
class Gpu:
    """Published peaks (dense, FLOP/s and bytes/s), and the shares of the bf16 peak that FlashAttention-2 reaches."""

    bf16: float
    fp32: float
    memory: float
    flash_forward: float
    flash_backward: float

    def rates(self) -> dict[str, float]:
        """Return the achieved FLOP/s by `Launch.rate`, and the achieved bytes/s as ``memory``."""
        return {
            "bf16": BF16 * self.bf16,
            "fp32": FP32 * self.fp32,
            "memory": MEMORY * self.memory,
            "flash forward": self.flash_forward * self.bf16,
            "flash backward": self.flash_backward * self.bf16,
        }


BF16, FP32, MEMORY = 620 / 989, 45 / 67, 2.7 / 3.35
"""Achieved shares of the peaks, the same for all GPUs: 620 TFLOP/s in bf16, 45 TFLOP/s in fp32 and 2.7 TB/s on an H100,
as large products and elementwise kernels commonly reach there."""
GPUS = {
    "H100": Gpu(989e12, 67e12, 3.35e12, 0.33, 0.27),
    "H200": Gpu(989e12, 67e12, 4.8e12, 0.33, 0.27),
    "A100": Gpu(312e12, 19.5e12, 2.04e12, 0.5, 0.4),
}
"""The SXM versions with 80 GB (H200: 141 GB), by NVIDIA's data sheets. FlashAttention-2 was written for the A100, where
it reaches 50 to 73 % of the peak (Dao 2023, arXiv:2307.08691), and about 35 % on an H100 (Shah et al. 2024,
arXiv:2407.08608); the backward pass reaches less."""


def seconds(launch: Launch, rates: dict[str, float]) -> float:
    """Return the seconds of one launch."""
    computing = launch.flops / rates[launch.rate] if launch.flops else 0.0
    return max((launch.read + launch.written) / rates["memory"], computing, SHORTEST)


def prediction(step: Step, gpu: Gpu) -> dict[str, Any]:
    """Return the figures of a step on one GPU, in total and by part.

    ``share_of_floor`` compares with 4 FLOPs per token and weight (`Sizes.weights`) at the achieved rate in bf16, and no
    other cost: the forward pass and the gradients of the inputs of a frozen backbone.
    """
    rates, launches = gpu.rates(), step.launches()
    parts = {part: summed(launches, part, rates) for part in PARTS}
    total = sum(part["milliseconds"] for part in parts.values())
    tokens = step.cell.tokens
    floor = 1e3 * 4 * step.cell.sizes.weights * tokens / rates["bf16"]
    return {
        "milliseconds": round(total, 2),
        "tokens_per_second": round(1e3 * tokens / total),
        "share_of_floor": round(floor / total, 3),
        "parts": {part: values for part, values in parts.items() if values["launches"]},
    }


def summed(launches: Counter[Launch], part: str, rates: dict[str, float]) -> dict[str, Any]:
    """Return the launches of a part, their milliseconds, bytes and FLOPs."""
    own = [(launch, count) for launch, count in launches.items() if launch.part == part]
    return {
        "milliseconds": round(1e3 * sum(count * seconds(launch, rates) for launch, count in own), 3),
        "launches": sum(count for _, count in own),
        "bytes_read": sum(count * launch.read for launch, count in own),
        "bytes_written": sum(count * launch.written for launch, count in own),
        "flops": sum(count * launch.flops for launch, count in own),
    }


def operators(launches: Counter[Launch], gpu: Gpu, count: int) -> list[str]:
    """Return a line for each of the ``count`` kinds of launches (by part, place and operation) that take longest."""
    rates = gpu.rates()
    times: dict[tuple[str, str, str], float] = defaultdict(float)
    numbers: Counter[tuple[str, str, str]] = Counter()
    for launch, number in launches.items():
        kind = launch.part, launch.place, launch.operator
        times[kind] += number * seconds(launch, rates)
        numbers[kind] += number
    return [
        f"{1e3 * times[kind]:8.2f} ms {numbers[kind]:6}  {kind[0]:26}{kind[2]:32}{kind[1]}"
        for kind in sorted(times, key=lambda kind: -times[kind])[:count]
    ]
