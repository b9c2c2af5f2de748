"""``ptd bench``: how fast a run trains and where its time goes, alone or against PEFT on the same rows, in turns.

Every side is a process of its own, so that each has its own peak memory; they take turns step by step, the others
blocked on a pipe. docs/benchmarking.md says what is measured how.
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
from ptd.bench.sides import ENVIRONMENT, Facts, Material, Sample, Schedule, Setting, length_grouped, settings_for
from ptd.config import RunConfig, without_evaluation
from ptd.types import Reporter, UserError

TOLERANCE = {"float32": (1e-5, 1e-5), "bfloat16": (5e-3, 5e-2)}
"""Relative difference that two sides' loss and prompt gradient may have, by the backbone's dtype. bfloat16 has 8 bits:
kernels that sum in another order differ by its rounding at every layer."""
PAUSE = 0.005
"""Seconds between turns: OpenMP's threads spin for a while after their last work."""


@dataclass
class Lane:
    """Steps that are timed side by side: ``players`` by side, on the rows of ``schedule``."""

    name: str
    rows: str
    schedule: Schedule
    players: dict[str, Player | Here]
    same_work: dict[str, float] | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)


def bench(
    config: RunConfig,
    *,
    against: str | None = None,
    settings: Sequence[Setting] | None = None,
    repeats: int = 15,
    warmup: int = 3,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Time the steps of a run; ``against`` ``peft``: also PEFT's in these ``settings`` (`settings_for`), in turns.

    Returns the report that `ptd.bench.report.write` keeps. Under a launcher every rank calls this together, without
    ``against``; rank 0's report counts. Raises `UserError`, also where the sides do not compute the same.
    """
    assert repeats >= 1
    assert warmup >= 0
    config = without_evaluation(config)
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if against not in (None, "peft"):
        raise UserError(f"--against: there is nothing called {against!r} to compare with; known: peft")
    if against is not None and launched:
        raise UserError(
            "--against peft: the comparison is of one process each, and this is one of several that a launcher "
            "started; run it without the launcher, or leave out --against"
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
        lanes = [Lane("alone", "random", alone, {"ptd": ptd})]
        if against is not None:
            if facts["ptd"].obstacle is not None:
                raise UserError(f"--against peft: {facts['ptd'].obstacle}; leave out --against")
            material: Material = ptd.ask("hand_over")
            lanes = [
                _lane(stack, setting, config, material, ptd, facts, reporter)
                for setting in settings or settings_for(config)
            ]
            for lane in lanes:
                lane.same_work = _check(lane, facts["ptd"].dtype)
        _take_turns(lanes, warmup, repeats, ptd, reporter)
        machine = ptd.ask("matmul_rate")  # last, because what it frees may stay resident
        network = ptd.ask("network", repeats * len(lanes))
        return _report(config, lanes, facts, machine, network, against, warmup, repeats)


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
    material: Material,
    ptd: Player | Here,
    facts: dict[str, Facts],
    reporter: Reporter,
) -> Lane:
    reporter.note(f"preparing PEFT, {setting}")
    on_gpu = facts["ptd"].device == "cuda"
    environment = {} if on_gpu else ENVIRONMENT[setting]
    peft = _start(stack, f"PEFT's side ({setting})", environment, "peft", config, material, setting)
    chosen, rows, schedule = {}, "random", lambda step: ptd.ask("rows", step)
    if setting != "as-run":
        if on_gpu:
            chosen = peft.ask("fit", facts["ptd"].rows)
        size = peft.ask("facts").settings["rows"] * config.train.gradient_accumulation_steps
        schedule, rows = length_grouped(ptd.ask("lengths"), size, config.train.seed), "of like length together"
    facts[setting] = peft.ask("facts")
    return Lane(setting, rows, schedule, {"ptd": ptd, "peft": peft}, chosen=chosen)


def _check(lane: Lane, dtype: str) -> dict[str, float]:
    """How far the sides' loss and prompt gradient on the first rows are apart; raises `UserError` if too far."""
    rows = lane.schedule(0)
    mine, gradient = lane.players["ptd"].ask("check", rows)
    theirs = lane.players["peft"].ask("check", rows, gradient)
    allowed = TOLERANCE[dtype]
    found = {"loss": abs(mine - theirs["loss"]) / abs(theirs["loss"]), "gradient": theirs["gradient"]}
    if not (found["loss"] <= allowed[0] and found["gradient"] <= allowed[1]):
        raise UserError(
            f"--against peft: the sides do not compute the same: loss {mine:.7g} and {theirs['loss']:.7g}, prompt "
            f"gradient {found['gradient']:.1e} apart, relatively ({dtype} may be {allowed[0]:g} and {allowed[1]:g} "
            "apart); PEFT clips a prefix by a sliding window, and ptd does not"
        )
    return {**found, "loss_tolerance": allowed[0], "gradient_tolerance": allowed[1]}


def _take_turns(lanes: list[Lane], warmup: int, repeats: int, ptd: Player | Here, reporter: Reporter) -> None:
    """Every lane's step on every side, one after the other; the order is turned round from step to step."""
    reporter.start("bench", warmup + repeats)
    for step in range(warmup + repeats):
        if step == warmup:
            ptd.ask("forget")
        for lane in lanes:
            rows: np.ndarray = lane.schedule(step)
            names = list(lane.players)
            for name in names[:: 1 if step % 2 else -1]:
                time.sleep(PAUSE)
                sample = lane.players[name].ask("take", rows)
                if step >= warmup:
                    lane.samples.setdefault(name, []).append(sample)
        reporter.advance("bench", step + 1)
    reporter.finish("bench")


def _report(
    config: RunConfig,
    lanes: list[Lane],
    facts: dict[str, Facts],
    machine: dict[str, Any],
    network: dict[str, Any],
    against: str | None,
    warmup: int,
    repeats: int,
) -> dict[str, Any]:
    found = []
    for lane in lanes:
        sides = {}
        for name, samples in lane.samples.items():
            said = facts["ptd" if name == "ptd" else lane.name]
            figures = side_figures(samples, machine["flops_per_second"])
            title = "ptd" if name == "ptd" else f"PEFT, {lane.name}"
            title += f", rows of {lane.name}" if name == "ptd" and len(lanes) > 1 else ""
            described = {"title": title, "settings": said.settings}
            sides[name] = {**described, **figures, "flops_uncounted": said.uncounted}
        entry: dict[str, Any] = {"name": lane.name, "rows": lane.rows, "sides": sides}
        entry["rows_per_step"] = len(lane.schedule(0))
        if "peft" in sides:
            entry |= {"ratio": ratios(lane.samples["ptd"], lane.samples["peft"]), "same_work": lane.same_work}
            entry |= {"fitted": lane.chosen} if lane.chosen else {}
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


def sweep(key: str, values: Sequence[str], config_of: Callable[[str], RunConfig], **options: Any) -> dict[str, Any]:
    """`bench` with each of ``values`` of the configuration's ``key``; ``options`` are `bench`'s."""
    reporter = _on_main(options.get("reporter"))
    points = []
    for value in values:
        reporter.note(f"{key}={value}")
        points.append({"value": value, "report": bench(config_of(value), **options)})
    return {"key": key, "points": points}
