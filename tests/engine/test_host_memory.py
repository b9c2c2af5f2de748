"""A process reuses freed host memory without the system; the test counts page faults in a separate process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from ptd.engine.host_memory import OWN_SETTINGS

PROGRAM = """
import resource
import torch
from ptd.engine.host_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        kept = [torch.full((10 << 20,), 1.0) for _ in range(4)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
print(keep_freed_memory())
faults()
print(faults())
"""


def run(**environment: str) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in OWN_SETTINGS}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_block_is_mapped_once() -> None:
    before, keeps, after = run()
    assert keeps == "True"
    # 16 blocks of 40 MiB, each of which glibc maps by default: 10,240 pages of 4 KiB per block, or 20 pages of 2 MiB.
    assert int(before) >= 16 * 20
    assert int(after) < int(before) / 4


def test_settings_of_the_environment_stay() -> None:
    _, keeps, _ = run(MALLOC_TRIM_THRESHOLD_="1000000")
    assert keeps == "False"
