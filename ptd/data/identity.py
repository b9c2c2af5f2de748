"""Compute the digest of everything that determines tokenised rows: rows, tokenizer, settings, code and versions.

`ptd.data.cache` stores tokenised rows under this digest, so whatever can change a token, a label or the report has to
change the digest. A change that has no effect on the result (another unused column, for example) may change it too.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import tempfile
from collections.abc import Iterable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ptd.config import DataConfig
from ptd.data.cache import CacheError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PACKAGES = ("datasets", "jinja2", "numpy", "sentencepiece", "tiktoken", "tokenizers", "transformers")
"""Packages that read rows, render conversations or tokenise."""
CODE = ("data/*.py", "tasks/*.py", "config/schema.py", "types.py", "values.py")
"""The files of ptd that determine tokens, labels and reports."""
NOT_READ = ("train", "eval", "train_split", "eval_split", "packing", "max_tokens", "cache", "cache_gb")
"""Keys of the section ``data`` that have no effect on how given rows are tokenised."""
_ROWS_AT_ONCE = 10_000


def key_of(
    rows: str, tokenizer: PreTrainedTokenizerBase | None, settings: dict[str, Any], data: DataConfig, kind: type
) -> str:
    """Return the digest, 32 hexadecimal digits.

    ``rows``: their `rows_digest`. ``tokenizer``: None for what a task learns from the rows, which no tokenizer affects.
    ``settings``: what a task knows besides the section ``data``, as plain values; ``kind``: the class of the task.
    Raises `CacheError` for a tokenizer that cannot be saved.
    """
    parts: dict[str, Any] = {
        "rows": rows,
        "tokenizer": None if tokenizer is None else tokenizer_digest(tokenizer),
        "task": [kind.__qualname__, settings],
        "data": {key: value for key, value in data.model_dump(mode="json").items() if key not in NOT_READ},
        "code": code_digest([kind] if tokenizer is None else [kind, type(tokenizer)]),
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version_tuple()[:2],
    }
    if tokenizer is not None and "strftime_now" in json.dumps(tokenizer.chat_template):
        parts["date"] = date.today().isoformat()  # the chat template may write the current date
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def rows_digest(rows: Dataset) -> str:
    """Return the SHA-256 of the names, types and values of all columns, wherever the rows are stored."""
    found = hashlib.sha256(json.dumps(rows.features.to_dict(), default=str).encode())
    for table in rows.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        # The schema's metadata may name a file; chunks and slices depend on how the rows were stored.
        plain = table.replace_schema_metadata(None).combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, plain.schema) as stream:
            stream.write_table(plain)
        found.update(sink.getvalue())
    return found.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of the files that the tokenizer saves (vocabulary, chat template, …) and of its settings.

    Raises `CacheError` if the tokenizer cannot be saved.
    """
    said = [
        type(tokenizer).__qualname__,
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        sorted(tokenizer.all_special_ids),
        sorted((index, repr(token)) for index, token in tokenizer.added_tokens_decoder.items()),
        list(tokenizer.model_input_names),
        [tokenizer.truncation_side, tokenizer.is_fast, tokenizer.chat_template],
    ]
    found = hashlib.sha256(json.dumps(said).encode())
    try:
        with tempfile.TemporaryDirectory(prefix="ptd-tokenizer-") as folder:
            if tokenizer.is_fast:
                # tokenizer.json has the truncation and padding of the last call; every call sets both again.
                tokenizer.backend_tokenizer.no_truncation()
                tokenizer.backend_tokenizer.no_padding()
            tokenizer.save_pretrained(folder)
            for path in _files(Path(folder)):
                _add(found, path.relative_to(folder).as_posix(), path.read_bytes())
    except Exception as error:  # a tokenizer may bring code of its own, and the folder for temporary files may be full
        raise CacheError(f"the tokenizer cannot be saved to compute its digest: {error}") from error
    return found.hexdigest()


def code_digest(classes: Iterable[type]) -> str:
    """Return the SHA-256 of ptd's code that tokenises, and of the files that define ``classes``."""
    root = Path(__file__).parents[1]
    found = hashlib.sha256()
    own = sorted(path for pattern in CODE for path in root.glob(pattern))
    others = [Path(file) for each in classes if (file := _source(each)) is not None]
    for path in (*own, *others):
        _add(found, path.name, path.read_bytes())
    return found.hexdigest()


def _source(kind: type) -> str | None:
    try:
        return inspect.getsourcefile(kind)
    except (TypeError, OSError):  # defined in a program without a file
        return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _add(found: Any, name: str, content: bytes) -> None:
    """Add a file to a digest; the lengths keep one file's end apart from the next one's beginning."""
    found.update(json.dumps([name, len(content)]).encode())
    found.update(content)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
