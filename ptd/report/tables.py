"""Build the text and the tables of a report."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import PurePath
from typing import Any

import yaml

from ptd.report.data import ALONE, RecordedRun, is_number, numbers
from ptd.report.panels import LAYERS, NOT_DRAWN, mean_split, metrics
from ptd.values import decimal_size, flattened, memory_size

NOT_COMPARED = ("output_dir",)
"""Settings that always differ between two runs."""
SHOWN = 10
"""Rows of a group of samples that the page shows."""


def plain(run: RecordedRun) -> dict[str, Any]:
    """Return the figures of a run by name; unknown figures are None. Sizes are in bytes, times in seconds."""
    result, result_seconds = run.section("result"), run.section("result").get("seconds")
    total, between = (_median(run, key) for key in ("network_bytes", "network_bytes_between_nodes"))
    return {
        "status": run.facts.get("status"),
        "method": run.config("method", "name"),
        "task": run.config("task", "kind"),
        "backbone": run.config("backbone", "path"),
        "steps": run.steps[-1]["step"] if run.steps else result.get("steps", 0),
        "seconds": result_seconds if is_number(result_seconds) else None,
        "loss": run.last("loss"),
        **{key: run.last(key, run.evaluations) for key in ["eval_loss", *metrics([run])]},
        **_alone(run),
        "diverged": run.facts.get("diverged"),
        "retries": run.facts.get("retries"),
        "best": result.get("best"),
        "trained_parameters": run.facts.get("trained_parameters"),
        "tokens_per_second": _median(run, "tokens_per_second"),
        "step_seconds": _median(run, "step_seconds"),
        "phase_seconds": mean_split(run) or None,
        "peak_memory_bytes": max((value for _, value in numbers(run.steps, "peak_memory_bytes")), default=None),
        "network_bytes_inside_nodes": total - between if total is not None and between is not None else None,
        "network_bytes_between_nodes": between,
        "skipped_steps": sum(int(value) for _, value in numbers(run.steps, "skipped_steps")),
        "attempts": len(run.attempts),
        "world_size": run.facts.get("world_size"),
        "device": run.facts.get("device"),
        "started": run.facts.get("started"),
    }


def _alone(run: RecordedRun) -> dict[str, Any]:
    """Return the figures of the frozen backbone, without a prompt, under their names in run.json."""
    measures = [key for key in run.alone if key not in NOT_DRAWN or key == "eval_loss"]
    return {key.replace("eval_", ALONE, 1): run.alone[key] for key in measures}


def _median(run: RecordedRun, key: str) -> float | None:
    values = [value for _, value in numbers(run.steps, key)]
    return statistics.median(values) if values else None


def _number(value: float) -> str:
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1000 <= abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _decimals(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"


def _time(value: float) -> str:
    if value < 60:
        return f"{value:.3g} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _moment(value: Any) -> str:
    try:
        return datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return str(value)


def _base(path: Any) -> str:
    return PurePath(str(path)).name or str(path)


_ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("status", "status", str),
    ("method", "method", str),
    ("task", "task", str),
    ("backbone", "backbone", _base),
    ("started", "started", _moment),
    ("steps", "optimizer steps", _number),
    ("seconds", "time (last start)", _time),
    ("loss", "training loss, last (nats)", _decimals),
    ("frozen_loss", "held-out loss, frozen backbone (nats)", _decimals),
    ("eval_loss", "held-out loss, last (nats)", _decimals),
    ("trained_parameters", "trained parameters", _number),
    ("tokens_per_second", "useful tokens/s, median", _number),
    ("step_seconds", "time per step, median", _time),
    ("peak_memory_bytes", "peak memory, rank 0", memory_size),
    ("network_bytes_inside_nodes", "sent inside nodes, per step", decimal_size),
    ("network_bytes_between_nodes", "sent between nodes, per step", decimal_size),
    ("skipped_steps", "skipped steps", _number),
    ("attempts", "starts", _number),
    ("world_size", "ranks", _number),
    ("device", "device", str),
)


def overview(runs: Sequence[RecordedRun]) -> list[tuple[str, list[str]]]:
    """Return the label of each figure and its value in each run; figures that no run has are left out."""
    figures = [plain(run) for run in runs]
    rows: list[tuple[str, list[str]]] = []
    for key, label, form in _ROWS:
        rows.append((label, [_shown(each.get(key), form) for each in figures]))
        if key == "eval_loss":
            for metric in metrics(runs):
                label = f"held-out {metric.removeprefix('eval_')}, last"
                rows.append((label, [_shown(each.get(metric), _number) for each in figures]))
                name = metric.replace("eval_", ALONE, 1)
                label = f"held-out {metric.removeprefix('eval_')}, frozen backbone"
                rows.append((label, [_shown(each.get(name), _number) for each in figures]))
            rows.append(("best evaluation", [_best(each["best"]) for each in figures]))
        if key == "step_seconds" and len(runs) > 1:
            splits = [each["phase_seconds"] for each in figures]
            rows += [(f"share of a step: {name}", [_share(split, name) for split in splits]) for name in LAYERS]
    return [(label, cells) for label, cells in rows if any(cells)]


def alarms(run: RecordedRun) -> list[str]:
    """Return what is wrong with a run, one sentence per problem; usually nothing."""
    found = []
    diverged, retries = run.section("diverged"), run.facts.get("retries")
    for retry in retries if isinstance(retries, list) else []:
        if isinstance(retry, dict) and is_number(retry.get("learning_rate")):
            found.append(
                f"The run diverged in step {_cell(retry.get('at_step'))}, and was continued from step "
                f"{_cell(retry.get('from_step'))} with learning rate {retry['learning_rate']:.3g}."
            )
    if diverged:
        rate = diverged.get("learning_rate")
        shown = f"{rate:.3g}" if is_number(rate) else "unknown"
        found.append(
            f"The run diverged in step {_cell(diverged.get('step'))}, with learning rate {shown}: "
            f"{diverged.get('reason')}."
        )
    alone, tuned = run.alone.get("eval_loss"), run.last("eval_loss", run.evaluations)
    if alone is not None and is_number(alone) and tuned is not None and tuned > alone:
        found.append(
            f"The held-out loss, {_decimals(tuned)}, is worse than that of the frozen backbone, {_decimals(alone)}."
        )
    return found


def _shown(value: Any, form: Callable[[Any], str]) -> str:
    if value is None:
        return ""
    return form(value) if is_number(value) or form in (str, _moment, _base) else str(value)


def _share(split: dict[str, float] | None, name: str) -> str:
    return f"{100 * split[name] / sum(split.values()):.1f} %" if split and any(split.values()) else ""


def _best(best: Any) -> str:
    if not isinstance(best, dict):
        return ""
    figures = [f"{name} {_number(best[name])}" for name in best if is_number(best[name]) and name != "step"]
    return f"step {_cell(best.get('step'))}: {', '.join(figures[:2])}"


def differences(runs: Sequence[RecordedRun]) -> list[tuple[str, list[str]]]:
    """Return the settings that differ between runs, as dotted keys, with each run's value."""
    settings = [flattened(run.section("config")) for run in runs]
    keys = [key for key in dict.fromkeys(key for each in settings for key in each) if key not in NOT_COMPARED]
    cells = {key: [json.dumps(each[key]) if key in each else "" for each in settings] for key in keys}
    return [(key, values) for key, values in cells.items() if len(set(values)) > 1]


