"""Start ``ptd train`` on all ranks: with DeepSpeed's launcher on this machine or over ssh, or through Slurm."""

from ptd.launch.deepspeed import (
    Cluster,
    carried,
    environment,
    local_command,
    no_ssh_command,
    pdsh_command,
    read_hostfile,
)
from ptd.launch.program import Program
from ptd.launch.slurm import Job, directives, render_script, submit, sweep_overrides

__all__ = [
    "Cluster",
    "Job",
    "Program",
    "carried",
    "directives",
    "environment",
    "local_command",
    "no_ssh_command",
    "pdsh_command",
    "read_hostfile",
    "render_script",
    "submit",
    "sweep_overrides",
]
