"""benchmarks/rows.py and gpu.py: a measured row is kept once, however a stage ends, and not mixed with other code's."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import rows  # noqa: E402
from rows import Rows, Skip  # noqa: E402

PROGRAM = """
import argparse, os, signal, time
from pathlib import Path
from rows import Rows, Skip, add_arguments

parser = argparse.ArgumentParser()
add_arguments(parser)
args = parser.parse_args()
found = Rows(args.output, ("n",), program="rows", replace=args.replace, minutes=args.minutes)
for n in range(6):
    if found.has(n=n):
        continue
    with found.row(n=n) as row:
        with open(__file__ + ".log", "a") as log:
            log.write(f"{n} ")
        if n == 1:
            raise ValueError("a mistake")
        if n == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        if n == 3:
            raise SystemExit("not said as an error")
        if n == 4:
            raise Skip("no such package")
        row["value"] = n * n
found.close()
"""


def opened(file: Path, **options: Any) -> Rows:
    return Rows(file, ("n",), program="rows", **options)


def contents(file: Path) -> dict[Any, dict[str, Any]]:
    """Return the records by number; each number occurs once."""
    records, _ = rows.read(file)
    assert len({record["n"] for record in records}) == len(records)
    return {record["n"]: record for record in records}


@pytest.fixture
def part(tmp_path: Path) -> gpu.Part:
    (tmp_path / "program.py").write_text(PROGRAM)
    return gpu.Part("part", str(tmp_path / "program"), needs=())


def args_for(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"results": tmp_path, "quick": False, "replace": False, "minutes": 5.0, **changes})


def test_a_row_that_takes_its_process_with_it_is_nobody_elses_end(tmp_path: Path, part: gpu.Part) -> None:
    assert gpu.run(part, args_for(tmp_path), time.monotonic() + 300) == ("measured", "")
    found = contents(tmp_path / "part.json")
    outcomes = {n: record["outcome"] for n, record in found.items()}
    assert outcomes == {0: "measured", 1: "failed", 2: "failed", 3: "failed", 4: "skipped", 5: "measured"}
    assert (found[0]["value"], found[5]["value"]) == (0, 25)
    reasons = [found[n]["reason"] for n in (1, 2, 3, 4)]
    assert reasons[0] == "ValueError: a mistake"
    assert "killed by SIGSEGV" in reasons[1]
    assert "exited with 1" in reasons[2]
    assert "not said as an error" in reasons[2]
    assert reasons[3] == "no such package"
    log = tmp_path / "program.py.log"
    assert log.read_text().split() == list("012345")
    assert gpu.run(part, args_for(tmp_path), time.monotonic() + 300) == ("measured", "")
    assert log.read_text().split() == [*"012345", "4"], "only what was skipped is looked at again"
    assert contents(tmp_path / "part.json") == found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.json", "program.py", "program.py.log"]


def test_a_row_without_an_end_is_ended(tmp_path: Path, part: gpu.Part, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("if n == 1:", "if n == 1:\n            time.sleep(600)"))

    def wait(process: subprocess.Popen[str], end: float) -> bool:
        while (rows.begun(tmp_path / "part.json") or {"name": {}})["name"].get("n") != 1:
            time.sleep(0.02)
        process.kill()
        process.wait()
        return False

    monkeypatch.setattr(gpu, "wait", wait)
    unfinished = ("unfinished", "the time is over")
    assert gpu.run(part, args_for(tmp_path), time.monotonic() + 300) == unfinished
    assert list(contents(tmp_path / "part.json")) == [0], "it had little time, and is tried again"
    assert gpu.run(part, args_for(tmp_path, minutes=0.0), time.monotonic() + 300) == unfinished
    assert contents(tmp_path / "part.json")[1]["reason"].startswith("no result within")


def test_what_a_package_is_missing_for_says_so(tmp_path: Path) -> None:
    part = gpu.Part("part", "nothing", needs=("torch", "no_such_package"))
    assert gpu.run(part, args_for(tmp_path), time.monotonic() + 9) == ("skipped", "not installed: no_such_package")


def test_no_row_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    found = opened(tmp_path / "f.json", minutes=0)
    with pytest.raises(SystemExit) as end, found.row(n=1):
        raise AssertionError("it was begun")
    assert end.value.code == rows.TIME_OVER
    assert contents(tmp_path / "f.json") == {}


def test_rows_of_something_else_are_refused_or_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f.json"
    first = opened(file, settings={"steps": 1})
    first.add({"n": 1, "value": 1.0})
    first.close()
    with pytest.raises(SystemExit, match=r'1 rows .* settings \{"steps": 1\}, now \{"steps": 2\}.*--replace'):
        opened(file, settings={"steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr(rows, "digest", lambda sources: "other")
        with pytest.raises(SystemExit, match=r"code .*, now other"):
            opened(file, settings={"steps": 1})
        patch.setattr(rows, "hardware", lambda device: "another GPU")
        with pytest.raises(SystemExit, match="another GPU"):
            opened(file, settings={"steps": 1})
    assert contents(file)[1]["value"] == 1.0, "a refusal changes nothing"
    for _ in range(2):  # the second time there is nothing to replace
        again = opened(file, settings={"steps": 2}, replace=True)
        if not again.has(n=2):
            again.add({"n": 2, "value": 4.0})
        again.close()
    assert list(contents(file)) == [2]


def test_rows_that_are_no_times_may_be_of_several_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, machine in enumerate(("one", "two")):
        monkeypatch.setattr(rows, "hardware", lambda device, machine=machine: machine)
        each = opened(tmp_path / "f.json", identity=("code", "versions", "settings"))
        each.add({"n": number})
        each.close()
    assert [record["hardware"] for record in rows.read(tmp_path / "f.json")[0]] == ["one", "two"]


def test_two_processes_never_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(tmp_path / "f.json")
    clock = iter(range(0, 100, 4))
    monkeypatch.setattr(rows.time, "monotonic", lambda: next(clock))
    with pytest.raises(SystemExit, match="being written by another process"):
        opened(tmp_path / "f.json")
    first.close()
    opened(tmp_path / "f.json").close()


def test_digests_tell_code_apart_and_ignore_its_wording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    (tmp_path / "a" / "__pycache__").mkdir(parents=True)
    python, other = tmp_path / "a" / "x.py", tmp_path / "a" / "x.yaml"

    def digest(source: str, setting: str = "k: 1", note: str = "") -> str:
        python.write_text(source)
        other.write_text(setting)
        (tmp_path / "a" / "README.md").write_text(note)
        (tmp_path / "a" / "__pycache__" / "x.pyc").write_text(note)
        return rows.digest(["a"])

    code = 'def f(a):\n    """One."""\n    return "one"\n'
    before = digest(code)
    assert digest('"""Module."""\ndef f(a):  # noted\n    """Two."""\n\n    return "one"\n', note="other") == before
    changed = [(code.replace('"one"', '"two"'),), (code.replace("(a)", "(b)"),), (code, "k: 2")]
    assert len({digest(*each) for each in changed} | {before}) == 4


def test_work_is_kept_for_the_next_start_of_the_same_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows.tempfile, "gettempdir", lambda: str(tmp_path))

    def start(file: str, code: str, ends: bool = False) -> list[str]:
        monkeypatch.setattr(rows, "digest", lambda sources: code)
        found = opened(tmp_path / file)
        try:
            with found.work_folder() as folder:
                before = sorted(path.name for path in folder.iterdir() if path.name != "code")
                (folder / f"of {code}").touch()
                if not ends:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        finally:
            found.close()
        return before

    assert start("f.json", "one") == []
    assert start("f.json", "one") == ["of one"]
    assert start("other.json", "one") == [], "another file's work is its own"
    assert start("f.json", "two") == []
    assert start("f.json", "two", ends=True) == ["of two"]
    assert start("f.json", "two") == []


def test_a_failure_is_kept_and_a_skipped_row_may_be_measured_later(tmp_path: Path) -> None:
    found = opened(tmp_path / "f.json")
    with found.row(n=1):
        raise Skip("no GPU")
    with found.row(n=2):
        raise RuntimeError("broken")
    assert (found.has(n=1), found.has(n=2)) == (False, True)
    with found.row(n=1) as row:
        row["value"] = 3
    found.close()
    assert {n: record["outcome"] for n, record in contents(tmp_path / "f.json").items()} == {1: "measured", 2: "failed"}


def test_a_stage_killed_in_the_middle_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    """The runner continues a killed rehearsal of the attention benchmark, from this clone and without installing it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "kernels"])}
    command = [sys.executable, "benchmarks/gpu.py", "--stage", "2", "--quick", "--results", str(tmp_path)]
    file = tmp_path / "prefix_attention.json"
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not any(row["outcome"] == "measured" for row in rows.read(file)[0]):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = [row for row in rows.read(file)[0] if row["outcome"] == "measured"]
    assert before
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    after = rows.read(file)[0]
    assert all(row in after for row in before)
    assert max(Counter((row["name"], row["who"]) for row in after).values()) == 1
    assert {row["name"] for row in after if row["outcome"] == "measured"} == {"P 8", "P 128", "packed", "decode"}
    (summed,) = rows.read(tmp_path / "stages.json")[0]
    assert (summed["outcome"], summed["rows"]["measured"]) == ("measured", 13)
    assert {path.name for path in tmp_path.iterdir()} == {
        "prefix_attention.json", "prefix_attention.csv", "prefix_attention.png", "stages.json",
    }  # fmt: skip


