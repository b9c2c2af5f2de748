"""The rows of a measurement: each is written as soon as it is measured, and a stopped program continues from its file.

A file holds its evidence (command, commit, hardware, versions, settings, digest of the code) and one record per line.
Each record has the fields that identify it and an ``outcome``: measured, failed or skipped, the latter two with a
``reason``. Rows of other code, another machine, other versions or other settings are never mixed with new rows: the
program refuses the file, or with ``--replace`` measures the rows again. A program whose results are mostly not times
may instead record the machine of each row. A failed row is finished; a skipped row (for example, a package is missing)
is tried again by every start. While a file is written, FILE.begun exists next to it: the writer's lock, which also
names the row in progress, so that the process that started a crashed writer can record which row crashed it (`blame`).
"""

from __future__ import annotations

import argparse
import ast
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
    raise SystemExit(f"ptd is imported from {Path(ptd.__file__).parents[1]}, not from {ROOT}; set PYTHONPATH=.:kernels")
SOURCES = ("ptd", "kernels", "launch", "ds_configs", "benchmarks/rows.py")
"""The files that a figure of ptd depends on, in addition to the program that measures it."""
IDENTITY = ("code", "hardware", "versions", "settings")
TIME_OVER, BROKEN = 75, 70
"""Exit codes after which the same command continues: the time is over; this process can no longer use the GPU."""


class Skip(Exception):
    """This row cannot be measured here, for a reason that is not a failure, such as a missing package."""


