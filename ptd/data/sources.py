"""Load rows (a memory-mapped `datasets.Dataset`) from a file, a saved dataset folder or a hub name.

This module parses JSON and CSV files itself, because the readers of ``datasets`` change texts: version 5.2 turns
``"2020-01-02T10:00Z"`` into ``2020-01-02 10:00:00`` and the CSV text ``NA`` into a missing value, and rejects a key
that first appears after 10 MB. The rows still go through the cache of ``datasets``, whose file lock lets many ranks
load the same file.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import json
import logging
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import datasets
from datasets import Dataset, DatasetDict, Features, Json, Value, load_dataset

from ptd.files import as_path, open_text, write_text
from ptd.types import UserError

Row = dict[str, Any]

_OTHER_SUFFIXES = {".txt", ".tsv", ".arrow", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".xlsx", ".pkl", ".yaml"}


def load_rows(source: str, split: str, *, what: str) -> Dataset:
    """Load ``source``: a .jsonl, .json, .csv or .parquet file, a folder, or a hub name (``NAME``, ``NAME:CONFIG``).

    A folder is one that ``save_to_disk`` wrote, or one that ``load_dataset`` can read (a downloaded hub dataset).
    ``split`` selects from folders and hub datasets; a file has no splits. ``what`` names the setting in messages
    (``data.train``). A key that is missing from a JSON row becomes None. Raises `UserError` if ``source`` cannot be
    read or has no rows.
    """
    path = as_path(source)
    with _quiet():
        if path.is_dir():
            rows = _folder(path, source, split, what)
        elif path.suffix.lower() in _FILES and path.exists():
            rows = _FILES[path.suffix.lower()](path, what)
        elif _looks_like_a_path(source, path):
            raise UserError(_not_a_source(source, path, what))
        else:
            rows = _hub(source, split, what)
    if len(rows) == 0:
        raise UserError(_no_rows(source, what))
    return rows


def check_source(source: str, *, what: str) -> str:
    """Describe ``source`` without reading it; raise `UserError` for a path that does not exist or cannot be read."""
    path = as_path(source)
    if path.is_dir():
        return f"{source} (a folder)"
    if path.suffix.lower() in _FILES and path.exists():
        return f"{source} ({path.stat().st_size:,} bytes)"
    if _looks_like_a_path(source, path):
        raise UserError(_not_a_source(source, path, what))
    return f"{source} (a name on the hub, not looked up)"


def _looks_like_a_path(source: str, path: Path) -> bool:
    # A hub name is NAME or OWNER/NAME and may contain dots ("gpt-3.5"), so only known file suffixes mark a path.
    return (
        path.exists()
        or source.startswith(("/", "./", "../", "~"))
        or path.suffix.lower() in {*_FILES, *_OTHER_SUFFIXES}
        or len(path.parts) > 2
    )


def _not_a_source(source: str, path: Path, what: str) -> str:
    kinds = ", ".join(_FILES)
    if path.exists():
        how = f": {_to_commas(path, _TAB)}" if path.suffix.lower() == ".tsv" else ""
        kind = path.suffix or "suffixless"
        return f"{what}: {source} is a {kind} file, but only {kinds} can be read; convert it{how}"
    siblings = path.parent.glob("*") if path.parent.is_dir() else []
    near = sorted(sibling.name for sibling in siblings if sibling.suffix in _FILES)
    hint = f"{path.parent} has {', '.join(near[:8])}" if near else f"relative paths start at {Path.cwd()}"
    return f"{what}: there is no file or folder {source}; {hint}"


def _json_rows(path: Path, what: str) -> Iterator[Row]:
    """Yield one object per line; a .json file may hold a single array of objects instead. Skip blank lines."""
    with open_text(path, f"{what}: cannot read") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if start == "[" and path.suffix.lower() == ".json":
            yield from _objects(enumerate(_array(file, path, what), start=1), f"{what}: {path}, element")
        else:
            parsed = ((number, _parse(line, number, path, what)) for number, line in enumerate(file, 1) if line.strip())
            yield from _objects(parsed, f"{what}: {path}, line")


def _array(file: TextIO, path: Path, what: str) -> Any:
    try:
        return json.load(file, object_pairs_hook=_no_key_twice)
    except json.JSONDecodeError as error:
        raise UserError(f"{what}: {path}, line {error.lineno} is not valid JSON: {error.msg}") from error
    except UnicodeDecodeError:
        raise
    except _TOO_MUCH as error:
        raise UserError(f"{what}: {path} cannot be read as JSON: {error}") from error


_TOO_MUCH = (ValueError, RecursionError)
"""Exceptions of Python's JSON reader for a number of more than 4300 digits, and for thousands of nested brackets."""


