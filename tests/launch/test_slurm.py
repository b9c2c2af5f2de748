"""Slurm: the shipped and the rendered scripts, and a run that a real Slurm starts on two nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from user_project import HOSTILE, launch

from ptd.launch import Program, directives, render_script, submit, sweep_overrides
from ptd.launch.examples import EXAMPLES
from ptd.runs.metrics_log import read_records
from ptd.shipped import SLURM
from ptd.types import UserError

BOUND = 150
"""Seconds within which a job ends after it has lost a rank. With 5 s for both KillWait and SLURM_WAIT, it takes 10 s on
an idle machine; without a limit, srun would wait until the job's time limit, which is 600 s."""
JOB = EXAMPLES["single_node.sbatch"]


def start_job(slurm: Any, project: Path, *arguments: str, **variables: str) -> str:
    """Submit a job that trains on two nodes with one rank each; return its id."""
    submitted = launch(
        *("slurm", "run.yaml", f"data.prompt_template={json.dumps(HOSTILE)}", *arguments),
        *("--nodes", "2", "--gpus-per-node", "0", "--time", "10:00", "--sbatch", f"comment={HOSTILE.strip()}"),
        folder=project,
        given={**slurm.environment, **variables},
    )
    assert submitted.returncode == 0, submitted.stderr
    return submitted.stdout.strip()


def written(logs: Path, number: str) -> str:
    """Return the logs of a job and of its ranks."""
    paths = [logs / f"{number}.log", *logs.glob(f"{number}/*")]
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in paths)


def finished_job(slurm: Any, number: str, logs: Path) -> dict[str, str]:
    job = slurm.wait(number, seconds=240)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), written(logs, number)
    return dict(job)


def wait_for_step(slurm: Any, number: str, log: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not log.exists() or f"train {step}/" not in log.read_text():
        assert time.monotonic() < deadline, slurm.job(number)
        time.sleep(0.02)


def process_of(job: str, rank: str) -> int:
    """Return the process id of a rank of a job."""
    marks = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}", f"RANK={rank}"}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if marks <= set((folder / "environ").read_text(errors="replace").split("\0")):
                return int(folder.name)
    raise AssertionError(f"no process of rank {rank} of job {job}")


def parent(process: int) -> int:
    return int(re.search(r"PPid:\t(\d+)", (Path("/proc") / str(process) / "status").read_text())[1])


@pytest.fixture(scope="module")
def far(slurm: Any, project: Path) -> dict[str, str]:
    """Train in ``far`` without interruption; return the job."""
    return finished_job(slurm, start_job(slurm, project, "output_dir=far"), project / "far" / "logs")


def test_two_nodes_train_as_two_ranks_here(far: dict[str, str], project: Path, here: Path) -> None:
    assert len(list((here / "logs").glob("*_rank[01].log"))) == 2
    number, logs = far["JobId"], project / "far" / "logs"
    assert {far["NumNodes"], far["NumTasks"]} == {"2"}
    assert sorted(path.name for path in (logs / number).iterdir()) == ["rank-0.log", "rank-1.log"]
    assert "train 10/10" in (logs / number / "rank-0.log").read_text()
    assert (logs / f"{number}.sbatch").read_text().startswith("#!/bin/bash")

    whole, parts = (
        [record for record in read_records(folder) if "loss" in record] for folder in (here, project / "far")
    )
    assert [record["step"] for record in parts] == list(range(1, 11))
    assert [record["loss"] for record in parts] == pytest.approx([record["loss"] for record in whole], rel=1e-6)
    assert parts[-1]["loss"] < parts[0]["loss"]
    run = json.loads((project / "far" / "run.json").read_text())
    assert (run["status"], run["world_size"]) == ("finished", 2)
    assert run["config"]["data"]["prompt_template"] == HOSTILE
    assert not list(project.rglob("pwned"))


