"""Run tests with pytest, and record the outcome of each test function as soon as it is known: a plugin and its command.

    python benchmarks/gpu_tests.py --output benchmarks/results/gpu/kernels.json tests/ptd_kernels [-- PYTEST'S OPTIONS]

Each function has one row: how many of its cases passed, failed and were skipped, with the ids of the failures and the
last characters of their text. A second start runs the functions that have no row yet (rows.py). After a failure that
leaves the GPU unusable, the process writes the row and exits; `make gpu-1` starts it again with the next function.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from collections import Counter
from typing import Any

import pytest

for name in filter(None, os.environ.get("PYTEST_PLUGINS", "").split(",")):  # import the emulated GPU before torch
    importlib.import_module(name)

from rows import BROKEN, ROOT, TIME_OVER, Rows, Skip, add_arguments, gpu_is_broken  # noqa: E402

REASON = 600
"""Characters recorded from the end of a failure's text."""
OPTIONS = (
    "-p",
    "no:cacheprovider",
    "-p",
    "no:randomly",
    "--continue-on-collection-errors",
    "-o",
    "filterwarnings=default",
)


class Plugin:
    """The pytest plugin that records rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.found: dict[str, Any] = {}

    @staticmethod
    def name(item: Any) -> str:
        name: str = item.nodeid.partition("[")[0]
        return name

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Deselect the functions that have a row, and group the cases of each remaining function."""
        names = dict.fromkeys(self.name(item) for item in items)
        left = {name: number for number, name in enumerate(names) if not self.rows.has(test=name)}
        config.hook.pytest_deselected(items=[item for item in items if self.name(item) not in left])
        items[:] = sorted((item for item in items if self.name(item) in left), key=lambda item: left[self.name(item)])

    def pytest_collectreport(self, report: Any) -> None:
        """Record a file that cannot be imported as failed; as skipped if a third-party package is missing."""
        if report.failed and not self.rows.has(test=report.nodeid):
            text = str(report.longrepr)
            missing = text.rpartition("ModuleNotFoundError: ")[2].partition("\n")[0]
            foreign = missing != text and "'ptd" not in missing
            self.rows.failed(Skip(missing) if foreign else ImportError(text[-REASON:]), test=report.nodeid)

    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> None:
        test = self.name(item)
        if self.found.get("test") == test:
            return
        self.keep()
        try:
            self.rows.begin(test=test)
        except SystemExit:
            pytest.exit("the time is over", returncode=TIME_OVER)
        self.found = {"test": test, "counts": Counter(), "failures": {}, "reasons": Counter(), "began": time.time()}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.found["counts"][report.outcome] += 1
        if report.skipped and isinstance(report.longrepr, tuple):
            self.found["reasons"][report.longrepr[2][:200]] += 1
        if report.failed:
            case = report.nodeid.partition("[")[2].removesuffix("]") or report.when
            self.found["failures"][case] = str(report.longrepr)[-REASON:]
            if gpu_is_broken():
                self.keep("; after the last one the GPU is unusable, so the remaining cases were not run")
                self.rows.close()
                os._exit(BROKEN)

    def pytest_sessionfinish(self) -> None:
        self.keep()

    def keep(self, more: str = "") -> None:
        """Add the row of the function that has finished."""
        if not self.found:
            return
        test, counts, failures = self.found["test"], self.found["counts"], self.found["failures"]
        outcome = "failed" if failures else "measured" if counts["passed"] else "skipped"
        row = {"test": test, "outcome": outcome, **counts, "seconds": round(time.time() - self.found["began"], 1)}
        if failures:
            row |= {
                "reason": f"cases that failed: {len(failures)}{more}",
                "failures": dict(list(failures.items())[:20]),
            }
        elif outcome == "skipped":
            row["reason"] = "; ".join(self.found["reasons"])
        print(f"\n{test}: {dict(counts)}, {row['seconds']} s", flush=True)
        self.found = {}
        self.rows.add(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args, given = parser.parse_known_args()
    settings = {"pytest": given, "device": os.environ.get("PTD_TEST_DEVICE", "cpu")}
    rows = Rows(
        args.output, ("test",), program="gpu_tests", sources=("tests",), settings=settings,
        packages=("triton", "pytest", "hypothesis"), replace=args.replace, minutes=args.minutes,
    )  # fmt: skip
    os.chdir(ROOT)
    code = pytest.main([*OPTIONS, *given], plugins=[Plugin(rows)])
    rows.close()
    ended = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
    raise SystemExit(0 if code in ended else int(code))


if __name__ == "__main__":
    main()
