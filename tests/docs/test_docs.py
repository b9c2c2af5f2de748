"""Commands and code in README.md, docs/ and the READMEs in other folders run, or a mark says why they do not.

The blocks of a page run in order in one folder (world.py): shell blocks in bash, Python blocks in one namespace.
``ptd launch`` runs with ``--dry-run``. In commands that are not run, every option and key exists. Running the blocks
takes minutes, so it requires ``PTD_DOCS=1`` (``make docs-test``); the other tests always run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from ptd.cli import app
from ptd.config import RunConfig
from ptd.methods import methods

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def helper(name: str) -> Any:
    """Import a module next to this file, by its path because the folder is not a package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


blocks, world, warm = helper("blocks"), helper("world"), helper("warm")

PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "launch/README.md", "ds_configs/README.md", "benchmarks/README.md")
    ),
    ROOT / "kernels" / "ptd_kernels" / "prefix_attention" / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
]
ALL = [(page, block) for page in PAGES for block in blocks.blocks_of(page)]
SHELL, RUNNABLE, DATA = "bash", {"bash", "python"}, {"", "yaml", "json", "{include}", "{eval-rst}", "{toctree}"}
SECONDS = 300


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def place(page: Path, line: int) -> str:
    return f"{name_of(page)}:{line}"


# --- what holds for every block, run or not -------------------------------------------------------------------------


def test_blocks_say_what_they_are() -> None:
    """Each block names a known language or holds no commands: commands without a language would never be run."""
    for page, block in ALL:
        language = block.language
        assert language in RUNNABLE | DATA or language.startswith("{"), place(page, block.line)
        if language == "":
            found = [line for line in block.text.splitlines() if blocks.STARTED.match(line)]
            assert found == [], f"{place(page, block.line)}: commands belong into a block marked bash"


def test_there_is_something_to_run() -> None:
    assert sum(block.runs for _, block in ALL if block.language in RUNNABLE) > 10
    assert all(len(block.reason) > 8 for _, block in ALL if block.reason is not None)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_is_one_that_ptd_takes(page: Path) -> None:
    for block in blocks.blocks_of(page):
        for line, command, _ in block.commands() if block.language == SHELL else ():
            arguments = blocks.ptd_arguments(as_run(command))
            if arguments is not None:
                check(arguments, place(page, line))


def check(arguments: list[str], where: str) -> None:
    """Parse a command line without running it, and assert that the keys of its overrides exist."""
    said = f"{where}: ptd {' '.join(arguments)}"
    command, rest = descend(arguments, said)
    try:
        given = command.make_context(command.name, rest).params
    except typer.Exit:  # --help, --version
        return
    except typer.TyperException as error:
        raise AssertionError(f"{said}: {error}") from error
    for override in given.get("overrides") or []:
        if "=" in override:
            check_key(override.partition("=")[0], where)


def descend(words: list[str], said: str) -> tuple[Any, list[str]]:
    """Return the subcommand that ``words`` begin with, and the words after its name."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands") and rest and not {"--help", "--version"} & {rest[0]}:
        word = rest.pop(0)
        if word.startswith("-"):  # an option of all commands
            assert word in options_of(command), said
            continue
        assert word in command.commands, said
        command = command.commands[word]
    return command, rest


def options_of(command: Any) -> set[str]:
    """Return the names of a command's options."""
    own = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    return own | {"--help"}


def check_key(key: str, where: str) -> None:
    section, _, name = key.partition(".")
    assert section in RunConfig.model_fields, f"{where}: {key} is no key of a run file"
    if section == "method":
        names = {"name", *(field.name for method in methods().values() for field in fields(method.config))}
    else:
        names = set(getattr(RunConfig.model_fields[section].annotation, "model_fields", {}))
    first = name.split(".")[0]
    assert not first or not names or first in names, f"{where}: {key} is no key of a run file"


