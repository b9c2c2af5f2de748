"""DeepSpeed's launcher on two hosts without ssh: two network namespaces, joined by a veth pair, with one rank each."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from user_project import command, environment

from ptd.runs.metrics_log import read_records

DEVICE, ADDRESSES = "veth0", ("10.78.0.1", "10.78.0.2")


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Make two network namespaces; yield their names, for ``ip netns exec``."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces take root and ip (Debian: apt-get install iproute2)")
    names = [f"ptd-test-{os.getpid()}-{node}" for node in (0, 1)]
    with ExitStack() as made:
        for name in names:
            added = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
            if added.returncode:
                pytest.skip(f"no network namespaces here: {added.stderr.strip()}")
            made.callback(subprocess.run, ["ip", "netns", "del", name], check=True)
        ip(*f"link add {DEVICE} netns {names[0]} type veth peer name {DEVICE} netns {names[1]}".split())
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
            ip("-n", name, "link", "set", DEVICE, "up")
        yield names


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def test_two_hosts_train_as_two_ranks_of_one(hosts: list[str], project: Path, here: Path) -> None:
    hostfile = project / "hostfile"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in hosts))
    run = ["ssh", "run.yaml", "output_dir=hosts", "--log-dir", "hosts/logs"]
    where = ["--hostfile", hostfile, "--no-ssh", "--master-addr", ADDRESSES[0]]
    with ExitStack() as running:
        ranks = []
        for node, host in enumerate(hosts):
            rank = subprocess.Popen(
                ["ip", "netns", "exec", host, *command(*run, *where, "--node-rank", str(node))],
                cwd=project,
                env=environment(GLOO_SOCKET_IFNAME=DEVICE, DS_ACCELERATOR="cpu"),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            running.callback(rank.kill)
            ranks.append(rank)
        said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    apart, together = (
        [record for record in read_records(folder) if "loss" in record] for folder in (project / "hosts", here)
    )
    assert [record["loss"] for record in apart] == pytest.approx([record["loss"] for record in together], rel=1e-6)
    # Each host has its own address, so each rank is a node: the bytes counted between nodes did leave their host.
    assert all(record["network_bytes_between_nodes"] == record["network_bytes"] > 0 for record in apart)
