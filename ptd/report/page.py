"""Render the page of a report: one file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ptd.report import tables
from ptd.report.data import RecordedRun
from ptd.report.heat_map import HeatMap
from ptd.report.html import filled_page
from ptd.report.panels import SPLIT, Panel
from ptd.report.plots import MEAN_FROM, svg
from ptd.report.theme import GLYPHS, LIGHT

TEMPLATE = Path(__file__).with_name("page.html")
CURVES = ("loss", "eval_loss", "learning_rate", "grad_norm", "loss_scale")
SPEED = ("throughput", "step_time", SPLIT[0], "memory", "network")


def render_report(runs: Sequence[RecordedRun], found: Sequence[Panel], heat: HeatMap | None = None) -> str:
    """Return the HTML of one run, or of several next to each other. Everything that comes from the runs is escaped."""
    several = len(runs) > 1
    figures = [
        {
            "name": panel.name,
            "title": panel.title,
            "note": panel.note,
            "svg": Markup(svg(panel, number, legend=not several and len(panel.curves) > 1)),
        }
        for number, panel in enumerate(found)
    ]
    return filled_page(
        TEMPLATE,
        runs=[_described(run, colour) for colour, run in enumerate(runs)],
        title=f"{len(runs)} runs compared" if several else runs[0].name,
        several=several,
        overview=tables.overview(runs),
        differences=tables.differences(runs) if several else [],
        heat=heat,
        curves=[figure for figure in figures if figure["name"] in CURVES],
        speed=sorted((each for each in figures if each["name"] in SPEED), key=lambda each: SPEED.index(each["name"])),
        metrics=[figure for figure in figures if figure["name"] not in (*CURVES, *SPEED)],
    )


def _described(run: RecordedRun, colour: int) -> dict[str, Any]:
    return {
        "name": run.name,
        "colour": colour % len(LIGHT.palette),
        "glyph": GLYPHS[colour % len(GLYPHS)],
        "alarms": tables.alarms(run),
        "slowest": tables.slowest(run),
        "attempts": tables.attempts(run),
        "long": len(run.steps) >= MEAN_FROM,
        "samples": tables.samples(run),
        "config": tables.as_yaml(run),
        "versions": run.section("versions"),
        "commands": tables.commands(run),
        "started_as": tables.started_as(run),
    }
