"""How the ranks of a run find each other: a bounded meeting that says who is missing, a comparison, and a trial sum.

torch's own rendezvous waits as long as the process group's collectives may take, and then says how many are missing.
Here every rank first leaves a note about itself in the store at MASTER_ADDR; rank 0 reads them all, names the ranks
that left none and what does not fit together, and everyone raises what it found. Then the process group is made and has
to compute one sum.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ptd.types import RankError, UserError
from ptd.versions import versions

MEETING = timedelta(minutes=10)
"""Until when all ranks have to be there: importing torch from a busy shared disk takes minutes."""
TRIAL = timedelta(minutes=3)
"""Until when the ranks, who know of each other, have to have summed one number."""
STEP = timedelta(seconds=5)
"""For a question to the store that is answered at once or never."""
_meetings = count()


@dataclass(frozen=True)
class Member:
    """A rank as it describes itself: where it runs, with what, and on which of the GPUs that it sees.

    ``gpu``: the UUID of its GPU; None: it runs on the CPU. ``gpus``: how many it sees; ``local_ranks``: how many ranks
    its launcher says there are on its node.
    """

    rank: int
    host: str
    versions: dict[str, str]
    gpu: str | None
    gpus: int
    local_ranks: int

    @classmethod
    def this(cls, rank: int, local_ranks: int, device: torch.device) -> Member:
        """The process that asks."""
        gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
        return cls(rank, socket.gethostname(), versions(), gpu, torch.cuda.device_count(), local_ranks)

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def join(member: Member, device: torch.device, world_size: int, timeout: timedelta) -> None:
    """Make the default process group of ``world_size`` ranks, of which this one runs on ``device``.

    ``timeout`` is that of its collectives; making it is bounded by `MEETING` and `TRIAL`. Raises `UserError` on all
    ranks for ranks that do not come or do not fit together, `RankError` on a rank that cannot reach the others.
    """
    # A launcher that starts the ranks anew may keep the store of the last time.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"ptd-{attempt}-{next(_meetings)}", _store(member, world_size))
    _meet(store, member, world_size)
    backends = backends_for(device)
    if "nccl" in backends.values():
        _share_interface()
    try:
        with _bounded(TRIAL, lambda: _stuck(store, member, world_size, backends)):
            store.set(f"trial/{member.rank}", "begun")
            dist.init_process_group(
                ",".join(f"{kind}:{backend}" for kind, backend in backends.items()) if len(backends) > 1 else "gloo",
                store=store,
                rank=member.rank,
                world_size=world_size,
                timeout=timeout,
                # Connects at once, so that what fails is found here. A rank alone has nobody to connect to.
                device_id=device if device.type == "cuda" and world_size > 1 else None,
            )
            for kind in backends:
                _try_out(world_size, torch.device(kind))
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        raise RankError(
            f"{member} cannot exchange data with the others by {_names(backends)}: {reason}. {advice(backends)}"
        ) from error


def backends_for(device: torch.device) -> dict[str, str]:
    """What tensors go through, by the kind of device they are on.

    What is on the host (objects, flags) goes through gloo: through a GPU it would wait for all that runs there.
    """
    return {"cpu": "gloo", "cuda": "nccl"} if device.type == "cuda" else {"cpu": "gloo"}


def _share_interface() -> None:
    """Let gloo take the network interface that NCCL is told to take, if that is one and gloo is told nothing."""
    name = os.environ.get("NCCL_SOCKET_IFNAME", "").removeprefix("=")
    if name in {there for _, there in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _names(backends: Mapping[str, str]) -> str:
    return " and ".join(backends.values())


def _try_out(world_size: int, device: torch.device) -> None:
    """One all-reduce and one all-gather, with the right results."""
    rank = dist.get_rank()
    total = torch.full((1,), float(rank), device=device)
    dist.all_reduce(total)
    everyone = [torch.empty(1, device=device) for _ in range(world_size)]
    dist.all_gather(everyone, torch.full((1,), float(rank), device=device))
    found = [int(value) for value in everyone]
    if int(total) != sum(range(world_size)) or found != list(range(world_size)):
        raise RuntimeError(f"the ranks' numbers came as {found} and sum {int(total)}, which is wrong")


def _store(member: Member, world_size: int) -> Store:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal() or int(port) >= 2**16:
        raise RankError(
            f"{member}: WORLD_SIZE is {world_size}, but MASTER_ADDR={address} and MASTER_PORT={port or None} do not "
            "say where the ranks meet; start them by ptd launch, or set both to a host and free port of rank 0"
        )
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's own process holds the store
            store: Store = next(rendezvous("env://", timeout=MEETING))[0]
            return store
        return dist.TCPStore(  # type: ignore[attr-defined]
            address, int(port), world_size, member.rank == 0, MEETING, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        if member.rank == 0:
            what = (
                "Set MASTER_PORT to a port that is free on the node of rank 0 and MASTER_ADDR to that node, and see "
                "that no other process has RANK=0"
            )
        else:
            what = (
                "MASTER_ADDR has to be the node of rank 0 under a name and address that all nodes reach, MASTER_PORT "
                "open in its firewall, and rank 0 running"
            )
        raise RankError(f"{member} cannot meet the other ranks at {address}:{port}: {reason}. {what}") from error


def _meet(store: Store, member: Member, world_size: int) -> None:
    """Wait for a note of every rank and compare them; every rank raises what rank 0 found."""
    try:
        if store.add(f"taken/{member.rank}", 1) > 1:
            raise RankError(
                f"{member}: there is another process with RANK={member.rank}; give every process its own, from 0 to "
                f"{world_size - 1}"
            )
        store.set(f"member/{member.rank}", json.dumps(asdict(member)))
        if member.rank == 0:
            store.set("verdict", _verdict(store, world_size))
        store.wait(["verdict"], 2 * MEETING)
        verdict = store.get("verdict").decode()
        if verdict:
            _leave(store, member, world_size)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        raise RankError(f"{member} lost the other ranks while they met: {reason}. See what rank 0 says") from error
    if verdict:
        raise UserError(verdict)


def _leave(store: Store, member: Member, world_size: int) -> None:
    """Give the others a moment to read why all stop: the store ends with rank 0."""
    store.set(f"left/{member.rank}", "")
    if member.rank == 0:
        there = [rank for rank in range(world_size) if store.check([f"member/{rank}"])]
        with suppress(RuntimeError):
            store.wait([f"left/{rank}" for rank in there], STEP)


def _verdict(store: Store, world_size: int) -> str:
    """What is wrong with the ranks; empty: nothing."""
    notes = [f"member/{rank}" for rank in range(world_size)]
    try:
        store.wait(notes, MEETING)
    except dist.DistError:
        there = [rank for rank, note in enumerate(notes) if store.check([note])]
        hosts = sorted({_member(store, rank).host for rank in there})
        missing = sorted(set(range(world_size)) - set(there))
        return (
            f"{listed(missing, 'rank')} of {world_size} did not come within {_seconds(MEETING)}; "
            f"{listed(there, 'rank')} on {', '.join(hosts)} did. Look at the log of the missing: they did not start, "
            "failed before this, or cannot reach MASTER_ADDR:MASTER_PORT "
            f"({os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}) through a firewall"
        )
    return disagreement([_member(store, rank) for rank in range(world_size)]) or ""


def _member(store: Store, rank: int) -> Member:
    return Member(**json.loads(store.get(f"member/{rank}")))


def disagreement(members: Sequence[Member]) -> str | None:
    """Why these ranks cannot work together; None: they can."""
    names = sorted({name for member in members for name in member.versions})
    for name in names:
        found = _by_value(members, partial(_version, name))
        if len(found) > 1:
            return (
                f"the ranks have different versions of {name}: {_said(found)}; results and messages between them would "
                "differ. Install the same environment on every node"
            )
    kinds = _by_value(members, lambda member: "a CPU only" if member.gpu is None else "a GPU")
    if len(kinds) > 1:
        return (
            f"some ranks see a GPU and others do not: {_said(kinds)}. Look at nvidia-smi and CUDA_VISIBLE_DEVICES "
            "where none is seen, or hide the GPUs everywhere with CUDA_VISIBLE_DEVICES="
        )
    shared = {gpu: ranks for gpu, ranks in _by_value(members, lambda member: member.gpu).items() if gpu is not None}
    for gpu, users in shared.items():
        if len(users) > 1:
            first = users[0]
            return (
                f"{listed([user.rank for user in users], 'rank')} on {first.host} would run on the same GPU ({gpu}): "
                f"its node has {first.local_ranks} ranks, which see {first.gpus} of its GPUs. Start one rank a GPU, "
                "with LOCAL_RANK from 0 in each node and all the node's GPUs visible, or exactly one for each rank"
            )
    return None


def _version(name: str, member: Member) -> str:
    return member.versions.get(name, "missing")


def _by_value(members: Sequence[Member], value: Callable[[Member], Any]) -> dict[Any, list[Member]]:
    found: dict[Any, list[Member]] = {}
    for member in members:
        found.setdefault(value(member), []).append(member)
    return found


def _said(found: dict[Any, list[Member]]) -> str:
    return ", ".join(
        f"{value} for {listed([member.rank for member in members], 'rank')} on "
        f"{', '.join(sorted({member.host for member in members})[:4])}"
        for value, members in found.items()
    )


def listed(numbers: Sequence[int], noun: str) -> str:
    """``rank 3`` or ``ranks 0-2, 5``."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return f"{noun}{'s' * (len(numbers) != 1)} {', '.join('-'.join(map(str, each)) for each in ranges)}"