def read(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the records of a file and its evidence; both are empty if the file does not exist."""
    if not file.is_file():
        return [], {}
    found = json.loads(file.read_text(encoding="utf-8"))
    return found["records"], found.get("evidence", {})


def write(file: Path, records: Iterable[dict[str, Any]], found_by: dict[str, Any]) -> None:
    """Write evidence and one record per line. A reader sees the old file or the new file, never a partial one."""
    lines = ",\n".join(json.dumps(record) for record in records)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(f'{{"evidence": {json.dumps(found_by)},\n"records": [\n{lines}\n]}}\n', encoding="utf-8")
    part.replace(file)


def write_csv(file: Path, lines: Sequence[Mapping[str, Any]], *, digits: int) -> None:
    """Write all lines with all columns; floats are rounded to ``digits`` decimal places."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, names)
        writer.writeheader()
        for line in lines:
            writer.writerow(
                {k: round(value, digits) if isinstance(value, float) else value for k, value in line.items()}
            )


def digest(sources: Iterable[str]) -> str:
    """Return a digest of the code in these files and folders of the clone.

    Comments, docstrings and Markdown are left out, so a change of wording leaves measured rows valid.
    """
    found = hashlib.sha256()
    for source in sorted(sources):
        path = ROOT / source
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".md":
                content = _code(file.read_bytes()) if file.suffix == ".py" else file.read_bytes()
                found.update(f"{file.relative_to(ROOT)}\0".encode() + content)
    return found.hexdigest()[:16]


def _code(source: bytes) -> bytes:
    """Return a text that is the same for two sources of the same code, with whatever comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [each for each in node.body if not _is_text(each)]
    return ast.dump(tree).encode()


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--output``, ``--replace`` and ``--minutes``, the same for every program that writes rows."""
    parser.add_argument("--output", type=Path, help="JSON file for the rows; a later start continues it")
    parser.add_argument("--replace", action="store_true", help="replace rows of other code or another machine")
    parser.add_argument("--minutes", type=float, default=None, help="begin no row after this time")


class Rows:
    """The rows of one file. ``names``: the fields that identify a record."""

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
        """Lock the file and read its rows; with ``file`` None, nothing is stored.

        ``program``, ``sources`` and ``common`` name the code that the rows depend on, and ``packages`` further packages
        whose versions are recorded. ``device`` is what the rows are measured on; None: a GPU if one exists. ``about``
        is further evidence for readers. ``identity`` names the evidence that must be equal for all rows; without
        "hardware" in it, each row records its own hardware. ``minutes``: begin no row later than this.

        Raises SystemExit if another process writes the file, or if it has rows with a different ``identity`` and
        ``replace`` is False.
        """
        self.file, self.names = file, names
        self._of_a_row = () if "hardware" in identity else ("hardware",)
        self._until = None if minutes is None else time.monotonic() + 60 * minutes
        code = digest((*common, f"benchmarks/{program}.py", *sources))
        found_by = {**evidence(*packages), "hardware": hardware(device)}
        if torch.version.cuda and (device is None or device.type == "cuda"):
            found_by["versions"]["cuda"] = torch.version.cuda
        found_by["versions"].pop("ptd", None)  # ptd may be installed in another version; the digest is exact
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
                f"{file} has {len(self.records)} rows that were measured with {told}. They cannot share a file "
                "with new rows; give --replace to measure them again, or give another output"
            )
        if other:
            self.records = []
        self._write()

    def has(self, **name: Any) -> bool:
        """Return whether this row is finished, that is, measured or failed."""
        finished = (record for record in self.records if record["outcome"] != "skipped")
        return any(all(record[field] == name[field] for field in self.names) for record in finished)

    def begin(self, **name: Any) -> None:
        """Record that this row is in progress. Exits with `TIME_OVER` if the time is over."""
        if self._until is not None and time.monotonic() > self._until:
            self.close()
            print("the time is over; run the same command again to continue", file=sys.stderr)
            raise SystemExit(TIME_OVER)
        self.mark(**name)

    def mark(self, **name: Any) -> None:
        """Record that this row, which has begun before, is in progress; unlike `begin`, never exits."""
        if self._begun is not None:
            _put(self._begun, {"name": name, "since": time.time()})

    def add(self, *found: dict[str, Any]) -> None:
        """Store these records, which replace older ones of the same names. The default ``outcome`` is "measured"."""
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
        """Store that this row failed, or was skipped (`Skip`), with the reason. Exits with `BROKEN` if this process can
        no longer use the GPU; otherwise frees the memory that the failure held."""
        outcome = "skipped" if isinstance(error, Skip) else "failed"
        reason = str(error) if isinstance(error, Skip) else f"{type(error).__name__}: {error}"
        print(f"{', '.join(map(str, name.values()))}: {outcome}: {reason[:300]}", file=sys.stderr, flush=True)
        self.add({**name, "outcome": outcome, "reason": reason[:2000]})
        error.__traceback__ = None
        if gpu_is_broken():
            self.close()
            os._exit(BROKEN)  # a normal exit would wait for the GPU
        free_memory()

    @contextmanager
    def row(self, **name: Any) -> Iterator[dict[str, Any]]:
        """Measure a row: store what the caller puts into the yielded mapping, or an exception as the row's failure."""
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
        """Yield a folder for files that are large or slow to create.

        The next start finds them unless the work in the folder completed, or the code or the settings changed. Raises
        SystemExit if the folder belongs to another user.
        """
        if self.file is None:
            with tempfile.TemporaryDirectory() as name:
                yield Path(name)
            return
        place = hashlib.sha256(str(self.file.resolve()).encode()).hexdigest()[:8]
        folder = Path(tempfile.gettempdir()) / f"ptd-{self.file.stem}-{os.getuid()}-{place}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise SystemExit(f"{folder} is a link or belongs to another user; remove it")
        code, now = folder / "code", json.dumps([self.evidence["code"], self.evidence["settings"]])
        if not code.exists() or code.read_text(encoding="utf-8") != now:
            shutil.rmtree(folder)
            folder.mkdir(mode=0o700)
            code.write_text(now, encoding="utf-8")
        yield folder
        shutil.rmtree(folder)

    def close(self) -> None:
        """Unlock the file."""
        if self._begun is not None and self.file is not None:
            _beside(self.file).unlink(missing_ok=True)
            os.close(self._begun)
            self._begun = None

    def _write(self) -> None:
        if self.file is not None:
            write(self.file, self.records, self.evidence)


def gpu_is_broken() -> bool:
    """Return whether an earlier error, such as an illegal access, makes every use of the GPU by this process fail."""
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
    """Return the row that the file's writer is measuring: its ``name``, and its start time ``since``; or None."""
    try:
        return json.loads(_beside(file).read_text(encoding="utf-8") or "null")  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return None


def blame(file: Path, reason: str) -> dict[str, Any] | None:
    """Store the row that a dead writer was measuring as failed for this reason; return its name, or None."""
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
    """Start a Python process that imports this clone's packages and is killed when the calling process ends (Linux)."""
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
    """Return FILE.begun as a file descriptor, locked; raises SystemExit if another process keeps it locked for 5 s."""
    end = time.monotonic() + 5
    while True:
        handle = os.open(_beside(file), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            if time.monotonic() > end:
                raise SystemExit(
                    f"{file} is being written by another process; wait for its end, or give another output"
                ) from None
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