def _parse(line: str, number: int, path: Path, what: str) -> Any:
    try:
        value = json.loads(line, object_pairs_hook=_no_key_twice)
        if _SURROGATE.search(line):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what}: {path}, line {number} has half of a character (\\u{ord(error.object[error.start]):04x} alone); "
            "write both halves of its surrogate pair, or the character itself"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{what}: {path}, line {number} is not valid JSON ({error.msg} at character {error.pos + 1}); "
            "each line has to be one object"
        ) from error
    except _TOO_MUCH as error:
        raise UserError(f"{what}: {path}, line {number} cannot be read as JSON: {error}") from error


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""Matches half of a surrogate pair. JSON may escape a character beyond U+FFFF as such a pair."""


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; raise `ValueError` for a repeated key, of which Python would keep the last value silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice in one object")
    return found


def _objects(values: Any, place: str) -> Iterator[Row]:
    for number, value in values:
        if not isinstance(value, dict):
            raise UserError(
                f'{place} {number} is not an object but {_short(value)}; write rows as {{"column": value, …}}'
            )
        yield value


def _csv_rows(path: Path, what: str) -> Iterator[Row]:
    """Yield the rows. The first line names the columns; every value stays the text that the file has."""
    csv.field_size_limit(2**31 - 1)  # the module's default refuses texts over 128 KiB
    with open_text(path, f"{what}: cannot read", newline="") as file:
        _check_separator(file.readline(), path, what)
        file.seek(0)
        try:
            reader = csv.reader(file, strict=True)  # else an unclosed quote would swallow the rows after it
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise UserError(
                    f"{what}: {path} names a column twice in its first line ({', '.join(header)}); rename one"
                )
            for values in reader:
                if values and len(values) != len(header):
                    raise UserError(
                        f"{what}: {path}, line {reader.line_num} has {len(values)} values, but the first line names "
                        f"{len(header)} columns; quote values that contain commas"
                    )
                if values:
                    yield dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise UserError(f"{what}: {path}, line {reader.line_num} is not valid CSV: {error}") from error


_TAB = "\t"
_SEPARATORS = {";": "semicolons", _TAB: "tabs", "|": "vertical bars"}


def _check_separator(line: str, path: Path, what: str) -> None:
    """Raise `UserError` if the first line of the file uses another separator than commas."""
    for separator, name in _SEPARATORS.items():
        if separator in line and "," not in line:
            raise UserError(
                f"{what}: {path} appears to be separated by {name}: its first line, {_short(line, 80)!r}, has no "
                f"comma; rewrite it with commas: {_to_commas(path, separator)}"
            )


def _to_commas(path: Path, separator: str) -> str:
    """Return the command that rewrites a table. Quotes in a tab-separated file usually belong to its texts."""
    options = (
        r"delimiter='\t', quoting=csv.QUOTE_NONE" if separator == _TAB else f"delimiter='{separator}', strict=True"
    )
    code = f"import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, {options}))"
    return f'python -c "{code}" < {shlex.quote(str(path))} > commas.csv'


def _from_reader(reader: Callable[[Path, str], Iterator[Row]]) -> Callable[[Path, str], Dataset]:
    def load(path: Path, what: str) -> Dataset:
        state = [*_state_of(path), "v3"]
        textual = _columns_of(path, state, reader, what)
        identity = json.dumps([state, textual])
        return _guarded(
            lambda: Dataset.from_generator(
                _typed_rows,
                features=Features({key: Value("string") if text else Json() for key, text in textual.items()}),
                gen_kwargs={"reader": reader, "path": path, "textual": textual},
                fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:32],
            ),
            f"{what}: {path}",
        )

    return load


def _columns_of(
    path: Path, state: list[Any], reader: Callable[[Path, str], Iterator[Row]], what: str
) -> dict[str, bool]:
    """Return for each column of a file whether it has only text and missing values.

    This takes a pass over all rows, which raises the errors of the file with their lines. The result is stored next to
    the rows in the cache of ``datasets``, so the next start with the same ``state`` of the file does without the pass.
    """
    name = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]
    store = Path(datasets.config.HF_DATASETS_CACHE) / "ptd-columns" / f"{name}.json"
    with contextlib.suppress(OSError, ValueError):
        stored: dict[str, bool] = json.loads(store.read_text(encoding="utf-8"))
        return stored
    found: dict[str, bool] = {}
    for row in reader(path, what):
        for key, value in row.items():
            found[key] = found.get(key, True) and (value is None or isinstance(value, str))
    if not found:
        raise UserError(_no_rows(path, what))
    with contextlib.suppress(UserError):  # the rows themselves do not need it
        write_text(store, json.dumps(found), "HF_DATASETS_CACHE")
    return found


def _typed_rows(reader: Callable[[Path, str], Iterator[Row]], path: Path, textual: dict[str, bool]) -> Iterator[Row]:
    for row in reader(path, ""):
        # `Json` treats a str as encoded JSON, so the text "12" would come back as a number: encode values here.
        yield {
            key: row.get(key) if text or row.get(key) is None else json.dumps(row[key]) for key, text in textual.items()
        }


def _state_of(path: Path) -> list[Any]:
    """Return what distinguishes two states of a file: path, size, times and inode.

    Tools that copy files (rsync -t, tar) reset the modification time, but no tool resets the change time (ctime).
    """
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _parquet(path: Path, what: str) -> Dataset:
    # Each state of the file has its own cache folder: `datasets` distinguishes files by path and time only.
    state = hashlib.sha256(json.dumps(_state_of(path)).encode()).hexdigest()[:16]
    cache = Path(datasets.config.HF_DATASETS_CACHE) / f"ptd-parquet-{state}"
    return _guarded(
        lambda: load_dataset("parquet", data_files=glob.escape(str(path)), split="train", cache_dir=str(cache)),
        f"{what}: {path}",
    )


def _folder(path: Path, source: str, split: str, what: str) -> Dataset:
    if not any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        tables = _tables(path)
        if split in tables:
            return _FILES[tables[split].suffix.lower()](tables[split], what)
        if tables and split.isidentifier():
            raise UserError(_no_split(source, split, ", ".join(tables), what))
        return _hub(str(path.resolve()), split, what)
    if not any(path.rglob("*.arrow")):  # without rows save_to_disk writes no data file, and loading fails
        raise UserError(_no_rows(source, what))
    loaded = _guarded(lambda: datasets.load_from_disk(str(path)), f"{what}: {source}")
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise UserError(_no_split(source, split, ", ".join(loaded), what))
        return loaded[split]
    return loaded


_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words in file names that `datasets` takes for the name of a split."""


