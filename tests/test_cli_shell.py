"""The command line in a shell: how fast it answers, what TAB offers, and what it suggests after a typing error."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from ptd.cli import completion
from ptd.config import BackboneConfig
from ptd.methods import methods
from ptd.shipped import RECIPES

DTYPE = BackboneConfig.model_fields["dtype"].annotation
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
source ~/.bashrc
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
    "backbone.quantization=int8 backbone.quantization=nf4 backbone.quantization=fp8",
    ("ptd", "train", "7b.yaml", "method.name", "="): " ".join(sorted(methods())),
    ("ptd", "doctor", "7b.yaml", "train.seed", "=", "3", "backbone.dtype", "=", "bf"): "bfloat16",
    ("ptd", "plan", "7b.yaml", "train.warm"): "train.warmup_ratio= train.warmup_steps=",
    ("ptd", "launch", "local", "7b.yaml", "data.max_l"): "data.max_length= data.max_length=512",
    ("ptd", "cp", "zero3_n"): "zero3_node_local.json",
    ("ptd", "init", "--task", "question"): "question_answering",
    ("ptd", "eval", "--set", "backbone.shardi"): "backbone.sharding= backbone.sharding_group_size=",
    ("ptd", "train", "7b.yaml", "--over"): "--overwrite",
}


@pytest.fixture
def here(tmp_path: Path) -> dict[str, str]:
    """Return an environment with its own home folder, in which ``ptd`` is a program."""
    program = tmp_path / "ptd"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom ptd.cli import main\nsys.argv[0] = 'ptd'\nmain()\n", encoding="utf-8"
    )
    program.chmod(0o755)
    own = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    aside = ("ZDOTDIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
    return {name: value for name, value in os.environ.items() if name not in aside} | own


def install(shell: str, here: dict[str, str]) -> None:
    """Run ``ptd --install-completion`` in that shell."""
    if shutil.which(shell) is None:
        if os.environ.get("PTD_REQUIRE_SHELLS") == "1":
            pytest.fail(f"there is no {shell}, and PTD_REQUIRE_SHELLS=1")
        pytest.skip(f"there is no {shell} on this machine")
    typed = [shell, "-c", "ptd --install-completion; true"]
    done = subprocess.run(typed, env=here, cwd=here["HOME"], capture_output=True, text=True, check=False)
    assert f"{shell} completion installed" in done.stdout, done.stderr


def test_tab_in_bash(here: dict[str, str]) -> None:
    """Bash passes ``key=value`` to the completion as three words."""
    install("bash", here)
    assert ".bash_completions/ptd.sh" in Path(here["HOME"], ".bashrc").read_text(encoding="utf-8")
    calls = "\n".join("try " + " ".join(f"'{word}'" for word in words) for words in WANTED)
    done = subprocess.run(
        ["bash", "-c", BASH + calls], env=here, cwd=here["HOME"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [line.strip() for line in done.stdout.splitlines()]
    assert dict(zip(WANTED, found, strict=True)) == WANTED


OFFERED = {
    "ptd tra": {"train"},
    "ptd train causal": {"causal_lm.yaml", "causal_lm_p_tuning.yaml"},
    "ptd train 7b.yaml backbone.offload": {"backbone.offload=", "backbone.offload_folder="},
    "ptd train 7b.yaml backbone.dtype=": {f"backbone.dtype={each}" for each in get_args(DTYPE)},
    "ptd doctor 7b.yaml train.seed=3 backbone.dtype=bf": {"backbone.dtype=bfloat16"},
    "ptd train 7b.yaml method.name=": {f"method.name={name}" for name in completion.method_names()},
    "ptd cp zero3_n": {"zero3_node_local.json"},
    "ptd eval --set backbone.shardi": {"backbone.sharding=", "backbone.sharding_group_size="},
    "ptd train 7b.yaml --over": {"--overwrite"},
}
"""Words typed before TAB in zsh and fish -> the completions that are offered."""


def test_tab_in_fish(here: dict[str, str]) -> None:
    install("fish", here)
    calls = "; ".join(f"echo ==; complete -C '{line}'" for line in [*OFFERED, "ptd train 7b.yaml data.prompt_t"])
    done = subprocess.run(
        ["fish", "-c", calls], env=here, cwd=here["HOME"], capture_output=True, text=True, check=False
    )
    answers = [
        {line.partition("\t")[0] for line in part.splitlines() if line} for part in done.stdout.split("==\n")[1:]
    ]
    # A single candidate that ends in "=" is enough: fish adds no space after it.
    assert answers == [*OFFERED.values(), {"data.prompt_template="}], done.stderr


ZSH = """
fpath+=~/.zfunc
compdef() { }
_arguments() { local -a found; eval "found=${${1#\\*: :\\(}%\\)}"; print -r -- "|${(j:|:)found}" }
autoload -Uz _ptd; _ptd  # which defines the function that TAB calls
try() { local -a words=(${(z)1}); [[ $1 == *' ' ]] && words+=(''); local CURRENT=$#words; _ptd_completion }
"""
ALONE = {"ptd train 7b.yaml data.prompt_t": {"data.prompt_template=", "data.prompt_template=…"}}
"""A single key gets a second candidate, because zsh appends a space to a single one."""


def test_tab_in_zsh(here: dict[str, str]) -> None:
    """The installed function gives the right answers, parsed as by zsh, whose line editor would need a terminal."""
    install("zsh", here)
    assert "compinit" in Path(here["HOME"], ".zshrc").read_text(encoding="utf-8")
    offered = OFFERED | ALONE
    calls = "\n".join(f"try '{line}'" for line in offered)
    typed = ["zsh", "-f", "-c", ZSH + calls]
    done = subprocess.run(typed, env=here, cwd=here["HOME"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = [line.split("|")[1:] for line in done.stdout.splitlines()]
    found = [{word.partition(":")[0] for word in words} for words in answers]
    assert dict(zip(offered, found, strict=True)) == offered


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