def advice(backends: Mapping[str, str]) -> str:
    """What to look at when data does not come through, with what this node has."""
    names = [f"{backend.upper()}_SOCKET_IFNAME" for backend in backends.values()]
    now = ", ".join(os.environ.get(name, "unset") for name in names)
    interfaces = ", ".join(name for _, name in socket.if_nameindex())
    return (
        f"Set {' and '.join(names)} (now {now}; {socket.gethostname()} has {interfaces}) to the interface "
        "that connects the nodes, and open the firewall between them for all TCP ports"
        + ("; NCCL_DEBUG=INFO says more" if "nccl" in backends.values() else "")
    )


def _stuck(store: Store, member: Member, world_size: int, backends: Mapping[str, str]) -> str:
    """What a rank says that has waited for `TRIAL`."""
    begun = f"{member}: the ranks met, but did not sum one number within {_seconds(TRIAL)} by {_names(backends)}"
    try:
        # The other one may be in use by the call that does not return.
        own: Any = store.clone()  # type: ignore[attr-defined]
        own.set_timeout(STEP)
        absent = [rank for rank in range(world_size) if not own.check([f"trial/{rank}"])]
    except RuntimeError:
        return f"{begun}, and rank 0's store does not answer any more. Look at the log of rank 0 and at its node"
    if absent:
        hosts = sorted({_member(own, rank).host for rank in absent})
        return f"{begun}: {listed(absent, 'rank')} on {', '.join(hosts)} hung or died on the way. Look at its log"
    return f"{begun}, so their data does not come through. {advice(backends)}"


@contextmanager
def _bounded(limit: timedelta, explain: Callable[[], str]) -> Iterator[None]:
    """End this process with an explanation if what is inside takes longer: a call into NCCL or gloo cannot be raised
    out of."""

    def end() -> None:
        try:
            print(f"ptd: error: {explain()}", file=sys.stderr, flush=True)
        finally:
            os._exit(UserError.exit_code)

    timer = threading.Timer(limit.total_seconds(), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _seconds(limit: timedelta) -> str:
    return f"{limit.total_seconds():g} s"
