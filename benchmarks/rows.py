"""The rows of a measurement: in their file as soon as each is found, and continued there after any end.

A file has its evidence (command, commit, hardware, versions, settings, digest of the code) and a record a line; each
record names what it is of, and has an ``outcome``: measured, failed or skipped, the latter two with their ``reason``.
Rows of other code, another machine, other versions or settings are never mixed with new ones: they are refused, or with
``--replace`` measured anew; a program whose figures are hardly times may keep the machine of each row instead. A failed
row is finished; a skipped one (a package is missing, say) is looked at again by every start. Beside the file lies,
while it is written, FILE.begun: the lock of its writer, and the row it is at, so that whoever started a writer that
died can say which row it died of (`blame`).
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import fcntl
import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import ptd
from ptd.bench.machine import evidence, hardware

ROOT = Path(__file__).resolve().parents[1]
if Path(ptd.__file__).resolve().parents[1] != ROOT:
    raise SystemExit(f"ptd is imported from {Path(ptd.__file__).parents[1]}, not from {ROOT}: set PYTHONPATH=.:kernels")
SOURCES = ("ptd", "kernels", "launch", "ds_configs", "benchmarks/rows.py")
"""What a figure of ptd depends on, beside the program that measures it."""
IDENTITY = ("code", "hardware", "versions", "settings")
TIME_OVER, BROKEN = 75, 70
"""Exit codes: rows are left, start again; the GPU cannot be used any more in this process, start again."""


class Skip(Exception):
    """This row cannot be measured here, for a reason that is nobody's fault."""


