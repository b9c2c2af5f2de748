"""The timeout of the process group comes from the environment, and the GPU from LOCAL_RANK if several are visible."""

from __future__ import annotations

import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from ptd.distributed import ranks
from ptd.distributed.ranks import TIMEOUT, Ranks, collective_timeout, device_of
from ptd.types import UserError


def test_timeout_is_settable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TIMEOUT, raising=False)
    assert collective_timeout() == timedelta(minutes=30)
    monkeypatch.setenv(TIMEOUT, "1.5")
    assert collective_timeout() == timedelta(seconds=90)


@pytest.mark.parametrize("given", ["", "soon", "0", "-5", "nan", "inf", "1e-9"])
def test_a_timeout_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(TIMEOUT, given)
    with pytest.raises(UserError, match=TIMEOUT):
        Ranks.start(needs_group=True)


def see(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    """Make torch see this number of GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


@pytest.mark.parametrize(("gpus", "local_rank", "device"), [(4, 3, "cuda:3"), (1, 3, "cuda:0"), (0, 3, "cpu")])
def test_the_device_of_a_rank(monkeypatch: pytest.MonkeyPatch, gpus: int, local_rank: int, device: str) -> None:
    see(monkeypatch, gpus)
    assert device_of(local_rank) == torch.device(device)


def test_a_rank_beyond_the_gpus_it_sees_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setenv("LOCAL_RANK", "2")
    said = r"LOCAL_RANK=2, but this process sees 2 GPUs, numbered from 0 \(CUDA_VISIBLE_DEVICES=4,5\); start one"
    with pytest.raises(UserError, match=said):
        Ranks.start(needs_group=True)


@pytest.mark.parametrize("others", [{}, {"OMPI_COMM_WORLD_LOCAL_RANK": "3"}])
def test_deepspeed_takes_the_only_gpu_that_a_rank_sees(monkeypatch: pytest.MonkeyPatch, others: dict[str, str]) -> None:
    """DeepSpeed uses the only visible GPU, as in the fourth task on a node with Slurm's --gpus-per-task=1."""
    see(monkeypatch, 1)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-3"))
    monkeypatch.setattr(ranks, "join_group", lambda *arguments: None)
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "3"}
    for name, value in (place | others).items():
        monkeypatch.setenv(name, value)
    device = Ranks.start(needs_group=True).device
    # deepspeed.zero.Init, its buffers and deepspeed.initialize use the GPU that this variable names.
    taken = torch.device(CUDA_Accelerator().device_name(os.environ["LOCAL_RANK"]))
    assert [device, *chosen] == [taken] * 2 == [torch.device("cuda", 0)] * 2
    assert {os.environ[name] for name in others} <= {"0"}  # DeepSpeed asserts that they agree
