"""``ptd bench``: measure how fast a run trains and where its time goes, optionally against PEFT on the same rows.

Each side is a separate process, so that its peak memory can be measured. The sides take turns step by step while the
others are blocked on a pipe. docs/benchmarking.md says how each figure is measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptd.bench.figures import ratios, side_figures
from ptd.bench.machine import evidence
from ptd.bench.players import Here, Player
from ptd.bench.sides import ENVIRONMENT, Facts, Schedule, Setting, StepTiming, Workload, length_grouped, settings_for
from ptd.config import RunConfig, without_evaluation
from ptd.types import Reporter, UserError

TOLERANCE = {"float32": (1e-5, 1e-5), "bfloat16": (5e-3, 5e-2)}
"""Relative difference allowed between the sides' losses and prompt gradients, by the backbone's dtype. bfloat16 has 8
bits of precision: kernels that sum in another order differ by its rounding at every layer."""
PAUSE = 0.005
"""Seconds between turns, because OpenMP's threads spin for a while after their last work."""


@dataclass
class Comparison:
    """Sides that are timed on the same rows: ``players`` by name of the side, rows of each step by ``schedule``."""

    name: str
    rows: str
    schedule: Schedule
    players: dict[str, Player | Here]
    same_work: dict[str, float] | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[StepTiming]] = field(default_factory=dict)


