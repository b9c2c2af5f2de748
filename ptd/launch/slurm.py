"""Slurm: the sbatch script of a run, rendered from ``launch/slurm/template.sbatch.j2``, and its submission."""

from __future__ import annotations

import itertools
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import yaml

from ptd.launch.program import Program
from ptd.shipped import SLURM
from ptd.types import UserError

TEMPLATE = "template.sbatch.j2"
OWN = {
    "array": "--sweep",
    "chdir": "the current directory",
    "gpus-per-node": "--gpus-per-node",
    "nodes": "--nodes",
    "ntasks": "--nodes and --ranks-per-node",
    "ntasks-per-node": "--ranks-per-node",
    "open-mode": "nothing: logs are appended to",
    "output": "--log-dir",
    "requeue": "--requeue",
}
"""Options of sbatch that the script sets itself, and what of ``ptd launch slurm`` they come from."""
CORES = 4
"""Of a rank on a GPU, where nothing is asked for: its main thread, and those that read rows, run the backward pass and
talk to the network. Slurm by itself gives one."""
ASKS_FOR_CORES = frozenset({"cpus-per-task", "cpus-per-gpu", "exclusive"})
WHY = {
    "cpus-per-task": "cores of a rank",
    "ntasks-per-node": "one task is one rank",
    "signal": "before the time limit the ranks are told to stop with a checkpoint",
    "open-mode": "a job that is queued again adds to its logs",
}


@dataclass(frozen=True)
class Job:
    """A run under Slurm.

    ``options``: sbatch's own long options without the dashes, e.g. ``{"partition": "gpu", "exclusive": None}``.
    ``sweep``: the overrides of each task of a job array; empty: one job. Nothing here is read by a shell unquoted.
    """

    program: Program
    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    chdir: Path
    log_dir: Path
    options: Mapping[str, str | None] = field(default_factory=dict)
    sweep: tuple[tuple[str, ...], ...] = ()
    requeue: bool = False
    python: str = sys.executable


def render(job: Job) -> str:
    """The sbatch script; raises `UserError` for values that a script cannot hold."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(SLURM),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = shlex.quote
    return environment.get_template(TEMPLATE).render(
        about=_about(job),
        options=[(shlex.quote(_option(name, value)), WHY.get(name)) for name, value in _options(job).items()],
        gpus_per_node=job.gpus_per_node,
        python=job.python,
        run_file=str(job.program.run_file),
        overrides=job.program.overrides,
        sweep=job.sweep,
        flags=job.program.flags,
        requeue=job.requeue,
        chdir=str(job.chdir),
        log_dir=str(job.log_dir),
    )


def submit(script: str, log_dir: Path) -> str:
    """Hand the script to sbatch; returns the job's id. A copy stays in ``log_dir``. Raises `UserError`."""
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(
            "sbatch is not on this machine; run this where jobs are submitted, or print the script with --dry-run"
        ) from error
    except OSError as error:
        raise UserError(f"--log-dir: cannot write {log_dir}: {error}") from error
    if done.returncode:
        raise UserError(f"sbatch refused the job: {done.stderr.strip() or f'exit code {done.returncode}'}")
    number = done.stdout.strip().split(";")[0]  # with several clusters: "id;cluster"
    (log_dir / f"{number}.sbatch").write_text(script, encoding="utf-8")
    return number


def directives(pairs: list[str]) -> dict[str, str | None]:
    """``key=value`` or ``key`` (a flag), each an option of sbatch; raises `UserError` for one that ptd sets itself."""
    found: dict[str, str | None] = {}
    for pair in pairs:
        name, given, value = pair.partition("=")
        name = name.removeprefix("--")
        if not name.replace("-", "").isalnum():
            raise UserError(f"--sbatch {pair}: write it as sbatch does, without dashes in front: key=value, or a flag")
        if name in OWN:
            raise UserError(f"--sbatch {pair}: {name} comes from {OWN[name]}; use that")
        found[name] = value if given else None
    return found


def sweep(program: Program, settings: list[str], output_dir: Path) -> tuple[tuple[str, ...], ...]:
    """``KEY=V1,V2,…`` -> the overrides of every combination, each with an output folder of its own.

    The values are those of a YAML list. Raises `UserError`, also where a combination is not a valid run.
    """
    choices = []
    for setting in settings:
        key, given, text = setting.partition("=")
        try:
            listed = yaml.compose(f"[{text}]", Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise UserError(f"--sweep {setting}: the values are no YAML list: {error}") from error
        if not key or not given or not isinstance(listed, yaml.SequenceNode) or not listed.value:
            raise UserError(f"--sweep {setting}: write it as key=value,value,…")
        # As they were written: 1e-3 is a number to ptd but not to YAML.
        values = [f"[{text}]"[value.start_mark.index : value.end_mark.index] for value in listed.value]
        choices.append([f"{key}={value}" for value in values])
    runs = [
        (*chosen, f"output_dir={output_dir / str(index)}")
        for index, chosen in enumerate(itertools.product(*choices))
        if choices
    ]
    for run in runs:
        Program(program.run_file, (*program.overrides, *run)).config()
    return tuple(runs)


def _options(job: Job) -> dict[str, str | None]:
    if "%" in str(job.log_dir):
        raise UserError(f"--log-dir: {job.log_dir}: Slurm takes % in a log's path for a pattern; choose another folder")
    number = "%A_%a" if job.sweep else "%j"
    return {
        "job-name": "ptd",
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.ranks_per_node),
        **({"gpus-per-node": str(job.gpus_per_node)} if job.gpus_per_node else {}),
        **({"cpus-per-task": str(CORES)} if job.gpus_per_node and not ASKS_FOR_CORES & job.options.keys() else {}),
        **job.options,
        **({"array": f"0-{len(job.sweep) - 1}"} if job.sweep else {}),
        **({"requeue": None, "signal": job.options.get("signal", "USR1@120")} if job.requeue else {}),
        "output": f"{job.log_dir}/{number}.log",
        "open-mode": "append",
    }


def _option(name: str, value: str | None) -> str:
    if value is not None and not value.isprintable():
        raise UserError(f"--{name}: {value!r} has a character that an sbatch script cannot hold in one line; remove it")
    return f"--{name}" if value is None else f"--{name}={value}"


def _about(job: Job) -> list[str]:
    ranks = f"{job.nodes} node{'s' * (job.nodes > 1)} × {job.ranks_per_node} rank{'s' * (job.ranks_per_node > 1)}"
    each = "; an array of runs, each of that size" if job.sweep else ""
    each += ", queued again when it is preempted or out of time" if job.requeue else ""
    lines = [
        f"ptd on {ranks}{each}. Written by ptd launch slurm.",
        f"By hand: mkdir -p {shlex.quote(str(job.log_dir))} (Slurm makes no folder for a log), then sbatch this file.",
    ]
    if job.requeue:
        lines += [
            "When its time ends, or it is preempted or loses a node, it is queued again under the same id; the same",
            "command then goes on from the newest checkpoint (train.save_steps).",
        ]
    return lines