def test_a_misspelt_option_or_key_is_found() -> None:
    for wrong in (["train", "r.yaml", "--overwrit"], ["trian", "r.yaml"], ["eval", "--adapter", "out"]):
        with pytest.raises(AssertionError):
            check(wrong, "here")
    for wrong in ("train.learning_rates=1", "trains.seed=1", "method.num_tokens=3"):
        with pytest.raises(AssertionError):
            check(["train", "r.yaml", wrong], "here")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_running_text(page: Path) -> None:
    """The subcommand and the options exist; running text may omit the other arguments."""
    for words in blocks.inline_commands(page):
        said = f"{name_of(page)}: ptd {' '.join(words)}"
        alternatives = [
            [*words[:index], part, *words[index + 1 :]]
            for index, word in enumerate(words[:2])
            for part in word.split("|")
            if "|" in word and not word.startswith("-")
        ]
        for line in alternatives or [words]:  # ptd launch local|ssh|slurm
            if line[0] in ("…", "COMMAND"):
                continue
            command, rest = descend(line, said)
            given = {word.partition("=")[0] for word in rest if word.startswith("--")}
            assert given <= options_of(command), said


def test_yaml_is_part_of_a_run_file() -> None:
    for page, block in ALL:
        if block.language == "yaml":
            whole = yaml.safe_load(block.text)
            for part in (whole, *whole.pop("members", {}).values()):
                for section, value in part.items():
                    for key in value if isinstance(value, dict) else [""]:
                        check_key(f"{section}.{key}".rstrip("."), place(page, block.line))


# --- running the blocks ---------------------------------------------------------------------------------------------

running = pytest.mark.skipif(not os.environ.get("PTD_DOCS"), reason="takes minutes: PTD_DOCS=1, or make docs-test")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Yield environment variables whose PATH has a ``ptd`` that passes commands to a process with the imports done."""
    folder = tmp_path_factory.mktemp("bin")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    given = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    given |= {
        "PATH": f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
    }
    warm.write_client(folder / "ptd", folder / "socket")
    command = [sys.executable, str(HERE / "warm.py"), str(folder / "socket")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=given, start_new_session=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield given
        os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    folder: Path = world.build(tmp_path_factory.mktemp("world"))
    subprocess.run(["ptd", "train", "trained.yaml"], cwd=folder, env=environment, check=True, capture_output=True)
    return folder


@running
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.runs and b.language in RUNNABLE for p, b in ALL if p == page)], ids=name_of
)
def test_page(
    page: Path, built: Path, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.settle(built, tmp_path)
    monkeypatch.chdir(tmp_path)
    namespace = world.names(name_of(page))
    for block in blocks.blocks_of(page):
        if not block.runs:
            continue
        for of, piece, prepare in world.BEFORE:
            if of == name_of(page) and piece in block.text:
                prepare(tmp_path)
        if block.language == SHELL:
            run_shell(block, tmp_path, environment)
        elif block.language == "python":
            run_python(block, namespace)


def run_shell(block: Any, folder: Path, environment: dict[str, str]) -> None:
    """Run a shell block; commands that are not run become empty lines, so that bash's line numbers match the page's."""
    lines: list[str] = []
    for _, command, runs in block.commands():
        lines += (as_run(command) if runs else "\n" * command.count("\n")).split("\n")
    report = f"trap 'echo \"{name_of(block.page)}:$((LINENO + {block.line - 2})): $BASH_COMMAND\" >&2' ERR\n"
    done = subprocess.run(
        ["bash", "-eEuo", "pipefail", "-c", report + "\n".join(lines)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{place(block.page, block.line)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


def test_a_command_that_fails_is_named() -> None:
    block = blocks.Block(PAGES[0], 10, SHELL, "true\necho \\\n  two\nfalse\n", None, ())
    with pytest.raises(AssertionError, match=r"README\.md:13: false"):
        run_shell(block, ROOT, dict(os.environ))


def as_run(command: str) -> str:
    """Return the command with the reader's own names replaced, and changed to start nothing on other machines."""
    for word, value in world.WORDS.items():
        command = command.replace(word, value)
    return re.sub(r"^ptd launch (local|ssh|slurm) ", r"ptd launch \1 --dry-run ", command)


def run_python(block: Any, namespace: dict[str, Any]) -> None:
    code = compile("\n" * (block.line - 1) + block.text, name_of(block.page), "exec")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # warnings of other libraries do not concern the reader
        exec(code, namespace)
