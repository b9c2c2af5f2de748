"""The commands of DeepSpeed's launcher, as DeepSpeed parses them, and the command line that produces them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.launcher import runner
from deepspeed.launcher.multinode_runner import PDSHRunner

from ptd.cli import main
from ptd.launch import (
    Cluster,
    Program,
    carried,
    environment,
    local_command,
    no_ssh_command,
    pdsh_command,
    read_hostfile,
)
from ptd.shipped import ROOT
from ptd.types import UserError

RECIPE = ROOT / "launch" / "recipes" / "causal_lm.yaml"
OVERRIDES = ('data.train=it\'s "here".jsonl', "output_dir=$(touch\\ pwned)`touch pwned`", "a=%n%h;touch pwned", "b=é\n")
VARIABLES = {
    "HF_HOME": '/data/it\'s "here" $HOME `touch pwned`; touch pwned \\ %n',
    "NCCL_SOCKET_IFNAME": "^docker0,lo",
    "OMP_NUM_THREADS": "4",
    "PTD_TIMEOUT_MINUTES": "90",
    "PYTORCH_CUDA_ALLOC_CONF": " expandable_segments:True ",
    "TOKENIZERS_PARALLELISM": "",
    "TRITON_CACHE_DIR": "/tmp/$(touch pwned)/é",
}
PROGRAM = Program(RECIPE, (*OVERRIDES, 'c=with spaces; $(touch pwned) \\$x \\" `y` %u'), ("--overwrite",))


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("# two nodes\nnode-a slots=8\n\nnode-b slots=4  # older\n")
    return path


def parsed(command: list[str]) -> Any:
    """Return the command's options as DeepSpeed's launcher parses them."""
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    return runner.parse_args(command[3:])


def check_program(options: Any) -> None:
    assert options.module
    assert options.no_local_rank
    assert [options.user_script, *options.user_args] == PROGRAM.arguments


def test_local_takes_the_gpus_that_are_visible() -> None:
    options = parsed(local_command(PROGRAM, 2, port=1234))
    check_program(options)
    assert (options.num_gpus, options.include, options.master_port) == (2, "", 1234)
    assert runner.fetch_hostfile(options.hostfile) is None
    options = parsed(local_command(PROGRAM, 2, port=1234, devices="6, 3,1"))
    assert options.num_gpus == -1
    resources = runner.parse_inclusion_exclusion({"localhost": 8}, options.include, "")
    assert list(resources.items()) == [("localhost", [3, 6])]
    for devices in ("6", "GPU-1,GPU-2"):
        with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES={devices}"):
            local_command(PROGRAM, 2, port=1, devices=devices)


def test_environment_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,3")
    assert "CUDA_VISIBLE_DEVICES" not in environment(2)
    assert "DS_ACCELERATOR" not in environment(2)
    assert environment(0)["DS_ACCELERATOR"] == "cpu"


def test_without_ssh_there_is_a_command_for_every_node(hostfile: Path) -> None:
    for rank in (0, 1):
        command = no_ssh_command(PROGRAM, Cluster(hostfile, 2, 4, 29500), node_rank=rank, master_addr="10.0.0.1")
        options = parsed(command)
        check_program(options)
        assert options.no_ssh
        assert (options.node_rank, options.master_addr, options.master_port) == (rank, "10.0.0.1", 29500)
        pool = runner.parse_inclusion_exclusion(runner.fetch_hostfile(options.hostfile), "", "")
        sizes = runner.apply_num_nodes_and_gpus(pool, options.num_nodes, options.num_gpus)
        assert sizes == {"node-a": [0, 1, 2, 3], "node-b": [0, 1, 2, 3]}


def test_arguments_pass_pdsh_and_the_shell_of_the_nodes(
    hostfile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local shell parses the line that DeepSpeed builds for the node's shell, and the arguments arrive unchanged."""
    monkeypatch.chdir(tmp_path)
    command = pdsh_command(PROGRAM, Cluster(hostfile, 2, None, 29500), variables=VARIABLES, master_addr="10.0.0.1")
    options = parsed(command)
    assert options.force_multi
    echo = tmp_path / "python"
    echo.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    echo.chmod(echo.stat().st_mode | stat.S_IXUSR)
    command_of_python = sys.executable
    monkeypatch.setattr(sys, "executable", str(echo))
    command, _, _ = PDSHRunner(options, "world").get_cmd({}, runner.fetch_hostfile(options.hostfile))
    assert command[:6] == ["pdsh", "-S", "-f", "1024", "-w", "node-a,node-b"]
    line = " ".join(command[6:]).replace("%%", "\0").replace("%n", "1").replace("\0", "%")  # as pdsh does
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    arguments = json.loads(done.stdout)
    assert "--node_rank=1" in arguments
    assert [option for option in ("--no_python", "--no_local_rank", "--module") if option in arguments] == [
        "--no_python",
        "--no_local_rank",
    ]
    given = [f"{name}={value}" for name, value in VARIABLES.items()]
    assert arguments[arguments.index("env") :] == ["env", *given, command_of_python, "-u", "-m", *PROGRAM.arguments]
    assert not (tmp_path / "pwned").exists()
    (tmp_path / "a dir").mkdir()
    monkeypatch.chdir(tmp_path / "a dir")
    with pytest.raises(UserError, match="unquoted"):
        pdsh_command(PROGRAM, Cluster(hostfile, 2, None, 29500), variables={})