def test_a_job_that_is_told_to_stop_is_queued_again_and_finishes(
    slurm: Any, far: dict[str, str], project: Path
) -> None:
    number = start_job(slurm, project, "output_dir=cut", "train.save_steps=100", "--requeue")
    logs = project / "cut" / "logs"
    log = logs / number / "rank-0.log"
    wait_for_step(slurm, number, log, 2)
    slurm.run("scancel", "--signal=USR1", number)
    job = finished_job(slurm, number, logs)
    assert job["Restarts"] == "1"
    run = json.loads((project / "cut" / "run.json").read_text())
    first, second = run["attempts"]
    assert (first["how"], second["how"], first["job"], second["job"]) == ("preempted", "finished", number, number)
    assert 2 <= first["step"] == second["from_step"] < 10
    assert f"stopped after step {first['step']}" in log.read_text()
    whole, parts = ([record.get("loss") for record in read_records(project / name)] for name in ("far", "cut"))
    assert parts == whole


def test_a_node_whose_part_of_the_step_is_killed_ends_the_job(slurm: Any, project: Path) -> None:
    """The job fails when its rank there and the slurmstepd that would have reported the rank's end are killed."""
    number = start_job(slurm, project, "output_dir=lost", "train.max_steps=100000", SLURM_WAIT="5")
    log = project / "lost" / "logs" / number / "rank-0.log"
    wait_for_step(slurm, number, log, 2)
    rank = process_of(number, "1")
    stepd = parent(rank)
    assert "slurmstepd" in (Path("/proc") / str(stepd) / "cmdline").read_text()
    os.kill(stepd, signal.SIGKILL)
    os.kill(rank, signal.SIGKILL)
    try:
        job = slurm.wait(number, seconds=BOUND)
    except AssertionError as late:
        # The following tests need its nodes.
        slurm.run("scancel", number)
        raise AssertionError(f"{late}\n{written(log.parents[1], number)}") from None
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "1:0"), written(log.parents[1], number)
    assert json.loads((project / "lost" / "run.json").read_text())["status"] == "failed"


def test_slurm_takes_the_shipped_scripts(slurm: Any) -> None:
    for name in EXAMPLES:
        slurm.run("sbatch", "--test-only", "--partition", "gpu", SLURM / name)


