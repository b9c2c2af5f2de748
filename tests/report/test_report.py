"""The report of one or several runs: its content, for any state of a run's files, and nothing that it must not hold."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from matplotlib.colors import to_rgb

from ptd.engine.phases import PHASES
from ptd.report import leave_report, report
from ptd.report.data import read_run, read_runs
from ptd.report.page import render_report
from ptd.report.panels import panels, thin
from ptd.report.plots import COLUMNS, MEAN_SHARE, draw, running_mean
from ptd.report.theme import DARK, LIGHT, Theme
from ptd.types import UserError

SECTIONS = ("overview", "curves", "evaluation", "speed", "samples", "attempts", "configuration", "reproduce")
PLOTS = {"loss", "learning_rate", "grad_norm", "throughput", "step_time", "memory", "network", "eval_accuracy"}
PLOTS |= {"phases"}
VOID = {"meta", "link", "br", "img", "source", "input", "hr"}
HOSTILE = "<script>alert(1)</script>\"'&{{7*7}}$\\frac{1}{0}$ _x ]]> \u202e 文"


class Page(HTMLParser):
    """Parse a page into ids, tags, links and text, and assert that its elements are well formed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name in ("href", "src", "xlink:href") if (value := given.get(name))]
        assert not [name for name in given if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check_page(path: Path) -> Page:
    """Assert what holds for every page, and return the parsed page."""
    page = Page(path)
    assert page.open == []
    assert [name for name in SECTIONS if name not in page.ids] == []
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags
    # The page loads nothing: its links lead to places in the page, except for the empty icon.
    assert {link for link in page.links if not link.startswith("#")} <= {"data:,"}
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    content = path.read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!#)", content)
    assert set(re.findall(r"url\(#([^)]+)\)", content)) <= set(page.ids)
    return page


def plots_of(page: Page) -> set[str]:
    return {name.removeprefix("plot-") for name in page.ids if name.startswith("plot-")}


def test_a_run(write_run: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine")
    found = report([folder])
    assert found["report"] == str(folder / "report.html")
    page = check_page(folder / "report.html")
    assert plots_of(page) >= PLOTS
    for words in (
        *("mine", "finished", "5,240,000", "21.0 GiB", "50 MB", "2 MB", "tokens/s", "GiB, rank 0", "loss (nats)"),
        *("frozen backbone", "and and a plain word", "after step 40", "This is a plain word", "It is a plain word."),
        *("2026-01-02 03:04 UTC", "num_virtual_tokens: 16", "torch 2.13.0", "Slowest rank: rank 0 in 25 %"),
        *("ptd launch local run.yaml --gpus-per-node 4", "ptd train run.yaml 'data.train=a plain word'"),
    ):
        assert words in page.text, words
    figures = found["runs"][0]
    assert figures["network_bytes_between_nodes"] == 2_000_000
    assert figures["loss"] == json.loads((folder / "metrics.jsonl").read_text().splitlines()[-2])["loss"]


def test_runs_beside_each_other(write_run: Any, tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "first" / "out", train={"learning_rate": 1e-2}),
        write_run(tmp_path / "second" / "out", ranks=1, status="preempted", train={"learning_rate": 3e-2}),
    ]
    found = report(folders, tmp_path / "new" / "both.html", pngs=tmp_path / "png")
    page = check_page(tmp_path / "new" / "both.html")
    assert plots_of(page) >= {*PLOTS, "eval_loss"}
    assert "first/out" in page.text
    assert "second/out" in page.text
    assert found["differences"] == {"train.learning_rate": ["0.01", "0.03"]}
    assert "train.learning_rate 0.01 0.03" in page.text
    assert {Path(file).stem for file in found["png"]} == plots_of(page)
    pixels = image.imread(tmp_path / "png" / "loss.png")
    assert len({tuple(pixel) for row in pixels[::4] for pixel in row[::4].tolist()}) > 3


def test_where_the_time_goes(write_run: Any, tmp_path: Path) -> None:
    """The phases of one run are layers over its steps that add up to the step's time.

    Several runs have a bar each, and the table shows the shares.
    """
    new, slow, old = (
        write_run(tmp_path / "new", steps=400),
        write_run(tmp_path / "slow", steps=2),
        write_run(tmp_path / "old", splits=False),
    )
    (alone,) = [panel for panel in panels([read_run(new)]) if panel.name == "phases"]
    assert [layer.label for layer in alone.curves] == [*PHASES, "other"]
    total = np.sum([layer.y for layer in alone.curves], axis=0)
    assert total[-1] == pytest.approx(0.5)
    assert total.max() == pytest.approx((10 + 2 * 0.5) / 3), "the first of the parts has three records"
    assert alone.top == pytest.approx(1.15 * 0.5)
    assert "the highest value is 3.67 s" in alone.note
    assert (alone.curves[0].x[0], alone.curves[0].x[-1]) == (0, 400)

    found = report([new, slow, old], tmp_path / "all.html")
    page = check_page(tmp_path / "all.html")
    assert "share of a step: forward 30.5 % 3.0 %" in page.text
    assert "Not recorded: old." in page.text
    assert [sum(run["phase_seconds"].values()) for run in found["runs"][:2]] == pytest.approx([0.52375, 5.25])
    assert found["runs"][2]["phase_seconds"] is None
    report([old])
    assert "phases" not in plots_of(check_page(old / "report.html"))


def test_labels_are_shown_with_the_surest_mistakes_first(write_run: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", labels=36)
    report([folder])
    page = check_page(folder / "report.html")
    assert "Wrong, most confident first: 24 of 36" in page.text
    assert "Right, most confident first: 12 of 36" in page.text
    assert "14 more in samples.jsonl." in page.text
    assert "2 more in samples.jsonl." in page.text
    after = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()[36:]]
    for right, part in zip((False, True), page.text.split("Right, most confident first")[:2], strict=True):
        scores = sorted((row["score"] for row in after if row["right"] is right), reverse=True)[:10]
        shown = re.findall(r"after step 40 not a plain word \((\S+)\)", part)
        assert shown == [f"{score:.2f}" for score in scores]


DIVERGED = {"step": 12, "loss": 9.0, "frozen_loss": 2.6, "reason": "it rose <far> above", "learning_rate": 1.0}


def test_the_backbone_alone_and_a_divergence(write_run: Any, tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run",
        status="diverged",
        alone=0.25,
        diverged=DIVERGED,
        retries=[{"at_step": 9, "from_step": 4, "learning_rate": 1.0}],
    )
    figures = report([folder])["runs"][0]
    page = check_page(folder / "report.html")
    for words in (
        "The run diverged in step 9, and was continued from step 4 with learning rate 1.",
        "The run diverged in step 12, with learning rate 1: it rose <far> above.",
        "is worse than that of the frozen backbone, 0.2500.",
        "held-out loss, frozen backbone (nats) 0.2500",
        "held-out accuracy, frozen backbone 12.5",
        "status diverged",
    ):
        assert words in page.text, words
    assert (figures["frozen_loss"], figures["frozen_accuracy"], figures["diverged"]) == (0.25, 12.5, DIVERGED)
    assert "frozen_rows" not in figures
    found = {panel.name: panel for panel in panels([read_run(folder)])}
    loss = found["loss"]
    assert [curve.label for curve in loss.curves] == ["training", "held-out rows", "frozen backbone"]
    assert loss.curves[-1].dashed
    assert (loss.curves[-1].x.tolist(), loss.curves[-1].y.tolist()) == ([0, 40], [0.25, 0.25])
    assert loss.alarms == ((12, "diverged"),)
    assert [text.get_text().strip() for text in draw(loss, LIGHT, legend=True).axes[0].texts] == ["diverged"]
    assert found["eval_accuracy"].curves[-1].y.tolist() == [12.5, 12.5]


def test_the_backbone_alone_of_several_runs(write_run: Any, tmp_path: Path) -> None:
    """Runs with the same backbone and rows share one line for the frozen backbone; others have a line each."""
    first, same, other = (
        write_run(tmp_path / name, alone=alone) for name, alone in (("a", 3.0), ("b", 3.0), ("c", 2.0))
    )
    none = write_run(tmp_path / "d")

    def lines(*folders: Path) -> list[tuple[str, int, float]]:
        found = next(panel for panel in panels(read_runs(folders)) if panel.name == "eval_loss")
        assert ("Dashed: the frozen backbone." in found.note) == any(curve.dashed for curve in found.curves)
        return [(curve.label, curve.colour, curve.y[0]) for curve in found.curves if curve.dashed]

    assert lines(first, same, none) == [("frozen backbone", -1, 3.0)]
    assert lines(first, none, other) == [("", 0, 3.0), ("", 2, 2.0)]
    assert lines(none, write_run(tmp_path / "e")) == []
    report([first, same, other, none], tmp_path / "all.html", pngs=tmp_path / "png")
    page = check_page(tmp_path / "all.html")
    assert "held-out loss, frozen backbone (nats) 3.0000 3.0000 2.0000" in page.text


@pytest.mark.parametrize("number", [1, 2])
def test_hostile_strings_are_only_words(write_run: Any, tmp_path: Path, number: int) -> None:
    folders = [write_run(tmp_path / f"<i>run{place}&", label=HOSTILE) for place in range(number)]
    report(folders, tmp_path / "page.html", pngs=tmp_path / "png")
    page = check_page(tmp_path / "page.html")
    assert "alert(1)" in page.text
    assert "49" not in re.findall(r"name: \S+", page.text)
    assert "{{7*7}}" in page.text
    assert "i" not in page.tags
    assert "<i>run0&" in page.text
    assert all(file.parent == tmp_path / "png" for file in (tmp_path / "png").iterdir())


def test_hundred_thousand_records(write_run: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "long", steps=100_000)
    report([folder])
    assert (folder / "report.html").stat().st_size < 1_000_000
    loss = next(panel for panel in panels([read_run(folder)]) if panel.name == "loss")
    lines = draw(loss, LIGHT, legend=True).axes[0].lines
    assert max(len(line.get_xdata()) for line in lines) <= 2 * COLUMNS
    assert max(np.nanmax(line.get_ydata()) for line in lines) == 97.0, "the spike is still there"


def test_many_runs_stay_small(write_run: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=2000)
    runs = [read_run(folder, f"run {number}") for number in range(20)]
    content = render_report(runs, panels(runs))
    assert len(content.encode()) < 5_000_000


# ---- incomplete and damaged runs


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "running", "config": {"method": {"name": "prompt"}}}')
    report([tmp_path])
    page = check_page(tmp_path / "report.html")
    assert "No step has been recorded." in page.text
    assert plots_of(page) == set()


