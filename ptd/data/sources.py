"""A file, a saved dataset folder or a hub name -> rows (`datasets.Dataset`, memory-mapped).

JSON and CSV files are read here and not by the readers of ``datasets``, because those change texts: 5.2 turns
``"2020-01-02T10:00Z"`` into ``2020-01-02 10:00:00`` and the CSV text ``NA`` into nothing, and they refuse a key that
first appears after 10 MB. The rows still go through the cache of ``datasets``, whose file lock lets many ranks ask for
the same file.
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

from ptd.files import as_path, open_text
from ptd.types import UserError

Row = dict[str, Any]

_OTHER_SUFFIXES = {".txt", ".tsv", ".arrow", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".xlsx", ".pkl", ".yaml"}


def load_rows(source: str, split: str, *, what: str) -> Dataset:
    """Rows of ``source``: a .jsonl, .json, .csv or .parquet file, a folder or a hub name (``NAME`` or ``NAME:CONFIG``).

    A folder is one written by ``save_to_disk``, or any folder ``load_dataset`` understands (a downloaded hub dataset).
    ``split`` selects from folders and hub datasets; a file is all there is. ``what`` names the setting in messages
    (``data.train``). A key that a JSON row lacks is None. Raises `UserError`.
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
    """What ``source`` is, without reading it; raises `UserError` for a file or folder that cannot be one."""
    path = as_path(source)
    if path.is_dir():
        return f"{source} (a folder)"
    if path.suffix.lower() in _FILES and path.exists():
        return f"{source} ({path.stat().st_size:,} bytes)"
    if _looks_like_a_path(source, path):
        raise UserError(_not_a_source(source, path, what))
    return f"{source} (a name on the hub, not looked up)"


def _looks_like_a_path(source: str, path: Path) -> bool:
    # A hub name is NAME or OWNER/NAME, and may contain dots ("gpt-3.5"), so only suffixes of files count.
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
        return f"{what}: {source} is a {kind} file; only {kinds} can be read, convert it to one{how}"
    siblings = path.parent.glob("*") if path.parent.is_dir() else []
    near = sorted(sibling.name for sibling in siblings if sibling.suffix in _FILES)
    hint = f"{path.parent} has {', '.join(near[:8])}" if near else f"relative paths start at {Path.cwd()}"
    return f"{what}: there is no file or folder {source}; {hint}"


def _json_rows(path: Path, what: str) -> Iterator[Row]:
    """One object a line; a .json file may also hold one array of objects. Blank lines count as nothing."""
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
"""What Python's JSON reader raises for a number of over 4300 digits, and for thousands of brackets in each other."""


def _parse(line: str, number: int, path: Path, what: str) -> Any:
    try:
        value = json.loads(line, object_pairs_hook=_no_key_twice)
        if _SURROGATE.search(line):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what}: {path}, line {number} has half of a character (\\u{ord(error.object[error.start]):04x} alone); "
            "write it whole"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{what}: {path}, line {number} is not valid JSON ({error.msg} at character {error.pos + 1}); "
            "each line has to be one object"
        ) from error
    except _TOO_MUCH as error:
        raise UserError(f"{what}: {path}, line {number} cannot be read as JSON: {error}") from error


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a character, as JSON may write those beyond U+FFFF."""


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python would keep the last of the values, another reader perhaps the first."""
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
    """The first line names the columns; every value is text, as it stands in the file."""
    csv.field_size_limit(2**31 - 1)  # the module's default refuses texts over 128 KiB
    with open_text(path, f"{what}: cannot read", newline="") as file:
        _check_separator(file.readline(), path, what)
        file.seek(0)
        try:
            reader = csv.reader(file, strict=True)  # or a quote that nothing closes would swallow the rows behind it
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
    """Refuse a file whose first line is separated by something else than commas."""
    for separator, name in _SEPARATORS.items():
        if separator in line and "," not in line:
            raise UserError(
                f"{what}: {path} looks separated by {name}: its first line, {_short(line, 80)!r}, has no comma; "
                f"separate the values by commas: {_to_commas(path, separator)}"
            )


def _to_commas(path: Path, separator: str) -> str:
    """The command that rewrites a table. Files of tabs mostly have no quotes but those of their texts."""
    options = (
        r"delimiter='\t', quoting=csv.QUOTE_NONE" if separator == _TAB else f"delimiter='{separator}', strict=True"
    )
    code = f"import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, {options}))"
    return f'python -c "{code}" < {shlex.quote(str(path))} > commas.csv'


def _from_reader(reader: Callable[[Path, str], Iterator[Row]]) -> Callable[[Path, str], Dataset]:
    def load(path: Path, what: str) -> Dataset:
        # A first pass finds what is wrong with the file, at its line, and the columns of all rows.
        textual: dict[str, bool] = {}
        for row in reader(path, what):
            for key, value in row.items():
                textual[key] = textual.get(key, True) and (value is None or isinstance(value, str))
        if not textual:
            raise UserError(_no_rows(path, what))
        identity = json.dumps([_state_of(path), textual, "v3"])
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


def _typed_rows(reader: Callable[[Path, str], Iterator[Row]], path: Path, textual: dict[str, bool]) -> Iterator[Row]:
    for row in reader(path, ""):
        # `Json` takes a str for JSON already, so that "12" would come back as a number: encode here.
        yield {
            key: row.get(key) if text or row.get(key) is None else json.dumps(row[key]) for key, text in textual.items()
        }


def _state_of(path: Path) -> list[Any]:
    """What tells one content of a file from another: its size, its times, and the inode. Tools that copy files set the
    time of modification back (rsync -t, tar); nothing sets that of the last change."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _parquet(path: Path, what: str) -> Dataset:
    # A folder of the cache for each state of the file: the library tells files apart by path and time.
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
    if not any(path.rglob("*.arrow")):  # save_to_disk writes no data file without rows, and cannot load that
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
"""What `datasets` takes for the names of splits in the names of files."""


def _tables(folder: Path) -> dict[str, Path]:
    """Split -> file, of a folder of CSV and JSONL files alone: they are read as they would be by themselves."""
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
            f"{what}: {source} is no file or folder here, and it cannot be looked up on the Hugging Face hub: "
            f"the hub is unreachable ({error}). Download the dataset where there is a network and give its folder, or "
            "correct the path"
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"{what}: {source} is no file or folder here, nor a dataset on the Hugging Face hub that you may read; "
            "correct the name, or log in with `hf auth login` if it is private"
        ) from error
    except Exception as error:  # the library has no common base for what may go wrong
        text = str(error)
        if text.startswith("Unknown split"):
            raise UserError(_no_split(source, split, text.partition("one of ")[2].strip("[]."), what)) from error
        hint = "; write it as NAME:CONFIG" if "Config name is missing" in text else ""
        raise UserError(f"{what}: {source} cannot be loaded: {_reason(error)}{hint}") from error


def _no_rows(source: str | Path, what: str) -> str:
    return f"{what}: {source} has no rows; give data with at least one"


def _no_split(source: str, split: str, existing: str, what: str) -> str:
    return f"{what}: {source} has no split {split!r}; it has {existing}. Set {what}_split to one of them"


def _guarded(load: Callable[[], Any], place: str) -> Any:
    try:
        return load()
    except Exception as error:  # the library has no common base for what may go wrong
        raise UserError(f"{place} cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The innermost cause in a line: the library wraps it in "an error occurred"."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {_short(str(error))}"


def _short(value: Any, limit: int = 300) -> str:
    text = " ".join(value.split()) if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars where nobody watches them, and no warnings beside the error that is raised."""
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
