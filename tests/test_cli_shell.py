"""The command line in a shell: how soon it answers, what TAB offers in bash, what it says to a typing error."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ptd.cli import completion
from ptd.methods import methods
from ptd.shipped import RECIPES

WITHOUT_TORCH = """
import contextlib, io, os, sys
from ptd.cli import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["ptd", *line.split()]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, line
    assert out.getvalue(), line
    heavy = {"torch", "transformers", "deepspeed", "datasets"} & set(sys.modules)
    assert not heavy, (line, heavy)
"""


def test_light_commands_do_not_wait_for_torch() -> None:
    lines = ["--version", "--help", "train --help", "launch --help", "launch slurm --help", "init --help", "ls"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], input="\n".join(lines), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


BASH = """
source ptd.sh
try() {
    COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
    _ptd_completion ptd
    printf '%s ' "${COMPREPLY[@]}"; printf '\\n'
}
"""
WANTED = {
    ("ptd", "tra"): "train",
    ("ptd", "train", "causal"): "causal_lm.yaml causal_lm_p_tuning.yaml",
    ("ptd", "train", "7b.yaml", "backbone.offload"): "backbone.offload= backbone.offload_folder=",
    ("ptd", "train", "7b.yaml", "backbone.quant"): "backbone.quantization= backbone.quantization=none "
    "backbone.quantization=int8 backbone.quantization=nf4",
    ("ptd", "train", "7b.yaml", "method.name", "="): "hard_prompt head p_tuning p_tuning_v2 prefix prompt",
    ("ptd", "doctor", "7b.yaml", "train.seed", "=", "3", "backbone.dtype", "=", "bf"): "bfloat16",
    ("ptd", "plan", "7b.yaml", "train.warm"): "train.warmup_ratio= train.warmup_steps=",
    ("ptd", "launch", "local", "7b.yaml", "data.max_l"): "data.max_length= data.max_length=512",
    ("ptd", "cp", "zero3_n"): "zero3_node_local.json",
    ("ptd", "init", "--task", "question"): "question_answering",
    ("ptd", "eval", "--set", "backbone.shardi"): "backbone.sharding= backbone.sharding_group_size=",
    ("ptd", "train", "7b.yaml", "--over"): "--overwrite",
}


def test_tab_in_bash(tmp_path: Path) -> None:
    """With the script that --show-completion gives; bash hands over ``key=value`` as three words."""
    program = tmp_path / "ptd"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom ptd.cli import main\nsys.argv[0] = 'ptd'\nmain()\n", encoding="utf-8"
    )
    program.chmod(0o755)
    here = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = subprocess.run(
        [program, "--show-completion", "bash"], env=here, capture_output=True, text=True, check=False
    )
    if script.returncode:  # where the shell is found out by itself the option takes no name
        shell = ["bash", "-c", "ptd --show-completion; true"]
        script = subprocess.run(shell, env=here, capture_output=True, text=True, check=False)
    assert "complete -o default -F _ptd_completion ptd" in script.stdout, script.stderr
    (tmp_path / "ptd.sh").write_text(script.stdout, encoding="utf-8")
    calls = "\n".join("try " + " ".join(f"'{word}'" for word in words) for words in WANTED)
    done = subprocess.run(
        ["bash", "-c", BASH + calls], env=here, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [line.strip() for line in done.stdout.splitlines()]
    assert dict(zip(WANTED, found, strict=True)) == WANTED


def test_methods_are_read_off_their_source() -> None:
    assert completion.method_names() == sorted(methods())
    for name, known in methods().items():
        assert set(completion._methods()[name]) == {field.name for field in dataclasses.fields(known.config)}


def test_run_files_are_recipes_and_those_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("a.yaml", "b.json", "runs/c.yaml"):
        (tmp_path / name).touch()
    assert completion.run_files("") == ["a.yaml", "runs/", *sorted(path.name for path in RECIPES.glob("*.yaml"))]
    assert completion.run_files("runs/")[0] == "runs/c.yaml"
    assert completion.run_files("nowhere/x")[0] == "13b.yaml"


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("trian run.yaml", "train"),
        ("launch slrum run.yaml", "slurm"),
        ("train run.yaml --overwrit", "--overwrite"),
        ("plan run.yaml --gpu-memry 80GiB", "--gpu-memory"),
    ],
)
def test_the_nearest_word_is_named(ptd: Any, line: str, meant: str) -> None:
    outcome = ptd(*line.split())
    assert outcome.code == 2
    assert meant in outcome.err.partition("No such")[2]
