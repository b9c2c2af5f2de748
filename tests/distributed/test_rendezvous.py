"""The rendezvous of ranks: it succeeds, or ranks are missing, do not fit together, or stop before the self-test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from ptd.distributed import rendezvous
from ptd.distributed.ranks import Ranks
from ptd.distributed.rendezvous import Participant, disagreement, ranks_as_text
from ptd.types import RankError, UserError

WORKER = Path(__file__).with_name("worker_rendezvous.py")
HERE = Participant(0, "node-a", {"torch": "2.13.0", "ptd": "0.1"}, None, 0, 2)
ON_GPU = replace(HERE, gpu="GPU-1", gpus=2)


def test_ranks_that_fit_together() -> None:
    assert disagreement([HERE, replace(HERE, rank=1, host="node-b")]) is None
    assert disagreement([ON_GPU, replace(ON_GPU, rank=1, gpu="GPU-2")]) is None


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            replace(HERE, rank=1, host="node-b", versions={"torch": "2.12.1", "ptd": "0.1"}),
            "different versions of torch: 2.13.0 for rank 0 on node-a, 2.12.1 for rank 1 on node-b",
        ),
        (replace(HERE, rank=1, versions={"ptd": "0.1"}), "torch: 2.13.0 for rank 0 on node-a, missing for rank 1"),
        (replace(ON_GPU, rank=1), "a CPU only for rank 0 on node-a, a GPU for rank 1 on node-a.*CUDA_VISIBLE_DEVICES"),
    ],
)
def test_ranks_that_do_not(other: Participant, said: str) -> None:
    assert re.search(said, disagreement([HERE, other]) or "")


def test_two_ranks_on_one_gpu() -> None:
    found = disagreement([replace(ON_GPU, rank=rank, gpus=1) for rank in (0, 1)])
    assert found is not None
    assert "ranks 0-1 on node-a would run on the same GPU (GPU-1)" in found
    assert "2 ranks, which see 1 of its GPUs" in found


def test_numbers_are_listed_shortly() -> None:
    assert ranks_as_text([3], "rank") == "rank 3"
    assert ranks_as_text([5, 0, 1, 2], "rank") == "ranks 0-2, 5"
    assert ranks_as_text([], "rank") == "ranks "


@pytest.mark.parametrize("port", ["", "no", "70000"])
def test_ranks_without_a_place_to_meet(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2, but MASTER_ADDR=localhost and MASTER_PORT=.* ptd launch"):
        Ranks.start()


def test_a_rank_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "MEETING", timedelta(seconds=0.2))
    with pytest.raises(UserError, match=r"ranks 1-2 of 3 did not join within 0\.2 s; rank 0 on node-a did"):
        rendezvous._meet(dist.HashStore(), HERE, 3)


def test_two_processes_that_are_the_same_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    rendezvous._meet(store, HERE, 1)
    with pytest.raises(RankError, match="rank 0 on node-a: another process has RANK=0 as well"):
        rendezvous._meet(store, HERE, 1)


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(Ranks.free_port())}
    for name, value in {**place, "GLOO_SOCKET_IFNAME": "nowhere0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match=r"over gloo: .*Set GLOO_SOCKET_IFNAME \(now nowhere0; .* has lo"):
        Ranks.start(needs_group=True)
    assert not dist.is_initialized()


def test_on_real_ranks() -> None:
    """Real ranks fail with a message if a rank stops between rendezvous and self-test, or if their versions differ."""
    running = {(case, rank): start(case, rank, port)
               for case, port in (("stopped", Ranks.free_port()), ("versions", Ranks.free_port()))
               for rank in (0, 1)}  # fmt: skip
    try:
        _, error = running["stopped", 0].communicate(timeout=250)
        assert running["stopped", 0].returncode == 2
        assert "rank 0 on" in error
        assert "did not sum one number within 6 s over gloo: rank 1 on" in error
        errors = [running["versions", rank].communicate(timeout=250)[1] for rank in (0, 1)]
        assert [running["versions", rank].returncode for rank in (0, 1)] == [2, 2]
        # The other rank fails too, but leaves the message to rank 0.
        assert ["different versions of ptd: 0 for rank 0" in error for error in errors] == [True, False]
        assert not any("Traceback" in said for said in (error, *errors))
    finally:
        for process in running.values():
            process.kill()
            process.communicate()


def start(case: str, rank: int, port: int, **environment: str) -> subprocess.Popen[str]:
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **environment}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    return subprocess.Popen(
        [sys.executable, WORKER, case],
        cwd=WORKER.parents[2],
        env={**inherited, **place},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