def test_a_rehearsal_never_writes_over_results(monkeypatch: pytest.MonkeyPatch) -> None:
    for results in ([], ["--results", str(gpu.RESULTS)], ["--results", str(ROOT / "benchmarks" / "results")]):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--stage", "1", "--quick", *results])
        with pytest.raises(SystemExit, match="outside of benchmarks/results"):
            gpu.main()


def test_every_part_is_there_and_make_knows_the_stages() -> None:
    parts = [part for stage in gpu.STAGES.values() for part in stage]
    assert len({part.name for part in parts}) == len(parts)
    assert all((ROOT / "benchmarks" / f"{part.program}.py").is_file() for part in parts)
    tests = [word for part in parts for word in (*part.full, *part.quick) if word.startswith("tests/")]
    assert all((ROOT / word).exists() for word in tests)
    said = subprocess.run(["make", "-n", "gpu-3", "gpu"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "benchmarks/gpu.py --stage 3 \n" in said
    assert "benchmarks/gpu.py --stage 1 2 3 4 \n" in said
    assert said.index("--stage 1 2 3 4") < said.index("gpu_segments.py --write-table"), "it changes what is measured"
    assert "install" not in said


def test_the_file_is_whole_at_any_time(tmp_path: Path) -> None:
    found = opened(tmp_path / "f.json")
    for n in range(3):
        found.add({"n": n, "value": n})
        assert [record["n"] for record in json.loads((tmp_path / "f.json").read_text())["records"]] == list(
            range(n + 1)
        )
    found.close()
