"""Slurm: render the sbatch script of a run from ``launch/slurm/template.sbatch.j2``, and submit it."""

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
    "open-mode": "a fixed value (append to the logs)",
    "output": "--log-dir",
    "requeue": "--requeue",
}
"""Options of sbatch that the script sets itself, and what determines each: mostly an option of ``ptd launch slurm``."""
CORES = 4
"""Default number of cores per rank on a GPU: for its main thread, and for the threads that read rows, run the backward
pass and communicate. Slurm's own default is one."""
ASKS_FOR_CORES = frozenset({"cpus-per-task", "cpus-per-gpu", "exclusive"})
WHY = {
    "cpus-per-task": "cores per rank",
    "ntasks-per-node": "one task is one rank",
    "signal": "before the time limit, this signal makes the ranks stop with a checkpoint",
    "open-mode": "a requeued job appends to its logs",
}


@dataclass(frozen=True)
class Job:
    """A run under Slurm.

    ``options``: long options of sbatch without the dashes, e.g. ``{"partition": "gpu", "exclusive": None}``.
    ``sweep``: the overrides of each task of a job array; empty: one job. The script quotes every value for the shell.
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


def render_script(job: Job) -> str:
    """Return the sbatch script; raise `UserError` for values that a script cannot hold."""
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
    """Submit the script with sbatch, store a copy in ``log_dir`` and return the job's id.

    Raises `UserError` if sbatch is missing or refuses the job, or if ``log_dir`` cannot be written.
    """
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(
            "sbatch is not installed on this machine; run this command on a machine that submits jobs, or print the "
            "script with --dry-run"
        ) from error
    except OSError as error:
        raise UserError(f"--log-dir: cannot write {log_dir}: {error}; give another folder") from error
    if done.returncode:
        raise UserError(f"sbatch refused the job: {done.stderr.strip() or f'exit code {done.returncode}'}")
    number = done.stdout.strip().split(";")[0]  # with several clusters: "id;cluster"
    (log_dir / f"{number}.sbatch").write_text(script, encoding="utf-8")
    return number


def directives(pairs: list[str]) -> dict[str, str | None]:
    """Return the options of sbatch in ``pairs``, each ``key=value`` or ``key`` (a flag).

    Raises `UserError` for an option that ptd sets itself.
    """
    found: dict[str, str | None] = {}
    for pair in pairs:
        name, given, value = pair.partition("=")
        name = name.removeprefix("--")
        if not name.replace("-", "").isalnum():
            raise UserError(
                f"--sbatch {pair}: this is no option of sbatch; write it as sbatch does, without leading dashes: "
                "key=value, or a flag"
            )
        if name in OWN:
            raise UserError(f"--sbatch {pair}: ptd sets {name} from {OWN[name]}; use that, and remove the option")
        found[name] = value if given else None
    return found


def sweep_overrides(program: Program, settings: list[str], output_dir: Path) -> tuple[tuple[str, ...], ...]:
    """Return the overrides of every combination of the settings ``KEY=V1,V2,…``, each with its own output folder.

    The values are the items of a YAML list. Raises `UserError` for a malformed setting or an invalid combination.
    """
    choices = []
    for setting in settings:
        key, given, text = setting.partition("=")
        try:
            listed = yaml.compose(f"[{text}]", Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise UserError(f"--sweep {setting}: the values are no YAML list: {error}") from error
        if not key or not given or not isinstance(listed, yaml.SequenceNode) or not listed.value:
            raise UserError(f"--sweep {setting}: a key or its values are missing; write it as key=value,value,…")
        # Keep the values as written: ptd reads 1e-3 as a number, but YAML does not.
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
        raise UserError(
            f"--log-dir: {job.log_dir}: Slurm reads % in a log's path as a filename pattern; choose another folder"
        )
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
        raise UserError(
            f"--{name}: {value!r} has a character that an option on one line of an sbatch script cannot hold; remove it"
        )
    return f"--{name}" if value is None else f"--{name}={value}"


def _about(job: Job) -> list[str]:
    ranks = f"{job.nodes} node{'s' * (job.nodes > 1)} × {job.ranks_per_node} rank{'s' * (job.ranks_per_node > 1)}"
    each = "; a job array of runs, each of that size" if job.sweep else ""
    each += ", requeued when it is preempted or reaches its time limit" if job.requeue else ""
    lines = [
        f"ptd on {ranks}{each}. Written by ptd launch slurm.",
        f"By hand: mkdir -p {shlex.quote(str(job.log_dir))} (Slurm does not create it), then sbatch this file.",
    ]
    if job.requeue:
        lines += [
            "When the job reaches its time limit, is preempted or loses a node, it is requeued under the same id. The",
            "same command then continues from the newest checkpoint (train.save_steps).",
        ]
    return lines
