"""The commands of DeepSpeed's launcher: on this machine, over ssh (pdsh), and one a node without ssh."""

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
"""What the ``deepspeed`` command runs, with this interpreter."""
CARRIED = (
    "CUBLAS_", "CUDA_", "DEEPSPEED_", "DS_", "FI_", "GLOO_", "HF_", "HUGGINGFACE_", "KMP_", "MKL_", "MLFLOW_", "MV2_",
    "NCCL_", "OMP_", "PTD_", "PYTORCH_", "TOKENIZERS_", "TORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "TRANSFORMERS_",
    "TRITON_", "UCX_", "WANDB_", "XDG_CACHE_HOME",
)  # fmt: skip
"""What the environment variables begin with that say how a run behaves, and where it finds and keeps what it needs."""
OF_ONE_NODE = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE")
SECRET = re.compile(r"TOKEN(?!IZERS_|_PATH)|KEY|SECRET|PASSWORD")
"""Names of variables that are not put on a command line, which everybody on the nodes can read."""
HOSTFILE_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")


@dataclass(frozen=True)
class Host:
    """A line of a hostfile: a node and how many ranks (GPUs) it takes."""

    name: str
    slots: int


@dataclass(frozen=True)
class Cluster:
    """The first ``nodes`` of a hostfile, and ``slots`` ranks on each (None: as the hostfile says)."""

    hostfile: Path
    nodes: int
    slots: int | None
    port: int
    log_dir: Path | None = None

    @property
    def options(self) -> list[str]:
        """Those of DeepSpeed's launcher that say so."""
        slots = [] if self.slots is None else ["--num_gpus", str(self.slots)]
        return ["--hostfile", str(self.hostfile.absolute()), "--num_nodes", str(self.nodes), *slots]


def local_command(
    program: Program, ranks: int, *, port: int, devices: str | None = None, log_dir: Path | None = None
) -> list[str]:
    """``ranks`` processes on this machine.

    ``devices`` is CUDA_VISIBLE_DEVICES, of which the first ``ranks`` are used: with ``--num_gpus`` DeepSpeed would pass
    over it and take the GPUs 0, 1, … that belong to somebody else. Raises `UserError` if they do not suffice, or are
    not numbers (DeepSpeed's ``--include`` takes no UUIDs).
    """
    which = ["--num_gpus", str(ranks)]
    if devices:
        given = devices.split(",")
        if ranks > len(given) or not all(name.strip().isdigit() for name in given):
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={devices}: {ranks} ranks need as many GPUs, given by number; change it, or "
                "lower --gpus-per-node"
            )
        which = ["--include", "localhost:" + ",".join(name.strip() for name in given[:ranks])]
    # DeepSpeed reads /job/hostfile, where there is one, unless told otherwise.
    return [*LAUNCHER, "--hostfile", os.devnull, *which, *_options(port, log_dir), "--module", *program.arguments]


def pdsh_command(
    program: Program, cluster: Cluster, *, variables: Mapping[str, str], master_addr: str | None = None
) -> list[str]:
    """The one command that starts the ranks of all nodes over ssh, with ``variables`` in their environment.

    The nodes share files and paths with this one. DeepSpeed hands over few variables, and those half quoted; so the
    ranks are started by ``env``.
    """
    for place in (os.getcwd(), str(cluster.log_dir or ".")):
        if shlex.quote(place) != place:
            raise UserError(
                f"DeepSpeed hands {place!r} unquoted to the shell of the nodes; "
                f"use a folder without these characters: {_odd(place)}"
            )
    address = [] if master_addr is None else ["--master_addr", master_addr]
    # A single node would otherwise be taken for this one.
    where = [*cluster.options, "--force_multi", *address]
    ranks = [*(f"{name}={value}" for name, value in variables.items()), sys.executable, "-u", "-m", *program.arguments]
    options = [*_options(cluster.port, cluster.log_dir), "--no_python", "env"]
    return [*LAUNCHER, *where, *options, *map(_through_pdsh, ranks)]


def carried(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The variables that ranks over ssh get from here, and the names of those that are secrets and stay here.

    Not those of the user's ``.deepspeed_env``, which DeepSpeed hands over.
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
    """The command of node ``node_rank``, to be started there."""
    where = [*cluster.options, "--no_ssh", "--node_rank", str(node_rank), "--master_addr", master_addr]
    return [*LAUNCHER, *where, *_options(cluster.port, cluster.log_dir), "--module", *program.arguments]


def environment(gpus: int) -> dict[str, str]:
    """The launcher's environment on a machine with so many GPUs."""
    # `local_command` has read it; left in place DeepSpeed would say that it ignores it.
    kept = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES" or not gpus}
    # Naming the accelerator keeps DeepSpeed from warning on every process that it found none.
    return {**kept, **({} if gpus else {"DS_ACCELERATOR": "cpu"})}


def read_hostfile(path: Path) -> list[Host]:
    """The nodes of a hostfile in DeepSpeed's form; raises `UserError` for what it would not take."""
    lines = lines_of(read_text(path, "--hostfile: cannot read"))
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        found = HOSTFILE_LINE.fullmatch(text)
        if found is None or not int(found[2]):
            raise UserError(f"--hostfile: {path}, line {number}: {text!r} is not 'NAME slots=NUMBER_OF_GPUS'")
        if found[1] in hosts:
            raise UserError(f"--hostfile: {path}, line {number}: {found[1]} stands there twice; add up its slots")
        hosts[found[1]] = Host(found[1], int(found[2]))
    if not hosts:
        raise UserError(f"--hostfile: {path} names no node; write one a line: NAME slots=NUMBER_OF_GPUS")
    return list(hosts.values())


def _options(port: int, log_dir: Path | None) -> list[str]:
    logs = [] if log_dir is None else ["--enable_each_rank_log", str(log_dir.absolute())]
    return ["--master_port", str(port), *logs, "--log_level", "error", "--no_local_rank"]


def _odd(text: str) -> str:
    return " ".join(sorted({character for character in text if shlex.quote(character) != character}))


def _through_pdsh(argument: str) -> str:
    """``argument`` so that it arrives whole: pdsh expands ``%n``, the node's shell everything a shell expands.

    DeepSpeed puts double quotes around arguments with spaces, and backslashes before the double quotes in them; it
    leaves all else to the shell.
    """
    argument = argument.replace("%", "%%")
    return re.sub(r"[\\$`]", r"\\\g<0>", argument) if " " in argument else shlex.quote(argument)