def _tables(folder: Path) -> dict[str, Path]:
    """Return the file of each split; empty if the folder has files other than CSV and JSONL, or two for one split.

    `load_rows` reads these files as if they were given one by one.
    """
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if any(path.suffix.lower() not in (".csv", ".jsonl") or not path.is_file() for path in files):
        return {}
    found: dict[str, Path] = {}
    for split, words in _SPLITS.items():
        named = [path for path in files if set(re.split(r"[^a-z]+", path.stem.lower())) & set(words)]
        if len(named) > 1:
            return {}
        found |= dict(zip([split], named, strict=False))
    return found


def _hub(source: str, split: str, what: str) -> Dataset:
    name, _, config = source.partition(":") if not Path(source).is_dir() else (source, "", "")
    try:
        return load_dataset(name, config or None, split=split)
    except ConnectionError as error:
        raise UserError(
            f"{what}: {source} is not a local file or folder, and it cannot be looked up on the Hugging Face hub: "
            f"the hub is unreachable ({error}). Download the dataset on a machine with network access and give its "
            "folder, or correct the path"
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"{what}: {source} is neither a local file or folder nor a dataset on the Hugging Face hub that you may "
            "read; correct the name, or log in with `hf auth login` if it is private"
        ) from error
    except Exception as error:  # the exceptions of `datasets` have no common base class
        text = str(error)
        if text.startswith("Unknown split"):
            raise UserError(_no_split(source, split, text.partition("one of ")[2].strip("[]."), what)) from error
        hint = "; write it as NAME:CONFIG" if "Config name is missing" in text else ""
        raise UserError(f"{what}: {source} cannot be loaded: {_reason(error)}{hint}") from error


def _no_rows(source: str | Path, what: str) -> str:
    return f"{what}: {source} has no rows; give data with at least one row"


def _no_split(source: str, split: str, existing: str, what: str) -> str:
    return f"{what}: {source} has no split {split!r}; it has {existing}. Set {what}_split to one of them"


def _guarded(load: Callable[[], Any], place: str) -> Any:
    try:
        return load()
    except Exception as error:  # the exceptions of `datasets` have no common base class
        raise UserError(f"{place} cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return the innermost cause on one line: `datasets` wraps it in "an error occurred"."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {_short(str(error))}"


def _short(value: Any, limit: int = 300) -> str:
    text = " ".join(value.split()) if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars unless stderr is a terminal, and hide warnings that would accompany a raised error."""
    hub = logging.getLogger("huggingface_hub")
    before = datasets.logging.get_verbosity(), hub.level, datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    hub.setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before[0])
        hub.setLevel(before[1])
        if not before[2]:
            datasets.enable_progress_bars()


_FILES: dict[str, Callable[[Path, str], Dataset]] = {
    ".jsonl": _from_reader(_json_rows),
    ".json": _from_reader(_json_rows),
    ".csv": _from_reader(_csv_rows),
    ".parquet": _parquet,
}
