"""Run everything that needs an NVIDIA GPU, in four stages of about eight minutes; `make gpu-1` to `make gpu-4`.

    PYTHONPATH=.:kernels python benchmarks/gpu.py --stage 1 [--minutes 8] [--results FOLDER] [--replace]
    PYTHONPATH=.:kernels python benchmarks/gpu.py --stage 1 2 3 4 --quick --results FOLDER     # a rehearsal, on a CPU

1: a resume, the check that no step waits for the GPU, the kernels' tests, whole runs; 2: the attention benchmark; 3: a
7B model in every placement; 4: the libraries' kernels for long sequences, the levers, fp8, Liger's tests, the plan
compared with measurements. A plain clone is enough: nothing is installed or fetched. A part whose package is missing is
skipped, with a message.

Each part is a separate process that writes each row to FOLDER/PART.json as soon as it is found (rows.py). A stage that
was stopped, for whatever reason, continues where it was: finished rows are not measured again. If a row ends its
process (a crash, or no result within the time), the row is recorded as failed, and the part continues with the next
row. FOLDER/stages.json is the summary. Exit code 0: everything is measured or skipped; 1: something failed; 75: the
time is over, run the command again.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import subprocess
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rows import BROKEN, ROOT, TIME_OVER, Rows, begun, blame, read, start

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
GRACE = 60.0
"""Seconds that a row may continue after the end of the time."""
PTD = ("transformers", "datasets", "pydantic", "yaml", "typer", "rich", "safetensors")


@dataclass(frozen=True)
class Part:
    """A program of this folder, and its arguments and environment on a GPU and in a rehearsal."""

    name: str
    program: str
    full: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    needs: tuple[str, ...] = PTD
    environment: dict[str, str] = field(default_factory=dict)
    rehearsed: dict[str, str] = field(default_factory=dict)


REPRODUCIBLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PTD_TEST_DEVICE": "cuda", "PTD_KERNELS_TUNE": "0"}
WATCHED = {"PYTEST_PLUGINS": "tests.gpu_paper.device"}
TESTS = ("pytest", "hypothesis")
STAGES: dict[int, tuple[Part, ...]] = {
    1: (
        Part("resume", "gpu_resume", quick=("--quick",)),
        Part(
            "no_waiting", "gpu_tests", ("tests/gpu_paper/test_steps.py", "tests/gpu_paper/test_launches.py"),
            ("tests/gpu_paper/test_steps.py", "-k", "packed or bfloat16 or request or skips"), (*PTD, *TESTS),
            WATCHED, WATCHED,
        ),
        Part(
            "kernels", "gpu_tests",
            ("tests/ptd_kernels", "--ignore=tests/ptd_kernels/test_triton_compile.py", "-k", "not in_the_interpreter"),
            ("tests/ptd_kernels/test_triton_backend.py", "tests/ptd_kernels/test_linear_cross_entropy.py",
             "tests/ptd_kernels/test_triton_tune.py", "-k", "head_sizes and 64 or split or accepts or cross or tile"),
            ("triton", *TESTS), REPRODUCIBLE, {"TRITON_INTERPRET": "1", "PTD_TEST_DEVICE": "cpu"},
        ),
        Part(
            "runs", "gpu_tests", ("tests/gpu_paper/test_runs.py",),
            ("tests/gpu_paper/test_runs.py", "-k", "selection or prefix-direct-gpt2"), (*PTD, *TESTS), WATCHED, WATCHED,
        ),
    ),
    2: (Part("prefix_attention", "bench_prefix_attention", quick=("--grid", "quick", "--repeats", "3"), needs=()),),
    3: (Part("placements", "placements", quick=("--quick",)),),
    4: (
        Part("segments", "gpu_segments", quick=("--quick",), needs=()),
        Part("levers", "levers", ("--dtype", "bfloat16", "--rows", "32"), ("--quick",)),
        Part("fp8", "fp8", quick=("--quick",)),
        Part(
            "liger", "gpu_tests", ("tests/backbone/test_liger.py",),
            ("tests/backbone/test_liger.py", "-k", "says_so or stays"), (*PTD, *TESTS, "liger_kernel"),
        ),
        Part("plan_vs_measured", "plan_vs_measured", quick=("--quick",)),
    ),
}  # fmt: skip


def run(part: Part, args: argparse.Namespace, end: float) -> tuple[str, str]:
    """Start the part's process until all its rows are finished or the time is over; return the outcome and reason."""
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return "skipped", f"not installed: {', '.join(missing)}"
    output = args.results / f"{part.name}.json"
    shown = output.relative_to(ROOT) if output.is_relative_to(ROOT) else output  # recorded in the rows' command
    given = [*(part.quick if args.quick else part.full), *(["--replace"] if args.replace else [])]
    environment = part.rehearsed if args.quick else part.environment
    while (left := end - time.monotonic()) > 0:
        program = str(ROOT / "benchmarks" / f"{part.program}.py")
        process = start(
            [program, *given, "--output", str(shown), "--minutes", f"{left / 60:.3f}"], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        said = deque[str](maxlen=30)
        reader = threading.Thread(target=tell, args=(process, said))
        reader.start()
        in_time = wait(process, end + GRACE)
        reader.join()
        if not in_time:
            at = begun(output)
            seconds = 0.0 if at is None else time.time() - at["since"]
            if seconds < 0.8 * 60 * args.minutes:
                return "unfinished", "the time is over"
            blame(output, f"no result within {seconds:.0f} s")
            return "unfinished", "the time is over"
        code = process.returncode
        if code == 0:
            return "measured", ""
        if code == TIME_OVER:
            return "unfinished", "the time is over"
        if code != BROKEN:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
            why = f"its process {how}: " + " | ".join(line.strip() for line in list(said)[-6:])
            if blame(output, why) is None:
                return "failed", why
    return "unfinished", "the time is over"


def tell(process: subprocess.Popen[str], said: deque[str]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            said.append(line)
            print(line, end="", flush=True)


def wait(process: subprocess.Popen[str], end: float) -> bool:
    """Return whether the process exited by itself; kill it at the end of the time."""
    try:
        process.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, nargs="+", choices=STAGES, required=True)
    parser.add_argument("--minutes", type=float, help="time per stage; default 8, with --quick 60")
    parser.add_argument("--results", type=Path, help=f"output folder; default: {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--replace", action="store_true", help="replace rows of other code or another machine")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: every part at a tiny size, on any machine")
    args = parser.parse_args()
    if args.quick and (args.results is None or args.results.resolve().is_relative_to(RESULTS.parent)):
        raise SystemExit(
            "--quick measures nothing worth keeping: give a --results folder outside of benchmarks/results"
        )
    if not args.quick and not torch.cuda.is_available():
        raise SystemExit("this machine has no GPU; give --quick --results FOLDER to rehearse the stages without one")
    args.results = (args.results or RESULTS).resolve()
    args.minutes = args.minutes or (60.0 if args.quick else 8.0)
    stages = Rows(
        args.results / "stages.json", ("part",), program="gpu", sources=("benchmarks", "tests"),
        settings={"quick": args.quick}, replace=True,
    )  # fmt: skip
    for number in args.stage:
        began = time.monotonic()
        end = began + 60 * args.minutes
        for part in STAGES[number]:
            print(f"\n== stage {number}: {part.name}", flush=True)
            part_began = time.monotonic()
            outcome, reason = run(part, args, end)
            stages.add(summary(stages, number, part, args.results, outcome, reason, time.monotonic() - part_began))
        print(f"== stage {number}: {time.monotonic() - began:.0f} s", flush=True)
    stages.close()
    records = [record for record in stages.records if record["stage"] in args.stage]
    for record in records:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in record["rows"].items())
        told = "; ".join(filter(None, [counts, record.get("reason", "")]))
        print(f"{record['stage']} {record['part']:18} {record['outcome']:10} {record['seconds']:6.0f} s  {told}")
    outcomes = {record["outcome"] for record in records}
    if "unfinished" in outcomes:
        print("run the same command again to continue the unfinished parts")
        raise SystemExit(TIME_OVER)
    raise SystemExit("failed" in outcomes or any(record["rows"].get("failed") for record in records))


def summary(
    stages: Rows, number: int, part: Part, results: Path, outcome: str, reason: str, seconds: float
) -> dict[str, Any]:
    """Return the row of a part: its outcome, the outcomes of its rows, and the time of all its starts."""
    before = next((record["seconds"] for record in stages.records if record["part"] == part.name), 0.0)
    counts = Counter(record["outcome"] for record in read(results / f"{part.name}.json")[0])
    row = {"part": part.name, "stage": number, "outcome": outcome, "rows": dict(counts)}
    return {**row, "seconds": round(before + seconds, 1), **({"reason": reason} if reason else {})}


if __name__ == "__main__":
    main()