def test_variables_that_are_handed_to_the_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path / "home", tmp_path / "here"):
        folder.mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n")
    (tmp_path / "here" / ".deepspeed_env").write_text("HF_HOME=/elsewhere\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    here = {**VARIABLES, "HF_HOME": "/x", "NCCL_DEBUG": "WARN", "RANK": "3", "TORCHELASTIC_RESTART_COUNT": "1"}
    here |= {"CUDA_VISIBLE_DEVICES": "3", "HF_TOKEN": "t", "WANDB_API_KEY": "k", "PATH": "/bin", "EDITOR": "vi"}
    variables, secrets = carried(here)
    assert variables == {name: value for name, value in VARIABLES.items() if name != "HF_HOME"}
    assert secrets == ["HF_TOKEN", "WANDB_API_KEY"]


SHOW = """
import json, os, pathlib, sys
names = [name for name in os.environ if name in sys.argv[2:]]
shown = {name: os.environ[name] for name in names}
pathlib.Path(sys.argv[1] + os.environ["RANK"]).write_text(json.dumps(shown))
"""
SSH = """#!/bin/sh
until case $1 in node-*) true;; *) false;; esac; do shift; done
shift
exec env -i HOME="$HOME" PATH="$PATH" sh -c "$*"
"""


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="no pdsh (Debian: apt-get install pdsh)")
def test_ranks_on_nodes_have_the_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's launcher and pdsh pass the variables; in place of ssh, a local login has a clean environment."""
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "show.py").write_text(SHOW)
    (tmp_path / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    monkeypatch.chdir(tmp_path)
    program: Any = SimpleNamespace(arguments=["show", "shown.", *VARIABLES])
    cluster = Cluster(tmp_path / "hosts", 2, None, 29500)
    command = pdsh_command(program, cluster, variables=VARIABLES, master_addr="127.0.0.1")
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert json.loads((tmp_path / f"shown.{rank}").read_text()) == VARIABLES
    assert not (tmp_path / "pwned").exists()


def test_hostfiles(tmp_path: Path) -> None:
    example = ROOT / "launch" / "hostfile.example"
    assert {host.name: host.slots for host in read_hostfile(example)} == runner.fetch_hostfile(str(example))
    path = tmp_path / "hosts"
    for text, message in (
        ("node-a\n", "line 1: 'node-a' is not"),
        ("node-a slots=0", "is not 'NAME slots="),
        ("a slots=1\n\na slots=2", "line 3: a occurs twice"),
        ("# none\n", "names no node"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_hostfile(path)
    with pytest.raises(UserError, match="cannot read"):
        read_hostfile(tmp_path / "none")


def test_the_command_line(
    hostfile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def launch(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ptd", "launch", *shlex.split(line)])
        try:
            main()
        except SystemExit as stop:
            captured = capsys.readouterr()
            return int(stop.code or 0), captured.out, captured.err
        raise AssertionError

    code, out, _ = launch("local causal_lm.yaml train.seed=7 --gpus-per-node 0 --ranks-per-node 3 --dry-run")
    options = parsed(shlex.split(out))
    assert (code, options.num_gpus) == (0, 3)
    assert options.user_args == ["train", str(RECIPE), "train.seed=7"]
    code, out, _ = launch(f"ssh causal_lm.yaml --hostfile {hostfile} --no-ssh --dry-run")
    first, one, second, two = out.splitlines()
    assert (code, first, second) == (0, "# node 0: node-a", "# node 1: node-b")
    assert [parsed(shlex.split(line)).node_rank for line in (one, two)] == [0, 1]
    assert parsed(shlex.split(two)).master_addr == "node-a"
    monkeypatch.setenv("PTD_TIMEOUT_MINUTES", "90 ")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, out, err = launch(f"ssh causal_lm.yaml --hostfile {hostfile} --dry-run")
    assert (code, "PTD_TIMEOUT_MINUTES=90 " in parsed(shlex.split(out)).user_args) == (0, True)
    assert "hf_secret" not in out + err
    assert "not passed to the nodes, where every user could read them: HF_TOKEN" in err
    code, out, _ = launch(
        "slurm causal_lm.yaml --nodes 2 --gpus-per-node 8 --time 1:00:00 --sbatch exclusive --dry-run"
    )
    assert code == 0
    assert "#SBATCH --time=1:00:00\n#SBATCH --exclusive\n" in out
    assert f"\ncd {tmp_path}\n" in out
    assert f"#SBATCH --output={tmp_path}/out/logs/%j.log" in out
    for line, message in (
        ("local causal_lm.yaml train.seeed=1", "did you mean train.seed"),
        ("local causal_lm.yaml deepspeed=none.json", "there is no file 'none.json'"),
        ("local causal_lm.yaml --gpus-per-node 99", "--gpus-per-node: 99 requested"),
        (f"ssh causal_lm.yaml --hostfile {hostfile} --nodes 3", "names 2"),
        (f"ssh causal_lm.yaml --hostfile {hostfile} --gpus-per-node 8", "node-b has slots=4"),
        (f"ssh causal_lm.yaml --hostfile {hostfile} --no-ssh", "add --node-rank, 0 to 1"),
        (f"ssh causal_lm.yaml --hostfile {hostfile} --no-ssh --node-rank 2", "there is no node 2"),
        (f"ssh causal_lm.yaml --hostfile {hostfile} --node-rank 0", "or add --no-ssh"),
        ("slurm causal_lm.yaml --nodes 1 --gpus-per-node 8 --ranks-per-node 2", "--ranks-per-node: 2 ranks on 8"),
        ("slurm causal_lm.yaml train.save_steps=null --nodes 1 --gpus-per-node 8 --requeue", "set train.save_steps"),
    ):
        code, out, err = launch(line)
        assert (code, out) == (2, ""), line
        assert message in err, line