def test_a_job_that_slurm_refuses_is_a_clean_error(slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, slurm.environment[name])
    with pytest.raises(UserError, match=r"sbatch refused the job: .*invalid partition"):
        submit(render_script(replace(JOB, options={"partition": "nowhere"})), tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--dry-run"):
        submit(render_script(JOB), tmp_path)


def test_shipped_scripts_are_what_the_template_renders() -> None:
    """The shipped scripts match the template; after a change of it, run python -m ptd.launch.examples."""
    assert {path.name for path in SLURM.glob("*.sbatch")} == EXAMPLES.keys()
    for name, job in EXAMPLES.items():
        assert (SLURM / name).read_text(encoding="utf-8") == render_script(job), name
        assert max(map(len, render_script(job).splitlines())) <= 120, name


def bash(script: str, **variables: str) -> str:
    """Run the script in bash up to its srun; return MASTER_ADDR, MASTER_PORT and the command, separated by NUL."""
    before, marker, _ = script.replace(f"cd {JOB.chdir}\n", "").partition("logs=")
    assert marker
    stand_in = 'scontrol() { printf "%s\\n" node-a node-b; }\n'
    done = subprocess.run(
        ["bash", "-c", f'{stand_in}{before}\nprintf "%s\\0" "$MASTER_ADDR" "$MASTER_PORT" "${{command[@]}}"'],
        env={"PATH": os.environ["PATH"], "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "1234567"}
        | {"SLURM_CPUS_ON_NODE": "64", "SLURM_NTASKS_PER_NODE": "8", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_the_command_of_every_array_task_is_its_own() -> None:
    program = replace(JOB.program, overrides=(f"data.prompt_template={HOSTILE}",), flags=("--overwrite", "--retry"))
    job = replace(JOB, program=program, sweep=(("train.seed=1",), (f"train.seed={HOSTILE}",)))
    for task, requeued in ((0, "0"), (1, "2")):
        address, port, *command, end = bash(
            render_script(job), SLURM_ARRAY_TASK_ID=str(task), SLURM_RESTART_COUNT=requeued
        ).split("\0")
        assert (address, port, end) == ("node-a", "24567", "")
        assert command[:3] == [job.python, "-u", "-m"]
        again = ["--overwrite", "--retry"] if requeued == "0" else []
        assert command[3:] == [*replace(program, flags=()).arguments, *job.sweep[task], *again]


@pytest.mark.parametrize(
    ("options", "gpus", "asked"),
    [
        ({}, 8, "--cpus-per-task=4"),
        ({"cpus-per-task": "16"}, 8, "--cpus-per-task=16"),
        ({"cpus-per-gpu": "6"}, 8, "--cpus-per-gpu=6"),
        ({"exclusive": None}, 8, "--exclusive"),
        ({}, 0, None),
    ],
)
def test_the_cores_that_a_job_asks_for(options: dict[str, str | None], gpus: int, asked: str | None) -> None:
    script = render_script(replace(JOB, gpus_per_node=gpus, options=options))
    assert re.findall(r"^#SBATCH (--cpus\S*|--exclusive)", script, re.MULTILINE) == ([asked] if asked else [])


@pytest.mark.parametrize(
    ("options", "cores"), [({"exclusive": None}, "2"), ({"cpus-per-task": "2"}, "2"), ({"cpus-per-task": "1"}, "1")]
)
def test_a_rank_has_its_cores(slurm: Any, tmp_path: Path, options: dict[str, str | None], cores: str) -> None:
    """A rank has its cores, and one thread per core. The nodes have two cores."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS $SLURM_CPUS_PER_TASK $RANK $LOCAL_RANK"\n')
    python.chmod(0o755)
    job = replace(
        JOB, nodes=2, gpus_per_node=0, ranks_per_node=1, options=options, python=str(python), chdir=tmp_path,
        log_dir=tmp_path / "logs",
    )  # fmt: skip
    (tmp_path / "job.sbatch").write_text(render_script(job))
    (tmp_path / "logs").mkdir()
    number = slurm.run("env", "-u", "OMP_NUM_THREADS", "sbatch", "--parsable", tmp_path / "job.sbatch").strip()
    finished_job(slurm, number, tmp_path / "logs")
    said = [(tmp_path / "logs" / number / f"rank-{rank}.log").read_text().split() for rank in (0, 1)]
    assert said == [[cores, cores, str(rank), "0"] for rank in (0, 1)]


def test_what_a_script_cannot_hold_is_refused() -> None:
    with pytest.raises(UserError, match=r"--comment: .*one line"):
        render_script(replace(JOB, options={"comment": "a\n#SBATCH --exclusive"}))
    with pytest.raises(UserError, match=r"--log-dir: .*pattern"):
        render_script(replace(JOB, log_dir=Path("/100%/j")))
    assert directives(["exclusive", "constraint=a100&nvlink", "--exclude=n[1-2]"]) == {
        "exclusive": None,
        "constraint": "a100&nvlink",
        "exclude": "n[1-2]",
    }
    for pair, message in (("nodes=3", "use that"), ("chdir=/tmp", "current directory"), ("a b=1", "as sbatch does")):
        with pytest.raises(UserError, match=message):
            directives([pair])


def test_a_sweep_is_every_combination_as_it_was_written(project: Path) -> None:
    program = Program.of(project / "run.yaml")
    out = Path("runs")
    settings = ["train.learning_rate=1e-3,5e-3", 'method={name: prompt}, {name: "prefix"}']
    assert sweep_overrides(program, settings, out) == (
        ("train.learning_rate=1e-3", "method={name: prompt}", "output_dir=runs/0"),
        ("train.learning_rate=1e-3", 'method={name: "prefix"}', "output_dir=runs/1"),
        ("train.learning_rate=5e-3", "method={name: prompt}", "output_dir=runs/2"),
        ("train.learning_rate=5e-3", 'method={name: "prefix"}', "output_dir=runs/3"),
    )
    assert sweep_overrides(program, [], out) == ()
    for setting, message in (
        ("train.seed", "key=value,value"),
        ("train.seed=", "key=value,value"),
        ("train.seed=1]", "no YAML list"),
        ("train.sed=1", "did you mean train.seed"),
    ):
        with pytest.raises(UserError, match=message):
            sweep_overrides(program, [setting], out)
