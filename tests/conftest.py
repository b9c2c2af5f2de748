"""Modules (`SHARED`) and fixtures that all tests share: a backbone, the command line, jobs of several ranks."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = ("families", "family_sheet", "browser", "attention_cases", "matrix", "reporting")
for name in SHARED:  # imported by file: this folder on sys.path would shadow ptd_kernels
    if name in sys.modules:
        continue
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


ROOT = Path(__file__).parents[1]
LONG = ("test_triton_backend", "test_quickstart", "test_plan", "test_matrix")


@cache
def starts_ranks(file: Path) -> bool:
    """Return whether a file's tests start several processes, with ``ptd launch`` or with a worker program on ranks."""
    return file.parent.name == "launch" or '"worker_' in file.read_text(encoding="utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest tests first, so that with several workers (``make test``) none of them runs last, on its own."""
    items.sort(key=lambda item: (not starts_ranks(item.path), item.path.stem not in LONG))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Assign each file to one worker, and all files that start ranks to the same worker, so that jobs do not overlap.

    Tests on the emulated GPU are assigned one by one. ``--dist loadgroup`` would suffice, but pytest-xdist 3.8 writes
    the groups where pytest 9.2 does not read them.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if Path(file).parent.name == "gpu_paper":  # few files, one of which takes nearly all of the time
                return nodeid
            return "ranks" if starts_ranks(Path(file)) else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny llama with its tokenizer; the folder is read-only by convention."""
    from families import save_backbone

    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yield a `browser.Browser`. Without chromium the test is skipped, or fails if PTD_REQUIRE_BROWSER=1."""
    from browser import CHROMIUM, Browser

    if CHROMIUM is None:
        if os.environ.get("PTD_REQUIRE_BROWSER") == "1":
            pytest.fail("there is no chromium, and PTD_REQUIRE_BROWSER=1")
        pytest.skip("there is no chromium on this machine")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def ptd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run ``ptd ARGUMENTS…`` in this process."""

    from ptd.cli import main

    def run(*arguments: object, stdin: str | bytes | None = None) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["ptd", *map(str, arguments)])
        if stdin is not None:
            content = stdin if isinstance(stdin, bytes) else stdin.encode()
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """``launch(ranks, script, *arguments)`` runs a script on every rank; a failure shows the output of the ranks."""
    folder, numbers = tmp_path_factory.mktemp("ranks"), count()
    command, log = [sys.executable, str(Path(__file__).with_name("rank_server.py"))], folder / "server.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as server,
    ):
        assert server.stdin is not None
        assert server.stdout is not None
        answers = map(json.loads, server.stdout)

        def run(ranks: int, *program: str | Path) -> None:
            logs = folder / str(next(numbers))
            job = {"ranks": ranks, "program": [str(word) for word in program], "logs": str(logs)}
            print(json.dumps(job), file=server.stdin, flush=True)
            codes = next((answer["codes"] for answer in answers if answer["logs"] == job["logs"]), None)
            assert codes is not None, f"{command} ended:\n{log.read_text()[-8000:]}"
            written = "\n".join(f"rank {rank}:\n{(logs / f'{rank}.log').read_text()[-4000:]}" for rank in range(ranks))
            assert not any(codes), f"{program} ended with {codes}\n{written}"

        yield run


@pytest.fixture(scope="session")
def train_here() -> Callable[..., list[str]]:
    """``train_here(run_file_as_dict, stop=7)`` trains in this process, aborts at step ``stop``, returns the notes."""

    from reporting import Notes, Stopped

    from ptd.commands.train import train
    from ptd.config import parse_config

    def run(raw: dict[str, Any], *, stop: int | None = None, overwrite: bool = False) -> list[str]:
        notes = Notes(stop)
        try:
            train(parse_config(raw), overwrite=overwrite, reporter=notes)
        except Stopped:
            return notes.lines
        assert stop is None
        return notes.lines

    return run


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 22 rows of prompt and completion with very different lengths; one byte is one token."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {"prompt": f"{index} times {index % 5} is ", "completion": "ab" * (1 + index * 7 % 11) + str(index)}
        for index in range(22)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make ``datasets`` and ptd use cache folders of this session, in this process and in launched ranks."""
    import datasets

    folder = str(tmp_path_factory.mktemp("hf_cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg_cache")))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture
def backend_for_one(monkeypatch: pytest.MonkeyPatch) -> str:
    """Register an attention backend that gives all sequences the same prefix, and return its name."""
    from ptd_kernels.prefix_attention import problem
    from ptd_kernels.prefix_attention.merge import merge_attention

    def refuses(given: problem.Problem) -> str | None:
        return None if given.prefix_index is None else "it gives all sequences the same prefix"

    alone = problem.Backend("alone", merge_attention, refuses, lambda given: "the same prefix", priority=-5)
    monkeypatch.setitem(problem._BACKENDS, "alone", alone)
    return "alone"


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Restore the environment: what ranks and launchers write into it would make a later test a distributed run."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)
