"""Ranks exchange objects between their processes without waiting for a GPU, and checkpoints wait for no rank."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import BackendConfig

from ptd.distributed import rendezvous
from ptd.distributed.ranks import collective_timeout
from ptd.distributed.rendezvous import Participant, backends_for, join_group

WORKER = Path(__file__).with_name("worker_host.py")
GPU = torch.device("cuda", 1)


@pytest.fixture(scope="module")
def found(launch: Any, backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("host")
    launch(2, WORKER, backbone_dir, folder)
    return [json.loads((folder / f"found.{rank}").read_text()) for rank in (0, 1)]


def test_what_is_on_the_host_goes_through_the_hosts_backend(found: list[dict[str, Any]]) -> None:
    for here in found:
        assert here["backend"] == "cpu:gloo,cuda:fake"
        assert (here["gathered"], here["any"], here["on main"], here["raised"]) == (
            [0, 1],
            [True, False],
            "said by 0",
            "no",
        )
        assert here["long"] == ["said by 0", True]
        assert here["left"] == [[0, 10], None]
        assert here["of a group"] == ["cpu:gloo,cuda:fake", [0, 1]]


def test_deepspeed_takes_the_group_that_is_there(found: list[dict[str, Any]], backbone_dir: Path) -> None:
    assert all(here["deepspeed"] for here in found)
    assert len({here[sharding] for here in found for sharding in ("world", "node")}) == 1


def test_a_checkpoint_in_flight_waits_for_no_rank_and_is_completed_by_polling(found: list[dict[str, Any]]) -> None:
    first, _ = found
    assert (first["before"], first["completed by polling"]) == ("None", "step-000001\n")
    for here in found:
        assert (here["kept"], here["failed"]) == (["latest", "step-000001", "step-000002"], False)


def test_a_rank_that_cannot_write_knows_and_all_hear_of_it(found: list[dict[str, Any]]) -> None:
    assert [here["knows"] for here in found] == [False, True]
    for here in found:
        assert re.search(r"step 3 could not be written .*\(rank 1: .*No space left", here["said"])
        assert here["remains"] == []


# ---- on GPUs


@pytest.mark.parametrize(("world_size", "bound"), [(2, GPU), (1, None)])
def test_the_process_group_of_ranks_on_gpus(
    monkeypatch: pytest.MonkeyPatch, world_size: int, bound: torch.device | None
) -> None:
    asked: dict[str, Any] = {}
    tried: list[str] = []
    monkeypatch.setattr(rendezvous, "_store", lambda member, size: dist.HashStore())
    monkeypatch.setattr(rendezvous, "_meet", lambda *arguments: None)
    monkeypatch.setattr(rendezvous, "_try_out", lambda size, device: tried.append(device.type))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: asked.update(options, backend=backend))
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=lo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that monkeypatch removes the value that join_group sets
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    join_group(Participant(0, "node-a", {}, "GPU-1", 2, 2), GPU, world_size, collective_timeout())
    assert BackendConfig(asked["backend"]).get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}
    assert (asked["device_id"], tried) == (bound, ["cpu", "cuda"])
    assert rendezvous.os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    said = rendezvous.advice(backends_for(GPU))
    assert said.startswith("Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (now lo, =lo; ")
