"""Sum up the steps between two records of a run, and make the record."""

from __future__ import annotations

import resource
from collections import defaultdict
from typing import Any

import torch

from ptd.distributed.network_meter import summary
from ptd.distributed.ranks import Ranks
from ptd.engine.phases import OTHER, OWN, PHASES
from ptd.engine.prompt_step import StepResult


class RecordWindow:
    """Sums over the steps between two records."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin a new window."""
        self.steps = self.tokens = self.supervised = self.skipped = 0
        self.seconds = 0.0
        self.network: defaultdict[tuple[str, str, str], float] = defaultdict(float)
        self.phases: defaultdict[str, float] = defaultdict(float)

    def add(self, result: StepResult) -> None:
        """Add the result of one step."""
        self.steps += 1
        self.tokens += result.tokens
        self.supervised += result.supervised_tokens
        self.skipped += result.skipped

    def pass_by(self, seconds: float, network: dict[tuple[str, str, str], float]) -> None:
        """Add elapsed time and network bytes, whichever step they belong to."""
        self.seconds += seconds
        for key, size in network.items():
            self.network[key] += size

    def add_phases(self, seconds: dict[str, float]) -> None:
        """Add this rank's seconds in each phase, whichever step they belong to."""
        for name, value in seconds.items():
            self.phases[name] += value

    def record(self, number: int, learning_rate: float, last: StepResult, ranks: Ranks) -> dict[str, Any]:
        """Return the record of these steps. Every rank calls this together.

        ``loss``, ``lr``, ``grad_norm`` and ``loss_scale`` are those of the last step. Token counts are sums over the
        steps; seconds and bytes are means per step. Tokens and bytes cover all ranks, seconds this rank only. If
        several prompts are trained together, tokens are this prompt's, and seconds and bytes those of all.
        """
        split = {name: self.phases.get(name, 0.0) / self.steps for name in PHASES}
        # A GPU finishes a step's last phase while the process runs the next step, so this difference may be negative.
        split[OTHER] = max(0.0, self.seconds / self.steps - sum(split.values()))
        return {
            "step": number,
            "loss": last.loss,
            "lr": learning_rate,
            "grad_norm": last.grad_norm,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "tokens_per_second": self.tokens / self.seconds,
            "step_seconds": self.seconds / self.steps,
            "phase_seconds": split,
            "peak_memory_bytes": peak_memory_bytes(),
            **summary(ranks, self.network, sum(self.phases.get(name, 0.0) for name in OWN), self.steps),
            "skipped_steps": self.skipped,
            **({} if last.loss_scale is None else {"loss_scale": last.loss_scale}),
        }


def peak_memory_bytes() -> int:
    """Return this process's peak memory: of the CUDA allocator, or the resident memory without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
