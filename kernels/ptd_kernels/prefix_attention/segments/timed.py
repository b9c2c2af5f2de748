"""Which library is fastest for long causal sequences on a GPU, by the timings in timed.json.

``make gpu-4`` measures them (benchmarks/gpu_segments.py), ``make gpu-table`` adds this GPU to the file. Each entry is
one kind of segment: dtype, head size (of keys and values), packed or not, and the length of its sequences::

    {"NVIDIA H100 80GB HBM3": {
        "evidence": {"commit": "…", "versions": {…}, …},
        "timings": [{"dtype": "bfloat16", "head_size": 128, "packed": true, "tokens": 4096,
                     "milliseconds": {"torch flash (CUDA)": 3.1, "cuDNN": 2.2}}]}}

Milliseconds are of a forward and a backward pass. A segment takes its timing from the longest sequences that are not
longer than its own. For other GPUs and kinds of segments, there is no ranking.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.problem import nvidia_capability
from ptd_kernels.prefix_attention.segments.kernel import Need

TIMED = Path(__file__).with_name("timed.json")
SHORTEST = 2048
"""For shorter sequences, the kernels differ by less than a launch takes."""
FIRST = (9, 0)
"""The compute capability from which on there are kernels that use more of the GPU than FlashAttention-2 does."""


class Timing(NamedTuple):
    """The time of each kernel, by its name, for one kind of segment."""

    dtype: str
    head_size: int
    packed: bool
    tokens: int
    milliseconds: Mapping[str, float]


@functools.cache
def read_timings(file: Path) -> dict[str, tuple[Timing, ...]]:
    """Return the timings in `file` by the name of the GPU. Raises `ValueError` if it has other contents."""
    try:
        found = {
            gpu: tuple(
                Timing(
                    str(each["dtype"]), int(each["head_size"]), bool(each["packed"]), int(each["tokens"]),
                    {str(name): float(ms) for name, ms in each["milliseconds"].items()},
                )
                for each in entry["timings"]
            )
            for gpu, entry in json.loads(file.read_text(encoding="utf-8")).items()
        }  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is no table of timed kernels ({type(error).__name__}: {error}); restore it, or write {{}} to it"
        ) from None
    wrong = [ms for timings in found.values() for each in timings for ms in each.milliseconds.values() if not ms > 0]
    if wrong or any(
        math.isinf(ms) for timings in found.values() for each in timings for ms in each.milliseconds.values()
    ):
        raise ValueError(f"{file} is no table of timed kernels: milliseconds have to be positive and finite")
    return found


def ranking(need: Need) -> tuple[str, ...]:
    """Return the names of the kernels timed for this kind of segment, the fastest first; empty if none were timed.

    Under ``torch.use_deterministic_algorithms(True)`` there is no ranking: not every library sums in a fixed order.
    """
    q, rule = need.q, need.rule
    capability = nvidia_capability(q.device)
    tokens = min(q.shape[2], need.keys if rule.cu_seqlens is None else rule.max_seqlen or 0)
    if capability is None or capability < FIRST or tokens < SHORTEST or need.exact_keys:
        return ()
    if rule.offset != 0 or rule.window is not None or need.value_head_size != q.shape[3]:
        return ()
    if torch.are_deterministic_algorithms_enabled():
        return ()
    kind = str(q.dtype).removeprefix("torch."), q.shape[3], rule.cu_seqlens is not None
    fitting = [each for each in read_timings(TIMED).get(_name(q), ()) if each[:3] == kind and each.tokens <= tokens]
    if not fitting:
        return ()
    milliseconds = max(fitting, key=lambda each: each.tokens).milliseconds
    return tuple(sorted(milliseconds, key=milliseconds.__getitem__))


def timed_gpu(device: torch.device) -> bool:
    """Return whether the table has this GPU."""
    return device.type == "cuda" and torch.cuda.get_device_name(device) in read_timings(TIMED)


def _name(q: Tensor) -> str:
    """Return the GPU's name; tensors on the CPU that represent a GPU (`problem.stand_in`) have none."""
    return torch.cuda.get_device_name(q.device) if q.device.type == "cuda" else ""