def slowest(run: RecordedRun) -> str:
    """Say which ranks were the slowest how often, and how long others waited for them; empty for a single rank."""
    named = [record for record in run.steps if is_number(record.get("slowest_rank"))]
    if not named:
        return ""
    counts = dict.fromkeys(sorted({record["slowest_rank"] for record in named}), 0)
    for record in named:
        counts[record["slowest_rank"]] += 1
    often = sorted(counts, key=lambda rank: -counts[rank])[:3]
    share = ", ".join(f"rank {rank} in {100 * counts[rank] / len(named):.0f} %" for rank in often)
    waits = [
        (record["slowest_rank_seconds"] - record["mean_rank_seconds"]) / record["step_seconds"]
        for record in named
        if all(is_number(record.get(key)) for key in ("slowest_rank_seconds", "mean_rank_seconds", "step_seconds"))
        and record["step_seconds"] > 0
    ]
    waited = f"; an average rank waited {100 * statistics.fmean(waits):.1f} % of a step for it" if waits else ""
    return f"Slowest rank: {share} of the records{waited}."


def attempts(run: RecordedRun) -> list[list[str]]:
    """Return one row per start: began, from step, ended, how, step of the newest checkpoint then, error."""
    rows = []
    for attempt in run.attempts:
        ended = _moment(attempt["ended"]) if "ended" in attempt else ""
        how = str(attempt.get("how", "running, or ended without a record"))
        cells = [_moment(attempt.get("started", "")), _cell(attempt.get("from_step", "")), ended, how]
        rows.append([*cells, _cell(attempt.get("step", "")), str(attempt.get("error", ""))])
    return rows