def read(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records of a file and its evidence; none of either where there is no file."""
    if not file.is_file():
        return [], {}
    found = json.loads(file.read_text(encoding="utf-8"))
    return found["records"], found.get("evidence", {})


def write(file: Path, records: Iterable[dict[str, Any]], found_by: dict[str, Any]) -> None:
    """Evidence and a record a line. A reader sees the old file or the new one, never a part."""
    lines = ",\n".join(json.dumps(record) for record in records)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(f'{{"evidence": {json.dumps(found_by)},\n"records": [\n{lines}\n]}}\n', encoding="utf-8")
    part.replace(file)


def write_csv(file: Path, lines: Sequence[Mapping[str, Any]], *, digits: int) -> None:
    """All lines with all columns, numbers rounded to so many digits behind the point."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, names)
        writer.writeheader()
        for line in lines:
            writer.writerow(
                {k: round(value, digits) if isinstance(value, float) else value for k, value in line.items()}
            )


def digest(sources: Iterable[str]) -> str:
    """Of all files that these paths of the clone name or hold; says, unlike a commit, whether the code is the same."""
    found = hashlib.sha256()
    for source in sorted(sources):
        path = ROOT / source
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--output``, ``--replace`` and ``--minutes``, the same for every program that writes rows."""
    parser.add_argument("--output", type=Path, help="JSON file of the rows; a second start continues it")
    parser.add_argument("--replace", action="store_true", help="measure anew what is of other code or another machine")
    parser.add_argument("--minutes", type=float, default=None, help="no row is begun later than this")


class Rows:
    """The rows of one file. ``names``: the fields of a record that say what it is of."""

    def __init__(
        self,
        file: Path | None,
        names: tuple[str, ...],
        *,
        program: str,
        sources: tuple[str, ...] = (),
        common: tuple[str, ...] = SOURCES,
        identity: tuple[str, ...] = IDENTITY,
        packages: tuple[str, ...] = (),
        device: torch.device | None = None,
        settings: dict[str, Any] | None = None,
        about: dict[str, Any] | None = None,
        replace: bool = False,
        minutes: float | None = None,
    ) -> None:
        """``file`` None: nothing is kept. ``program``, ``sources``, ``common``: what the rows depend on; ``packages``:
        names of more whose versions matter; ``device``: what it is measured on, None: a GPU if there is one;
        ``about``: what a reader wants to know of all rows; ``identity``: what has to be the same of all rows. Without
        "hardware" a row has its own.

        Raises SystemExit where another process writes the file, or it has rows that are not this program's, here.
        """
        self.file, self.names = file, names
        self._of_a_row = () if "hardware" in identity else ("hardware",)
        self._until = None if minutes is None else time.monotonic() + 60 * minutes
        code = digest((*common, f"benchmarks/{program}.py", *sources))
        found_by = {**evidence(*packages), "hardware": hardware(device)}
        found_by["versions"] |= {"cuda": torch.version.cuda} if torch.version.cuda else {}
        found_by["versions"].pop("ptd", None)  # of what is installed, if it is; the digest says more
        self.evidence = {**found_by, "code": code, "settings": settings or {}, **(about or {})}
        self.records: list[dict[str, Any]] = []
        self._begun = None
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        self._begun = _lock(file)
        self.records, before = read(file)
        other = [name for name in identity if before and before.get(name) != self.evidence[name]]
        if other and self.records and not replace:
            self.close()
            told = "; ".join(f"{name} {_short(before.get(name))}, now {_short(self.evidence[name])}" for name in other)
            raise SystemExit(
                f"{file} has {len(self.records)} rows that were measured with {told}. They are not mixed with new "
                "ones: give --replace to measure them anew, or another place"
            )
        if other:
            self.records = []
        self._write()

    def has(self, **name: Any) -> bool:
        """Whether this row is finished: measured, or failed."""
        finished = (record for record in self.records if record["outcome"] != "skipped")
        return any(all(record[field] == name[field] for field in self.names) for record in finished)

    def begin(self, **name: Any) -> None:
        """Say that this row is being measured. Ends the process (`TIME_OVER`) where no time is left for it."""
        if self._until is not None and time.monotonic() > self._until:
            self.close()
            print("the time is over; the same command continues", file=sys.stderr)
            raise SystemExit(TIME_OVER)
        self.mark(**name)

    def mark(self, **name: Any) -> None:
        """As `begin`, of a row that has begun before."""
        if self._begun is not None:
            _put(self._begun, {"name": name, "since": time.time()})

    def add(self, *found: dict[str, Any]) -> None:
        """Keep these records: each with its names, ``outcome`` ("measured" if it says none) and values."""
        for record in found:
            names = {field: record[field] for field in self.names}
            self.records = [each for each in self.records if any(each[field] != names[field] for field in names)]
            rest = {key: value for key, value in record.items() if key not in names}
            own = {field: self.evidence[field] for field in self._of_a_row}
            self.records.append({**names, "outcome": "measured", **own, **rest})
        if self._begun is not None:
            self._write()
            _put(self._begun, None)

    def failed(self, error: BaseException, **name: Any) -> None:
        """Keep that this row failed, or was skipped (`Skip`), and why. Ends the process (`BROKEN`) if the failure has
        left the GPU unusable to it; frees what the failure held otherwise."""
        outcome = "skipped" if isinstance(error, Skip) else "failed"
        reason = str(error) if isinstance(error, Skip) else f"{type(error).__name__}: {error}"
        print(f"{', '.join(map(str, name.values()))}: {outcome}: {reason[:300]}", file=sys.stderr, flush=True)
        self.add({**name, "outcome": outcome, "reason": reason[:2000]})
        error.__traceback__ = None
        if gpu_is_broken():
            self.close()
            os._exit(BROKEN)  # an ordinary end would wait for the GPU
        free_memory()

    @contextmanager
    def row(self, **name: Any) -> Iterator[dict[str, Any]]:
        """Measure a row: what is put into the mapping is kept; an exception is kept as its failure."""
        self.begin(**name)
        values: dict[str, Any] = {}
        try:
            yield values
        except Exception as error:
            self.failed(error, **name)
        else:
            self.add({**name, **values})

    @contextmanager
    def work_folder(self) -> Iterator[Path]:
        """A folder for what is large or slow to make: kept for the next start unless the work in it comes to its end,
        emptied where it is of other code. Raises SystemExit if it is another user's."""
        if self.file is None:
            with tempfile.TemporaryDirectory() as name:
                yield Path(name)
            return
        place = hashlib.sha256(str(self.file.resolve()).encode()).hexdigest()[:8]
        folder = Path(tempfile.gettempdir()) / f"ptd-{self.file.stem}-{os.getuid()}-{place}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise SystemExit(f"{folder} is not this user's; remove it")
        code, now = folder / "code", json.dumps([self.evidence["code"], self.evidence["settings"]])
        if not code.exists() or code.read_text(encoding="utf-8") != now:
            shutil.rmtree(folder)
            folder.mkdir(mode=0o700)
            code.write_text(now, encoding="utf-8")
        yield folder
        shutil.rmtree(folder)

    def close(self) -> None:
        """Give the file back."""
        if self._begun is not None and self.file is not None:
            _beside(self.file).unlink(missing_ok=True)
            os.close(self._begun)
            self._begun = None

    def _write(self) -> None:
        if self.file is not None:
            write(self.file, self.records, self.evidence)


def gpu_is_broken() -> bool:
    """Whether an earlier error (an illegal access, say) makes every later use of the GPU by this process fail."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def begun(file: Path) -> dict[str, Any] | None:
    """The row that the writer of this file is at: its ``name``, and ``since`` when; None if it is between two."""
    try:
        return json.loads(_beside(file).read_text(encoding="utf-8") or "null")  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return None


def blame(file: Path, reason: str) -> dict[str, Any] | None:
    """Keep the row that a dead writer was at as failed for this reason; its name, or None if it was at none."""
    at = begun(file)
    _beside(file).unlink(missing_ok=True)
    if at is None:
        return None
    records, found_by = read(file)
    name: dict[str, Any] = at["name"]
    records = [record for record in records if any(record.get(field) != name[field] for field in name)]
    write(file, [*records, {**name, "outcome": "failed", "reason": reason}], found_by)
    return name


def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
    """A Python process that finds this clone's packages, and never outlives the one that starts it (Linux)."""
    inside = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
    environment = {**os.environ, **options.pop("env", {})}
    environment["PYTHONPATH"] = os.pathsep.join([*inside, *filter(None, [environment.get("PYTHONPATH")])])
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    libc, parent = ctypes.CDLL(None), os.getpid()

    def die_with_parent() -> None:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, text=True, preexec_fn=die_with_parent, **options
    )


def _beside(file: Path) -> Path:
    return file.with_name(file.name + ".begun")


def _lock(file: Path) -> int:
    """FILE.begun, open and locked."""
    end = time.monotonic() + 5
    while True:
        handle = os.open(_beside(file), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            if time.monotonic() > end:
                raise SystemExit(f"{file} is being written by another process") from None
            time.sleep(0.1)
        else:
            _put(handle, None)
            return handle


def _put(handle: int, content: dict[str, Any] | None) -> None:
    os.ftruncate(handle, 0)
    if content is not None:
        os.pwrite(handle, json.dumps(content).encode(), 0)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "…"
