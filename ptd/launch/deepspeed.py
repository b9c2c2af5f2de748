"""The commands of DeepSpeed's launcher: on this machine, over ssh (pdsh), and one per node without ssh."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ptd.files import lines_of, read_text
from ptd.launch.program import Program
from ptd.types import UserError

LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner"]
"""The ``deepspeed`` command, run with this interpreter."""
CARRIED = (
    "CUBLAS_", "CUDA_", "DEEPSPEED_", "DS_", "FI_", "GLOO_", "HF_", "HUGGINGFACE_", "KMP_", "MKL_", "MLFLOW_", "MV2_",
    "NCCL_", "OMP_", "PTD_", "PYTORCH_", "TOKENIZERS_", "TORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "TRANSFORMERS_",
    "TRITON_", "UCX_", "WANDB_", "XDG_CACHE_HOME",
)  # fmt: skip
"""Prefixes of the environment variables that set how a run behaves and where it finds and stores its files."""
OF_ONE_NODE = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE")
SECRET = re.compile(r"TOKEN(?!IZERS_|_PATH)|KEY|SECRET|PASSWORD")
"""Names of variables that stay off command lines, because every user on the nodes can read those."""
HOSTFILE_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")


@dataclass(frozen=True)
class Host:
    """A line of a hostfile: a node and its number of ranks (GPUs)."""

    name: str
    slots: int


@dataclass(frozen=True)
class Cluster:
    """The first ``nodes`` nodes of a hostfile, with ``slots`` ranks on each (None: the slots in the hostfile)."""

    hostfile: Path
    nodes: int
    slots: int | None
    port: int
    log_dir: Path | None = None

    @property
    def options(self) -> list[str]:
        """The launcher options that select these nodes and ranks."""
        slots = [] if self.slots is None else ["--num_gpus", str(self.slots)]
        return ["--hostfile", str(self.hostfile.absolute()), "--num_nodes", str(self.nodes), *slots]


def local_command(
    program: Program, ranks: int, *, port: int, devices: str | None = None, log_dir: Path | None = None
) -> list[str]:
    """Return the command that starts ``ranks`` processes on this machine.

    ``devices`` is CUDA_VISIBLE_DEVICES, of which the first ``ranks`` are used. With ``--num_gpus`` instead, DeepSpeed
    would ignore it and use the GPUs 0, 1, …, which may belong to other users. Raises `UserError` if the devices are too
    few or are not numbers (DeepSpeed's ``--include`` accepts no UUIDs).
    """
    which = ["--num_gpus", str(ranks)]
    if devices:
        given = devices.split(",")
        if ranks > len(given) or not all(name.strip().isdigit() for name in given):
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={devices}: {ranks} ranks need as many GPUs, given by their numbers; change "
                "CUDA_VISIBLE_DEVICES, or lower --gpus-per-node"
            )
        which = ["--include", "localhost:" + ",".join(name.strip() for name in given[:ranks])]
    # Without --hostfile, DeepSpeed reads /job/hostfile if it exists.
    return [*LAUNCHER, "--hostfile", os.devnull, *which, *_options(port, log_dir), "--module", *program.arguments]


def pdsh_command(
    program: Program, cluster: Cluster, *, variables: Mapping[str, str], master_addr: str | None = None
) -> list[str]:
    """Return the command that starts the ranks of all nodes over ssh, with ``variables`` in their environment.

    The nodes share files and paths with this machine. DeepSpeed passes only a few variables on and quotes them
    incompletely, so ``env`` starts the ranks with them. Raises `UserError` if the current folder or ``log_dir`` has
    characters that need quotes.
    """
    for place in (os.getcwd(), str(cluster.log_dir or ".")):
        if shlex.quote(place) != place:
            raise UserError(
                f"DeepSpeed passes the folder {place!r} unquoted to the shell of the nodes; "
                f"use a folder without these characters: {_odd(place)}"
            )
    address = [] if master_addr is None else ["--master_addr", master_addr]
    # Without --force_multi, DeepSpeed would start a single node's ranks on this machine.
    where = [*cluster.options, "--force_multi", *address]
    ranks = [*(f"{name}={value}" for name, value in variables.items()), sys.executable, "-u", "-m", *program.arguments]
    options = [*_options(cluster.port, cluster.log_dir), "--no_python", "env"]
    return [*LAUNCHER, *where, *options, *map(_through_pdsh, ranks)]


def carried(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the variables to pass to ranks over ssh, and the names of those that are secrets and are not passed.

    Variables in the user's ``.deepspeed_env`` are left out, because DeepSpeed itself passes them on.
    """
    file = environment.get("DS_ENV_FILE", ".deepspeed_env")
    given = {line.partition("=")[0].strip() for folder in (Path.home(), Path()) for line in _lines(folder / file)}
    names = sorted(name for name in environment if name.startswith(CARRIED) and name not in (*OF_ONE_NODE, *given))
    return (
        {name: environment[name] for name in names if not SECRET.search(name)},
        [name for name in names if SECRET.search(name)],
    )


def _lines(path: Path) -> list[str]:
    return lines_of(read_text(path, "cannot read")) if path.is_file() else []


def no_ssh_command(program: Program, cluster: Cluster, *, node_rank: int, master_addr: str) -> list[str]:
    """Return the command that starts the ranks of node ``node_rank``; it has to run on that node."""
    where = [*cluster.options, "--no_ssh", "--node_rank", str(node_rank), "--master_addr", master_addr]
    return [*LAUNCHER, *where, *_options(cluster.port, cluster.log_dir), "--module", *program.arguments]


def environment(gpus: int) -> dict[str, str]:
    """Return the environment of the launcher for ranks on ``gpus`` GPUs (0: on the CPU)."""
    # `local_command` has read CUDA_VISIBLE_DEVICES; if it stayed, DeepSpeed would warn that it ignores it.
    kept = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES" or not gpus}
    # With the accelerator named, DeepSpeed does not warn in every process that it found none.
    return {**kept, **({} if gpus else {"DS_ACCELERATOR": "cpu"})}


def read_hostfile(path: Path) -> list[Host]:
    """Return the nodes of a hostfile in DeepSpeed's format; raise `UserError` if DeepSpeed would not accept it."""
    lines = lines_of(read_text(path, "--hostfile: cannot read"))
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        found = HOSTFILE_LINE.fullmatch(text)
        if found is None or not int(found[2]):
            raise UserError(
                f"--hostfile: {path}, line {number}: {text!r} is not 'NAME slots=NUMBER_OF_GPUS'; correct the line"
            )
        if found[1] in hosts:
            raise UserError(
                f"--hostfile: {path}, line {number}: {found[1]} occurs twice; write one line with the sum of its slots"
            )
        hosts[found[1]] = Host(found[1], int(found[2]))
    if not hosts:
        raise UserError(f"--hostfile: {path} names no node; write one node per line: NAME slots=NUMBER_OF_GPUS")
    return list(hosts.values())


def _options(port: int, log_dir: Path | None) -> list[str]:
    logs = [] if log_dir is None else ["--enable_each_rank_log", str(log_dir.absolute())]
    return ["--master_port", str(port), *logs, "--log_level", "error", "--no_local_rank"]


def _odd(text: str) -> str:
    return " ".join(sorted({character for character in text if shlex.quote(character) != character}))


def _through_pdsh(argument: str) -> str:
    """Return ``argument`` quoted so that it reaches the rank unchanged.

    pdsh expands ``%n``, and the node's shell expands what any shell expands. DeepSpeed puts double quotes around
    arguments with spaces and backslashes before the double quotes in them; it quotes nothing else.
    """
    argument = argument.replace("%", "%%")
    return re.sub(r"[\\$`]", r"\\\g<0>", argument) if " " in argument else shlex.quote(argument)
