"""The watchdog ends a process that makes no progress, and no other process."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptd.engine.watchdog import Watchdog, Watched
from ptd.errors import FATAL
from ptd.types import Reporter

HANGS = {
    "waiting": "threading.Event().wait()",
    # PyDLL calls without releasing the interpreter's lock: no other Python thread can run.
    "holding the interpreter's lock": "ctypes.PyDLL(None).sleep(60)",
}
PROGRAM = """
import ctypes, sys, threading
from pathlib import Path
from ptd.engine.watchdog import Watchdog

def hanging():
    {hang}

with Watchdog(0.4, Path(sys.argv[1]), 3) as watchdog:
    for number in range(5):
        watchdog.beat(f"step {{number}}")
        threading.Event().wait(0.2)
    hanging()
"""


@pytest.mark.parametrize("hang", HANGS)
def test_a_hang_ends_the_process_with_its_stacks(tmp_path: Path, hang: str) -> None:
    stacks = tmp_path / "logs" / "rank-3.stacks"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(hang=HANGS[hang]), str(stacks)],
        env={"PYTHONPATH": ":".join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == FATAL, done.stderr
    content = stacks.read_text()
    assert "in hanging" in content
    assert "in _watch" in content
    if hang == "waiting":
        assert "rank 3 on " in content
        assert content.count(" in step 4\n") == 1
        assert done.stderr.endswith(f" in step 4; stopping this process. Stacks of all threads: {stacks}\n")


def test_progress_keeps_it_quiet_and_leaves_nothing(tmp_path: Path) -> None:
    with Watchdog(1.0, tmp_path / "logs" / "rank-0.stacks", 0) as watchdog:
        reporter = Watched(Reporter(), watchdog)
        for number in range(30):
            reporter.advance("eval", number)
            time.sleep(0.05)
        assert (tmp_path / "logs" / "rank-0.stacks").exists()
    assert not (tmp_path / "logs").exists()


def test_other_logs_and_earlier_stacks_stay(tmp_path: Path) -> None:
    stacks = tmp_path / "logs" / "rank-0.stacks"
    stacks.parent.mkdir()
    stacks.write_text("earlier\n")
    with Watchdog(60, stacks, 0):
        pass
    assert stacks.read_text() == "earlier\n"


def test_zero_switches_it_off(tmp_path: Path) -> None:
    with Watchdog(0, tmp_path / "logs" / "rank-0.stacks", 0) as watchdog:
        watchdog.beat("step 1")
        assert not list(tmp_path.iterdir())
