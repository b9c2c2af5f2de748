"""Record where a figure comes from (command, commit, hardware, versions, date), and measure the matmul rate."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ptd.versions import versions

CPU_SIZE, GPU_SIZE = 1536, 8192
"""Rows and columns of the measured product: large enough for the full rate, small enough to take only a moment."""


def evidence(*packages: str) -> dict[str, Any]:
    """Return what is stored with every figure. ``packages``: names of additional packages whose versions matter."""
    found = versions()
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "command": _command(),
        "commit": commit(),
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": found,
    }


def _command() -> str:
    """Return the command as typed, with the program's path in the clone, or its bare name if it is elsewhere."""
    program, root = Path(sys.argv[0]).resolve(), Path(__file__).parents[2].resolve()
    inside = program.relative_to(root) if program.is_relative_to(root) else Path(program.name)
    named = ["ptd"] if program.name == "ptd" or inside == Path("ptd/cli/__main__.py") else ["python", str(inside)]
    return shlex.join([*named, *sys.argv[1:]])


def commit() -> str | None:
    """Return the commit of the clone that ptd runs from, with ``+`` if tracked files differ; None without a clone."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():  # installed inside another project's clone
        return None
    head = git("rev-parse", "HEAD")
    return None if head is None else head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def hardware(device: torch.device | None = None) -> str:
    """Return the name of the GPU, or of the CPU with the number of cores that this process may use.

    The CPU's name says whether it has AMX, which multiplies bfloat16 several times as fast. ``device``: the device that
    ran; None: a GPU if there is one.
    """
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        return torch.cuda.get_device_name()
    model, amx = platform.processor(), False
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
        amx = any("amx_bf16" in line.split() for line in lines if line.startswith("flags"))
    except OSError:
        pass
    return f"{len(os.sched_getaffinity(0))} × {model or platform.machine()}{' with AMX' if amx else ''}"


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int | None = None) -> dict[str, Any]:
    """Return the FLOP/s of a square matrix product with this process's threads: the best of twelve."""
    size = size or (GPU_SIZE if device.type == "cuda" else CPU_SIZE)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        _wait(device)
        began = time.perf_counter()
        torch.mm(left, right)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return {
        "flops_per_second": 2 * size**3 / min(seconds),
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": None if device.type == "cuda" else torch.get_num_threads(),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
