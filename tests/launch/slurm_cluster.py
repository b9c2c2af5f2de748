"""A Slurm of two nodes on this machine: slurmctld, two slurmd and munged, with all their files in one folder."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
SBIN = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
FINAL = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}

# Both nodes are this machine, with different ports. The GPU nodes exist only in the configuration: no slurmd runs for
# them, but sbatch --test-only reports whether they could satisfy a script's request. cred_expire (120 s by default) is
# also how long a requeued job waits. MASTER_PORT depends on the job's id, so two such Slurms start from different ids.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=20
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0
SlurmdParameters=config_overrides
KillWait=5
ReturnToService=2
FirstJobId={first}
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
NodeName=gpu[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port=[1-4] CPUs=64 Gres=gpu:8 State=CLOUD
PartitionName=cpu Nodes={nodes[0]},{nodes[1]} Default=YES State=UP
PartitionName=gpu Nodes=gpu[1-4] State=UP
"""


def missing() -> str | None:
    """Return why no Slurm can be started here; None if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SBIN) is None]
    return f"no {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)" if absent else None


@dataclass(frozen=True)
class Slurm:
    """A running Slurm. Slurm's commands and ``ptd launch slurm`` reach it with ``environment``."""

    folder: Path
    nodes: tuple[str, str]
    environment: dict[str, str]

    def run(self, *command: str | Path) -> str:
        """Run one of Slurm's commands; return its output."""
        done = subprocess.run(
            [*map(str, command)], env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Return the fields of ``scontrol show job``, e.g. JobState and ExitCode."""
        words = self.run("scontrol", "show", "job", number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *, seconds: float) -> dict[str, str]:
        """Wait until the job has ended; return its fields."""
        return _until(lambda: self._ended(number), seconds, lambda: f"job {number}: {self.job(number)}\n{self.logs()}")

    def _ended(self, number: str) -> dict[str, str] | None:
        job = self.job(number)
        return job if job["JobState"] in FINAL else None

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))


@contextmanager
def start_slurm(folder: Path) -> Iterator[Slurm]:
    """Start Slurm in ``folder``; on leaving, cancel its jobs and stop it."""
    host = socket.gethostname().split(".")[0]
    # Slurm sorts the nodes of a job by name. The first name becomes MASTER_ADDR, so it has to be an address.
    nodes = (host, f"{host}-second")
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "gres.conf").write_text("NodeName=gpu[1-4] Name=gpu Count=8\n")
    config = CONFIG.format(
        host=host,
        nodes=nodes,
        user=getpass.getuser(),
        folder=folder,
        ports=_free_ports(3),
        first=1 + secrets.randbelow(10**6),
    )
    (folder / "slurm.conf").write_text(config)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    slurm = Slurm(folder, nodes, {**kept, "PATH": SBIN, "SLURM_CONF": str(folder / "slurm.conf")})
    with ExitStack() as running:
        munge = [f"--{name}={folder / file}" for name, file in MUNGE_FILES.items()]
        # Without --force, munged would refuse a folder that other users cannot enter.
        running.enter_context(_daemon(slurm, "munged", "--foreground", "--force", *munge))
        _until(lambda: (folder / "munge.socket").exists(), 20, slurm.logs)
        running.enter_context(_daemon(slurm, "slurmctld", "-D"))
        for node in nodes:
            running.enter_context(_daemon(slurm, "slurmd", "-D", "-N", node))
        idle = ["sinfo", "--noheader", "--partition", "cpu", "--format", "%D %T"]
        _until(lambda: _answer(slurm, idle).split() == ["2", "idle"], 60, slurm.logs)
        try:
            yield slurm
        finally:
            _answer(slurm, ["scancel", "--user", getpass.getuser()])
            _until(lambda: not _answer(slurm, ["squeue", "--noheader"]).strip(), 60, slurm.logs)


MUNGE_FILES = {
    "key-file": "munge.key",
    "socket": "munge.socket",
    "pid-file": "munge.pid",
    "log-file": "munge.log",
    "seed-file": "munge.seed",
}


@contextmanager
def _daemon(slurm: Slurm, name: str, *arguments: str) -> Iterator[None]:
    with (slurm.folder / f"{name}.out.log").open("a") as output:
        process = subprocess.Popen([name, *arguments], env=slurm.environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answer(slurm: Slurm, command: list[str]) -> str:
    """Return the output of a command, which may fail while the daemons are starting."""
    return subprocess.run(command, env=slurm.environment, capture_output=True, text=True, check=False).stdout


def _until(ask: Callable[[], Any], seconds: float, explain: Callable[[], str]) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"after {seconds} s not yet:\n{explain()}"
        time.sleep(0.2)
    return answer


def _free_ports(count: int) -> list[int]:
    with ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