@pytest.mark.parametrize(
    "facts",
    [
        "[]",
        '{"config": [], "attempts": 3, "versions": null, "result": "x", "command": "ptd"}',
        '{"config": {"method": 3, "train": null}, "attempts": [null, 4], "result": {"best": 3, "seconds": "long"}}',
        '{"status": 4, "started": 5, "world_size": "many", "trained_parameters": "x", "attempts": [{"step": "y"}]}',
        '{"diverged": {"step": "soon", "learning_rate": []}, "retries": [3, {"at_step": 2}, {"learning_rate": "x"}]}',
        '{"diverged": 5, "retries": {"at_step": 2}}',
    ],
)
def test_what_has_another_form_is_left_out(tmp_path: Path, facts: str) -> None:
    (tmp_path / "run.json").write_text(facts)
    lines = ['{"step": 1, "loss": 2.5}', "3", "null", '{"loss": 1}', '{"step": "x", "loss": 1}', '{"step": 2, "lo']
    lines.insert(1, '{"step": 2, "loss": "NaN", "lr": true, "network_bytes": "all", "slowest_rank": 0}')
    lines += [
        '{"step": 0, "frozen_loss": "low", "frozen_accuracy": null, "frozen_train_loss": true}',
        '{"step": 3, "phase_seconds": [1]}',
        '{"step": 4, "loss": 2, "phase_seconds": {"data": 1, "forward": "x"}}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "samples.jsonl").write_text('{"step": 0}\n[]\n{"step": 1, "prompt": 3, "reference": "", "text": ""}')
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('\n{"step": 1, "prompt": "", "reference": "", "text": "", "score": "high", "right": true}')
    report([tmp_path])
    assert plots_of(check_page(tmp_path / "report.html")) == {"loss"}


def test_only_records(tmp_path: Path) -> None:
    """Records alone make a report, as for a run of an older version or a run whose run.json was not copied."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "lr": 0.1}\n')
    report([tmp_path])
    assert plots_of(check_page(tmp_path / "report.html")) == {"loss", "learning_rate"}


def test_refusals(write_run: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="there is no such folder; give the output_dir of a run"):
        report([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"neither run\.json nor metrics\.jsonl"):
        report([tmp_path])
    with pytest.raises(UserError, match="is given twice"):
        read_runs([run, tmp_path / "." / "run"])
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match="cannot report on"):
        report([run])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output: cannot write"):
        report([write_run(tmp_path / "other")], tmp_path / "file" / "page.html")
    with pytest.raises(UserError, match="--png: cannot write"):
        report([tmp_path / "other"], tmp_path / "page.html", pngs=tmp_path / "file")


def test_a_report_that_cannot_be_written_is_only_said(write_run: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "report.html").mkdir()
    note = leave_report(folder)
    assert note is not None
    assert note.startswith("report.html was not written (IsADirectoryError")
    assert f"ptd report {folder}" in note
    assert (folder / "loss.png").stat().st_size > 5000


# ---- series and colours


@pytest.mark.parametrize("count", [1, 2, 99, 1200, 1201, 54321])
def test_thinning_keeps_the_extremes_of_each_column(count: int) -> None:
    generator = np.random.default_rng(count)
    x = np.cumsum(generator.integers(1, 9, count)).astype(float)
    y = generator.normal(size=count)
    y[generator.integers(0, count, count // 10)] = np.nan
    columns = 600
    thinned_x, thinned_y = thin(x, y, columns)
    assert len(thinned_x) == len(thinned_y) <= 2 * columns
    assert (np.diff(thinned_x) > 0).all()
    assert np.isin(thinned_x, x).all()
    if np.isfinite(y).any():
        assert (np.nanmin(thinned_y), np.nanmax(thinned_y)) == (np.nanmin(y), np.nanmax(y))
    edges = np.linspace(x[0], x[-1], columns + 1)
    for low, high in pairwise(edges):
        inside = y[(x > low + 1e-6) & (x < high - 1e-6)]
        if len(inside) and np.isfinite(inside).any():
            near = thinned_y[(thinned_x >= low - 1e-6) & (thinned_x <= high + 1e-6)]
            assert np.nanmax(near) >= np.nanmax(inside)
            assert np.nanmin(near) <= np.nanmin(inside)


def test_running_mean() -> None:
    y = np.arange(200.0)
    y[7] = np.nan
    x, means = running_mean(np.arange(200.0), y, MEAN_SHARE)
    assert means[0] == pytest.approx(1.5)
    assert means[3] == pytest.approx((6 + 8 + 9) / 3)
    assert (np.diff(x) > 0).all()
    assert np.isnan(running_mean(np.arange(100.0), np.full(100, np.nan), MEAN_SHARE)[1]).all()


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of WCAG 2.2."""

    def luminance(colour: str) -> float:
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_contrasts(theme: Theme) -> None:
    """Contrasts follow WCAG: 4.5 for text, which excludes the marks of runs; 3 for graphics that carry meaning."""
    assert contrast(theme.ink, theme.paper) >= 7
    assert contrast(theme.soft, theme.paper) >= 4.5
    assert min(contrast(colour, theme.paper) for colour in theme.palette) >= 3
