"""Connect the ranks of a run: a rendezvous with a time limit that names missing ranks, a comparison, and a self-test.

torch's rendezvous waits as long as the timeout of collectives, and then says only how many ranks are missing. Here
every rank first writes a description of itself to the store at MASTER_ADDR. Rank 0 reads all descriptions, names the
ranks that wrote none and the differences that make a joint run impossible, and every rank raises what rank 0 found.
Then the ranks create the process group, and as a self-test it has to compute one sum.
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
"""Time limit for all ranks to join the rendezvous: importing torch from a busy shared disk takes minutes."""
TRIAL = timedelta(minutes=3)
"""Time limit of the self-test, in which the ranks sum one number after the rendezvous."""
STEP = timedelta(seconds=5)
"""Time limit for a query that the store answers immediately or never."""
_meetings = count()


@dataclass(frozen=True)
class Participant:
    """A rank's description of itself: its host, its package versions and its GPU.

    ``gpu``: the UUID of its GPU; None: it runs on the CPU. ``gpus``: the number of GPUs it sees; ``local_ranks``: the
    number of ranks on its node according to its launcher.
    """

    rank: int
    host: str
    versions: dict[str, str]
    gpu: str | None
    gpus: int
    local_ranks: int

    @classmethod
    def this(cls, rank: int, local_ranks: int, device: torch.device) -> Participant:
        """Describe the calling process."""
        gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
        return cls(rank, socket.gethostname(), versions(), gpu, torch.cuda.device_count(), local_ranks)

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def join_group(member: Participant, device: torch.device, world_size: int, timeout: timedelta) -> None:
    """Create the default process group of ``world_size`` ranks; this rank runs on ``device``.

    ``timeout`` is the timeout of collectives; `MEETING` and `TRIAL` limit the time to create the group. Raises
    `UserError` on all ranks if ranks are missing or do not fit together, `RankError` on a rank that cannot reach the
    others.
    """
    # A launcher that restarts the ranks may keep the store of the previous start.
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
                # Connect eagerly, so that failures appear here. A single rank has nothing to connect to.
                device_id=device if device.type == "cuda" and world_size > 1 else None,
            )
            for kind in backends:
                _try_out(world_size, torch.device(kind))
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        raise RankError(
            f"{member} cannot exchange data with the others over {_names(backends)}: {reason}. {advice(backends)}"
        ) from error


def backends_for(device: torch.device) -> dict[str, str]:
    """Return the communication backend for each type of device.

    Data on the host (objects, flags) uses gloo: through a GPU it would wait for all work queued there.
    """
    return {"cpu": "gloo", "cuda": "nccl"} if device.type == "cuda" else {"cpu": "gloo"}


def _share_interface() -> None:
    """Make gloo use the network interface named in NCCL's setting, if it exists and gloo has no setting."""
    name = os.environ.get("NCCL_SOCKET_IFNAME", "").removeprefix("=")
    if name in {there for _, there in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _names(backends: Mapping[str, str]) -> str:
    return " and ".join(backends.values())


def _try_out(world_size: int, device: torch.device) -> None:
    """Run one all-reduce and one all-gather; raise `RuntimeError` if a result is wrong."""
    rank = dist.get_rank()
    total = torch.full((1,), float(rank), device=device)
    dist.all_reduce(total)
    everyone = [torch.empty(1, device=device) for _ in range(world_size)]
    dist.all_gather(everyone, torch.full((1,), float(rank), device=device))
    found = [int(value) for value in everyone]
    if int(total) != sum(range(world_size)) or found != list(range(world_size)):
        raise RuntimeError(f"the ranks' numbers arrived as {found} with the sum {int(total)}, which is wrong")


def _store(member: Participant, world_size: int) -> Store:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal() or int(port) >= 2**16:
        raise RankError(
            f"{member}: WORLD_SIZE is {world_size}, but MASTER_ADDR={address} and MASTER_PORT={port or None} do not "
            "name the host and port of the rendezvous; start the ranks with ptd launch, or set the variables to the "
            "host of rank 0 and a free port on it"
        )
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # the process of torchrun holds the store
            store: Store = next(rendezvous("env://", timeout=MEETING))[0]
            return store
        return dist.TCPStore(  # type: ignore[attr-defined]
            address, int(port), world_size, member.rank == 0, MEETING, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        if member.rank == 0:
            what = (
                "Set MASTER_ADDR to the node of rank 0 and MASTER_PORT to a free port on it, and check that no other "
                "process has RANK=0"
            )
        else:
            what = (
                "Check that rank 0 is running, that all nodes can reach its node under the name or address in "
                "MASTER_ADDR, and that its firewall opens MASTER_PORT"
            )
        raise RankError(f"{member} cannot join the other ranks at {address}:{port}: {reason}. {what}") from error


def _meet(store: Store, member: Participant, world_size: int) -> None:
    """Wait for the description of every rank and compare them; every rank raises what rank 0 found."""
    try:
        if store.add(f"taken/{member.rank}", 1) > 1:
            raise RankError(
                f"{member}: another process has RANK={member.rank} as well; give every process its own RANK, from 0 to "
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
        raise RankError(
            f"{member} lost the connection to the other ranks during the rendezvous: {reason}. See the log of rank 0"
        ) from error
    if verdict:
        raise UserError(verdict)


def _leave(store: Store, member: Participant, world_size: int) -> None:
    """Let the other ranks read the verdict before rank 0 exits, because the store ends with rank 0."""
    store.set(f"left/{member.rank}", "")
    if member.rank == 0:
        there = [rank for rank in range(world_size) if store.check([f"member/{rank}"])]
        with suppress(RuntimeError):
            store.wait([f"left/{rank}" for rank in there], STEP)


def _verdict(store: Store, world_size: int) -> str:
    """Return what prevents the ranks from working together; empty: nothing."""
    notes = [f"member/{rank}" for rank in range(world_size)]
    try:
        store.wait(notes, MEETING)
    except dist.DistError:
        there = [rank for rank, note in enumerate(notes) if store.check([note])]
        hosts = sorted({_member(store, rank).host for rank in there})
        missing = sorted(set(range(world_size)) - set(there))
        return (
            f"{ranks_as_text(missing, 'rank')} of {world_size} did not join within {_seconds(MEETING)}; "
            f"{ranks_as_text(there, 'rank')} on {', '.join(hosts)} did. Look at the logs of the missing ranks: they "
            "did not start, failed before this point, or cannot reach MASTER_ADDR:MASTER_PORT "
            f"({os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}) through a firewall"
        )
    return disagreement([_member(store, rank) for rank in range(world_size)]) or ""


def _member(store: Store, rank: int) -> Participant:
    return Participant(**json.loads(store.get(f"member/{rank}")))


def disagreement(members: Sequence[Participant]) -> str | None:
    """Return why these ranks cannot work together; None: they can."""
    names = sorted({name for member in members for name in member.versions})
    for name in names:
        found = _by_value(members, partial(_version, name))
        if len(found) > 1:
            return (
                f"the ranks have different versions of {name}: {_said(found)}; their results and the messages between "
                "them would differ. Install the same environment on every node"
            )
    kinds = _by_value(members, lambda member: "a CPU only" if member.gpu is None else "a GPU")
    if len(kinds) > 1:
        return (
            f"some ranks see a GPU and others do not: {_said(kinds)}. Check nvidia-smi and CUDA_VISIBLE_DEVICES on the "
            "nodes whose ranks see none, or hide the GPUs on every node with CUDA_VISIBLE_DEVICES="
        )
    shared = {gpu: ranks for gpu, ranks in _by_value(members, lambda member: member.gpu).items() if gpu is not None}
    for gpu, users in shared.items():
        if len(users) > 1:
            first = users[0]
            return (
                f"{ranks_as_text([user.rank for user in users], 'rank')} on {first.host} would run on the same GPU "
                f"({gpu}): its node has {first.local_ranks} ranks, which see {first.gpus} of its GPUs. Start one rank "
                "per GPU, number LOCAL_RANK from 0 on each node, and let each rank see all GPUs of its node or exactly "
                "one"
            )
    return None


def _version(name: str, member: Participant) -> str:
    return member.versions.get(name, "missing")


def _by_value(members: Sequence[Participant], value: Callable[[Participant], Any]) -> dict[Any, list[Participant]]:
    found: dict[Any, list[Participant]] = {}
    for member in members:
        found.setdefault(value(member), []).append(member)
    return found


def _said(found: dict[Any, list[Participant]]) -> str:
    return ", ".join(
        f"{value} for {ranks_as_text([member.rank for member in members], 'rank')} on "
        f"{', '.join(sorted({member.host for member in members})[:4])}"
        for value, members in found.items()
    )


def ranks_as_text(numbers: Sequence[int], noun: str) -> str:
    """Return the numbers as text, for example ``rank 3`` or ``ranks 0-2, 5``."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return f"{noun}{'s' * (len(numbers) != 1)} {', '.join('-'.join(map(str, each)) for each in ranges)}"


def advice(backends: Mapping[str, str]) -> str:
    """Return what to check when no data passes between ranks, with the settings and interfaces of this node."""
    names = [f"{backend.upper()}_SOCKET_IFNAME" for backend in backends.values()]
    now = ", ".join(os.environ.get(name, "unset") for name in names)
    interfaces = ", ".join(name for _, name in socket.if_nameindex())
    return (
        f"Set {' and '.join(names)} (now {now}; {socket.gethostname()} has {interfaces}) to the interface "
        "that connects the nodes, and open the firewall between them for all TCP ports"
        + ("; NCCL_DEBUG=INFO prints details" if "nccl" in backends.values() else "")
    )


def _stuck(store: Store, member: Participant, world_size: int, backends: Mapping[str, str]) -> str:
    """Return the message of a rank whose self-test exceeded `TRIAL`."""
    begun = f"{member}: all ranks joined, but did not sum one number within {_seconds(TRIAL)} over {_names(backends)}"
    try:
        # The call that does not return may be using the original store.
        own: Any = store.clone()  # type: ignore[attr-defined]
        own.set_timeout(STEP)
        absent = [rank for rank in range(world_size) if not own.check([f"trial/{rank}"])]
    except RuntimeError:
        return f"{begun}, and the store of rank 0 no longer answers. Look at the log of rank 0 and at its node"
    if absent:
        hosts = sorted({_member(own, rank).host for rank in absent})
        return (
            f"{begun}: {ranks_as_text(absent, 'rank')} on {', '.join(hosts)} hung or died before that. Look at its log"
        )
    return f"{begun}, so no data passes between them. {advice(backends)}"


@contextmanager
def _bounded(limit: timedelta, explain: Callable[[], str]) -> Iterator[None]:
    """Exit the process with the message of ``explain`` if the code inside takes longer than ``limit``.

    It cannot raise instead, because no exception interrupts a call into NCCL or gloo.
    """

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
