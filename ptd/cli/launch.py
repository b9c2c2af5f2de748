"""``ptd launch local``, ``ssh`` and ``slurm``: the commands that start runs on several GPUs and nodes."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from ptd.cli.common import Overrides, Overwrite, Retry, RunFile, at_home
from ptd.errors import UserError

app = typer.Typer(
    help="Start ptd train on several GPUs and nodes. It starts on this machine, over ssh, or through Slurm.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the command or script instead of running it.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="The ranks print only the result and errors, without progress.")
]
LogDir = Annotated[
    Path | None, typer.Option(help="Folder for one log per rank, instead of output to the terminal.", callback=at_home)
]
RanksPerNode = Annotated[
    int | None, typer.Option(min=1, help="Processes per node without GPUs. With GPUs, each GPU gets one process.")
]


@app.command()
def local(
    run: RunFile,
    overrides: Overrides = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="GPUs to use; default: all visible GPUs. 0: run on the CPU.")
    ] = None,
    ranks_per_node: RanksPerNode = None,
    log_dir: LogDir = None,
    master_port: Annotated[
        int | None, typer.Option(min=1, help="Port of the rendezvous; default: a free port.")
    ] = None,
    overwrite: Overwrite = False,
    retry: Retry = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
) -> None:
    """Start the run on this machine's GPUs, with DeepSpeed's launcher."""
    import torch

    from ptd.distributed.ranks import Ranks
    from ptd.launch import Program, environment, local_command

    program = Program.of(run, overrides, overwrite=overwrite, retry=retry, quiet=quiet)
    program.config()
    there = torch.cuda.device_count()
    gpus = there if gpus_per_node is None else gpus_per_node
    if gpus > there:
        raise UserError(
            f"--gpus-per-node: {gpus} requested, but PyTorch sees {there} GPUs on this machine; give a lower number, "
            "or 0 to run on the CPU"
        )
    command = local_command(
        program,
        _ranks(gpus, ranks_per_node),
        port=master_port or Ranks.free_port(),
        devices=os.environ.get("CUDA_VISIBLE_DEVICES") if gpus else None,
        log_dir=log_dir,
    )
    _become(command, environment(gpus), dry_run)


@app.command()
def ssh(
    run: RunFile,
    hostfile: Annotated[Path, typer.Option(help="File with one line per node: NAME slots=GPUS.", callback=at_home)],
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Use the hostfile's first N nodes; default: all.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs per node; default: the node's slots.")] = None,
    no_ssh: Annotated[
        bool, typer.Option("--no-ssh", help="Start only this node's ranks; run the command on every node.")
    ] = False,
    node_rank: Annotated[
        int | None, typer.Option(min=0, help="With --no-ssh: this node's line in the hostfile, counted from 0.")
    ] = None,
    master_addr: Annotated[
        str | None,
        typer.Option(help="Address at which the nodes reach the first node; default: its name in the hostfile."),
    ] = None,
    master_port: Annotated[int, typer.Option(min=1, help="Port of the rendezvous, free on the first node.")] = 29500,
    log_dir: LogDir = None,
    overwrite: Overwrite = False,
    retry: Retry = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
) -> None:
    """Start the run on the nodes of a hostfile with DeepSpeed's launcher: all through pdsh, or one with --no-ssh.

    All nodes need the same paths: this Python environment, the current folder, model and data.
    """
    from ptd.launch import Cluster, Program, carried, no_ssh_command, pdsh_command, read_hostfile

    program = Program.of(run, overrides, overwrite=overwrite, retry=retry, quiet=quiet)
    program.config()
    hosts = read_hostfile(hostfile)
    if nodes is not None and nodes > len(hosts):
        raise UserError(
            f"--nodes: {nodes} requested, but {hostfile} names {len(hosts)}; give a lower number, or add nodes to it"
        )
    hosts = hosts[:nodes]
    small = [host for host in hosts if gpus_per_node is not None and gpus_per_node > host.slots]
    if small:
        raise UserError(
            f"--gpus-per-node: {gpus_per_node} requested, but {small[0].name} has slots={small[0].slots} in the "
            "hostfile; give a lower number, or correct the hostfile"
        )
    cluster = Cluster(hostfile, len(hosts), gpus_per_node, master_port, log_dir)
    if not no_ssh:
        if node_rank is not None:
            raise UserError("--node-rank: over ssh this command starts all nodes; remove --node-rank, or add --no-ssh")
        if not dry_run and shutil.which("pdsh") is None:
            raise UserError("pdsh is not installed on this machine; install it (apt-get install pdsh), or use --no-ssh")
        variables, secrets = carried(os.environ)
        if secrets:
            print(
                f"ptd: not passed to the nodes, where every user could read them: {', '.join(secrets)}; log in on the "
                "nodes, or store the secrets in a file in your home folder",
                file=sys.stderr,
            )
        command = pdsh_command(program, cluster, variables=variables, master_addr=master_addr)
        # DeepSpeed itself would pass some of these variables on, but the node's shell would expand their values.
        settled = {name for name in (*variables, *secrets) if not name.startswith("DS_")}
        own = {name: value for name, value in os.environ.items() if name not in settled}
        _become(command, own, dry_run)
        return
    if node_rank is None and not dry_run:
        raise UserError(
            f"--no-ssh: this node's place in the hostfile is not known; add --node-rank, 0 to {len(hosts) - 1}, or "
            "--dry-run, which prints the command of every node"
        )
    if node_rank is not None and node_rank >= len(hosts):
        raise UserError(f"--node-rank: there is no node {node_rank}; the {len(hosts)} nodes are counted from 0")
    for index in range(len(hosts)) if node_rank is None else [node_rank]:
        if dry_run:
            print(f"# node {index}: {hosts[index].name}")
        address = master_addr or hosts[0].name
        command = no_ssh_command(program, cluster, node_rank=index, master_addr=address)
        _become(command, dict(os.environ), dry_run)


@app.command()
def slurm(
    run: RunFile,
    nodes: Annotated[int, typer.Option(min=1)],
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs per node; 0: nodes without GPUs.")],
    overrides: Overrides = None,
    ranks_per_node: RanksPerNode = None,
    partition: Annotated[str | None, typer.Option(help="Passed to sbatch, like the options down to --mem.")] = None,
    account: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, e.g. 12:00:00.")] = None,
    job_name: Annotated[str | None, typer.Option()] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="Cores per rank; default with GPUs: 4.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory per node, e.g. 200G.")] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="Any other option of sbatch: key=value, or a flag; repeatable.", metavar="KEY[=VALUE]"),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="Several values of a key; repeatable. A job array trains one run per combination.",
            metavar="KEY=V1,V2,...",
        ),
    ] = None,
    requeue: Annotated[
        bool, typer.Option("--requeue", help="Requeue the job when it is preempted or reaches its time limit.")
    ] = False,
    log_dir: Annotated[
        Path | None, typer.Option(help="Folder of the logs; default: logs in output_dir.", callback=at_home)
    ] = None,
    overwrite: Overwrite = False,
    retry: Retry = False,
    dry_run: DryRun = False,
) -> None:
    """Submit the run to Slurm and print the job's id. --dry-run prints the sbatch script instead."""
    from ptd.launch import Job, Program, directives, render_script, submit, sweep_overrides

    program = Program.of(run, overrides, overwrite=overwrite, retry=retry)
    config = program.config()
    if requeue and config.train.save_steps is None:
        raise UserError(
            "--requeue: a requeued job continues from its newest checkpoint, but this run writes none; set "
            "train.save_steps"
        )
    named = {
        "job-name": job_name,
        "partition": partition,
        "account": account,
        "qos": qos,
        "time": time,
        "cpus-per-task": None if cpus_per_task is None else str(cpus_per_task),
        "mem": mem,
    }
    job = Job(
        program,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=_ranks(gpus_per_node, ranks_per_node),
        chdir=Path.cwd(),
        log_dir=(log_dir or config.output_dir / "logs").absolute(),
        options={name: value for name, value in named.items() if value is not None} | directives(sbatch or []),
        sweep=sweep_overrides(program, sweep or [], config.output_dir),
        requeue=requeue,
    )
    script = render_script(job)
    if dry_run:
        print(script, end="")
        return
    number = submit(script, job.log_dir)
    print(number)
    print(f"logs: {job.log_dir}/{number}*\nstate: squeue --job {number}", file=sys.stderr)


def _ranks(gpus: int, ranks: int | None) -> int:
    if gpus and ranks not in (None, gpus):
        raise UserError(
            f"--ranks-per-node: {ranks} ranks on {gpus} GPUs, but each GPU takes one rank; remove the option"
        )
    return gpus or ranks or 1


def _become(command: list[str], environment: dict[str, str], dry_run: bool) -> None:
    """Print the command if ``dry_run``; otherwise replace this process by it (same signals, output and exit code)."""
    if dry_run:
        print(shlex.join(command))
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, environment)