def _cell(value: Any) -> str:
    return _number(value) if is_number(value) else str(value)


def samples(run: RecordedRun) -> list[dict[str, Any]]:
    """Return groups of rows: ``title`` (may be empty), ``called`` (what a reference is), ``rows``, number of ``more``.

    A row has its ``prompt``, its ``reference`` and the model's output at each step: ``texts`` of (label, text).
    Generated text is one group in its own order. Labels and answers are two groups, wrong and right by the last step,
    each sorted by falling score.
    """
    by_step: dict[int, list[dict[str, Any]]] = {}
    for sample in run.samples:
        by_step.setdefault(sample["step"], []).append(sample)
    found: list[dict[str, Any]] = []
    for step, those in sorted(by_step.items()):
        scored = "score" in those[0]
        label = f"after step {step:,}" if step else "before training" if scored else "frozen backbone"
        for number, sample in enumerate(those):
            if number == len(found):
                found.append({"prompt": sample["prompt"], "reference": sample["reference"], "texts": []})
            sure = f" ({sample['score']:.2f})" if "score" in sample else ""
            found[number]["texts"].append((label, sample["text"] + sure))
            found[number] |= {"score": sample.get("score"), "right": sample.get("right")}
    if not found or found[0]["right"] is None:
        return [{"title": "", "called": "reference", "rows": found, "more": 0}] if found else []
    groups = []
    for name, right in (("Wrong", False), ("Right", True)):
        rows = sorted((row for row in found if row["right"] is right), key=lambda row: -row["score"])
        title = f"{name}, most confident first: {len(rows)} of {len(found)}"
        groups.append({"title": title, "called": "label", "rows": rows[:SHOWN], "more": len(rows[SHOWN:])})
    return groups


def as_yaml(run: RecordedRun) -> str:
    """Return the resolved configuration as YAML, which is a valid run file."""
    return str(yaml.safe_dump(run.section("config"), sort_keys=False, allow_unicode=True))


def commands(run: RecordedRun) -> str:
    """Return the commands that repeat the run, given its configuration in run.yaml and an installed ptd."""
    pins = [
        f"{name}=={version}"
        for name, version in run.section("versions").items()
        if name in ("torch", "transformers", "deepspeed")
    ]
    lines = [f"pip install {shlex.join(pins)}"] if pins else []
    ranks = run.facts.get("world_size")
    if isinstance(ranks, int) and ranks > 1:
        on_cpu = " --gpus-per-node 0 --ranks-per-node" if run.facts.get("device") == "cpu" else " --gpus-per-node"
        lines.append(f"ptd launch local run.yaml{on_cpu} {ranks} output_dir=again   # {ranks} ranks, as this run had")
    else:
        lines.append("ptd train run.yaml output_dir=again")
    return "\n".join(lines)


def started_as(run: RecordedRun) -> str:
    """Return the command line of every rank, without the program's path; empty if the run was started from Python."""
    command = run.facts.get("command")
    if not isinstance(command, list) or "train" not in command[1:3]:
        return ""
    return "ptd " + shlex.join(str(part) for part in command[command.index("train", 1) :])