def bench(
    config: RunConfig,
    *,
    against: str | None = None,
    settings: Sequence[Setting] | None = None,
    repeats: int = 15,
    warmup: int = 3,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Time the steps of a run and return the report that `ptd.bench.report.write_bench_report` saves.

    With ``against="peft"``, PEFT's steps are timed in turns with ptd's, in ``settings`` (default: `settings_for`).
    Under a launcher all ranks call this together, without ``against``; rank 0's report counts. Raises `UserError` for a
    run that cannot be timed or compared, and if the sides do not compute the same.
    """
    assert repeats >= 1
    assert warmup >= 0
    config = without_evaluation(config)
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if against not in (None, "peft"):
        raise UserError(f"--against: ptd cannot be compared with {against!r}; give peft")
    if against is not None and launched:
        raise UserError(
            "--against peft: the comparison runs each side in one process, but this process is one of several that a "
            "launcher started; run it without the launcher, or leave out --against"
        )
    reporter = _on_main(reporter)
    with ExitStack() as stack:
        ptd: Player | Here
        reporter.note("preparing ptd")
        if launched:
            from ptd.bench.ptd_side import PtdSide

            ptd = Here(PtdSide(config))
            stack.callback(ptd.close)
        else:
            ptd = _start(stack, "ptd's side", {}, "ptd", config, against is not None)
        facts: dict[str, Facts] = {"ptd": ptd.ask("facts")}
        alone: Schedule = lambda step: ptd.ask("rows", step)  # noqa: E731
        comparisons = [Comparison("alone", "random", alone, {"ptd": ptd})]
        if against is not None:
            if facts["ptd"].obstacle is not None:
                raise UserError(f"--against peft: {facts['ptd'].obstacle}; leave out --against")
            material: Workload = ptd.ask("hand_over")
            comparisons = [
                _lane(stack, setting, config, material, ptd, facts, reporter)
                for setting in settings or settings_for(config)
            ]
            for comparison in comparisons:
                comparison.same_work = _check(comparison, facts["ptd"].dtype)
        _take_turns(comparisons, warmup, repeats, ptd, reporter)
        machine = ptd.ask("matmul_rate")  # last, because memory that it frees may stay resident
        network = ptd.ask("network", repeats * len(comparisons))
        return _report(config, comparisons, facts, machine, network, against, warmup, repeats)


def _on_main(reporter: Reporter | None) -> Reporter:
    return reporter if reporter is not None and os.environ.get("RANK", "0") == "0" else Reporter()


def _start(stack: ExitStack, title: str, environment: dict[str, str], side: str, *arguments: Any) -> Player:
    player = Player(title, environment)
    stack.callback(player.close)
    player.ask(side, *arguments)
    return player


def _lane(
    stack: ExitStack,
    setting: Setting,
    config: RunConfig,
    material: Workload,
    ptd: Player | Here,
    facts: dict[str, Facts],
    reporter: Reporter,
) -> Comparison:
    reporter.note(f"preparing PEFT, {setting}")
    on_gpu = facts["ptd"].device == "cuda"
    environment = {} if on_gpu else ENVIRONMENT[setting]
    peft = _start(stack, f"PEFT's side ({setting})", environment, "peft", config, material, setting)
    chosen, rows, schedule = {}, "random", lambda step: ptd.ask("rows", step)
    if setting != "as-run":
        if on_gpu:
            chosen = peft.ask("fit", facts["ptd"].rows)
        size = peft.ask("facts").settings["rows"] * config.train.gradient_accumulation_steps
        schedule, rows = length_grouped(ptd.ask("lengths"), size, config.train.seed), "of similar length together"
    facts[setting] = peft.ask("facts")
    return Comparison(setting, rows, schedule, {"ptd": ptd, "peft": peft}, chosen=chosen)


def _check(comparison: Comparison, dtype: str) -> dict[str, float]:
    """Return how far the sides' loss and prompt gradient differ on the first rows; raise `UserError` if too far."""
    rows = comparison.schedule(0)
    mine, gradient = comparison.players["ptd"].ask("check", rows)
    theirs = comparison.players["peft"].ask("check", rows, gradient)
    allowed = TOLERANCE[dtype]
    found = {"loss": abs(mine - theirs["loss"]) / abs(theirs["loss"]), "gradient": theirs["gradient"]}
    if not (found["loss"] <= allowed[0] and found["gradient"] <= allowed[1]):
        raise UserError(
            f"--against peft: the sides do not compute the same: the loss is {mine:.7g} in ptd and "
            f"{theirs['loss']:.7g} in PEFT, and the relative difference of the prompt gradients is "
            f"{found['gradient']:.1e} ({dtype} allows {allowed[0]:g} for the loss, {allowed[1]:g} for the gradient). "
            "A known cause is a sliding window, by which PEFT clips a prefix and ptd does not; leave out --against"
        )
    return {**found, "loss_tolerance": allowed[0], "gradient_tolerance": allowed[1]}


def _take_turns(
    comparisons: list[Comparison], warmup: int, repeats: int, ptd: Player | Here, reporter: Reporter
) -> None:
    """Take each step in every comparison on every side in turn; the order of the sides alternates from step to step."""
    reporter.start("bench", warmup + repeats)
    for step in range(warmup + repeats):
        if step == warmup:
            ptd.ask("forget")
        for comparison in comparisons:
            rows: np.ndarray = comparison.schedule(step)
            names = list(comparison.players)
            for name in names[:: 1 if step % 2 else -1]:
                time.sleep(PAUSE)
                sample = comparison.players[name].ask("take", rows)
                if step >= warmup:
                    comparison.samples.setdefault(name, []).append(sample)
        reporter.advance("bench", step + 1)
    reporter.finish("bench")


def _report(
    config: RunConfig,
    comparisons: list[Comparison],
    facts: dict[str, Facts],
    machine: dict[str, Any],
    network: dict[str, Any],
    against: str | None,
    warmup: int,
    repeats: int,
) -> dict[str, Any]:
    found = []
    for comparison in comparisons:
        sides = {}
        for name, samples in comparison.samples.items():
            said = facts["ptd" if name == "ptd" else comparison.name]
            figures = side_figures(samples, machine["flops_per_second"])
            title = "ptd" if name == "ptd" else f"PEFT, {comparison.name}"
            title += f", rows of {comparison.name}" if name == "ptd" and len(comparisons) > 1 else ""
            described = {"title": title, "settings": said.settings}
            sides[name] = {**described, **figures, "flops_uncounted": said.uncounted}
        entry: dict[str, Any] = {"name": comparison.name, "rows": comparison.rows, "sides": sides}
        entry["rows_per_step"] = len(comparison.schedule(0))
        if "peft" in sides:
            entry |= {
                "ratio": ratios(comparison.samples["ptd"], comparison.samples["peft"]),
                "same_work": comparison.same_work,
            }
            entry |= {"fitted": comparison.chosen} if comparison.chosen else {}
        found.append(entry)
    packages = ("peft",) if against is not None else ()
    return {
        **evidence(*packages),
        "machine": machine,
        "dtype": facts["ptd"].dtype,
        "device": facts["ptd"].device,
        "threads": facts["ptd"].threads,
        "against": against,
        "warmup": warmup,
        "repeats": repeats,
        "lanes": found,
        "network": network,
        "config": config.to_dict(),
    }


def bench_sweep(
    key: str, values: Sequence[str], config_of: Callable[[str], RunConfig], **options: Any
) -> dict[str, Any]:
    """Run `bench` with each of ``values`` of the configuration's ``key``; ``options`` are passed to `bench`."""
    reporter = _on_main(options.get("reporter"))
    points = []
    for value in values:
        reporter.note(f"{key}={value}")
        points.append({"value": value, "report": bench(config_of(value), **options)})
    return {"key": key, "points": points}
