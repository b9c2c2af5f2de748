"""Whatever a run file, a data file or an adapter folder contains, it works or is refused with a `UserError`.

The default budget is small and the examples are the same every time; ``PTD_FUZZ=1`` draws new ones for minutes.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import itertools
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from families import tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptd.checkpoint import Adapter, load_adapter, save_adapter
from ptd.checkpoint.adapter import CONFIG, EXTRA, HEAD, WEIGHTS
from ptd.config import TaskConfig, data_config, load_config, parse_settings
from ptd.config.deepspeed import apply_deepspeed, check_batch_size
from ptd.data import load_rows
from ptd.methods import TaskFacts, method
from ptd.runs.folder import open_run
from ptd.runs.tuned import backbone_of, sections_of
from ptd.shipped import RECIPES
from ptd.tasks import make_task
from ptd.types import BackboneShape, EmptyLayout, LayerShape, PrefixLayout, SoftLayout, UserError

LONG = bool(os.environ.get("PTD_FUZZ"))
pytestmark = pytest.mark.timeout(7200 if LONG else 300)
ODD_NUMBERS: list[Any] = [
    *(True, -1, 0, 1, 2**31, 2**63, -(2**64), 10**30, 10**4000, 1e-320, 1e308, -0.0, math.inf, -math.inf, math.nan)
]
ODD_TEXTS = [
    *(
        "",
        " ",
        "\0",
        "a\0b",
        "null",
        "1e5",
        "--1e5",
        "²e3",
        "1e",
        "0x1f",
        "é",
        "日本",
        "🙂",
        "\u202e",
        "\ufeff",
        "\ud7ff",
    ),
    *("..", "/", "/dev/null", "~", "~nobody/x", "a" * 5000, "{", "}", "{}", "{0}", "{v}", "{v:0}", "{v:3}", "{mask}"),
    *("{text} {v:2} {mask}", "{v:99999999}", "{a.b}", "{a[0]}", "{{", "%s", "$(id)", "; rm", "none", "prefix", "world"),
]


def budget(examples: int) -> Any:
    """Return the settings of a fuzz test: ``examples`` in the default budget, twenty times as many in the long one."""
    return settings(
        max_examples=examples * (20 if LONG else 1),
        derandomize=not LONG,
        database=None,
        deadline=30_000,
        suppress_health_check=list(HealthCheck),
    )


def nested(depth: int, inner: Any) -> Any:
    for level in range(depth):
        inner = [inner] if level % 2 else {"a": inner}
    return inner


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(ODD_NUMBERS),
    st.sampled_from(ODD_TEXTS),
    st.text(max_size=20),
)
VALUES = st.one_of(
    SCALARS,
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    st.builds(nested, st.sampled_from([3, 60, 400]), SCALARS),
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key) in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places(inner)


@st.composite
def mutated(draw: st.DrawFn, origins: list[Any], most: int = 3) -> Any:
    """Draw one of the origins, with values dropped, renamed, repeated elsewhere, or replaced by something else."""
    value = copy.deepcopy(draw(st.sampled_from(origins)))
    for _ in range(draw(st.integers(1, most))):
        spots = list(places(value))
        if not spots:
            return draw(VALUES)
        container, key = draw(st.sampled_from(spots))
        kind = draw(st.sampled_from(["drop", "rename", "replace", "replace", "replace", "move", "wrap"]))
        if kind == "drop":
            del container[key]
        elif kind == "rename" and isinstance(container, dict):
            container[draw(st.text(max_size=8) | st.sampled_from(["name", "kind", "x", "0"]))] = container.pop(key)
        elif kind == "move":
            other, name = draw(st.sampled_from(spots))
            if isinstance(other, dict) or name < len(other):
                other[name] = copy.deepcopy(container[key])
        else:
            container[key] = draw(VALUES) if kind == "replace" else [container[key]]
    return value


@contextlib.contextmanager
def only_user_errors() -> Iterator[None]:
    with contextlib.suppress(UserError), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an option without effect causes a warning
        yield


# --- run files -----------------------------------------------------------------------------------------------------

RUNS = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(RECIPES.glob("*.yaml"))]
JSONS = [
    json.loads(path.read_text(encoding="utf-8")) for path in sorted((RECIPES.parents[1] / "ds_configs").glob("*.json"))
]
RUNS += [{**RUNS[0], "deepspeed": document} for document in JSONS]
BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{one}: &{one} [{','.join([f'*{other}'] * 9)}]\n" for other, one in itertools.pairwise("abcdefghijk")
)
ODD_YAML = [
    b"",
    b"\xff\xfe\x00",
    b"\xef\xbb\xbfbackbone: {path: x}",
    b"- 1",
    b"&a {backbone: *a}",
    b"backbone: &a {path: *a}",
    b"backbone: &a [*a]\nmethod: *a\ndata: *a",
    BOMB.encode(),
    (BOMB + "backbone: *k\nmethod: {name: *k}\ndata: {train: *k}").encode(),
    b"backbone: {path: x, dtype: " + b"[" * 200 + b"]" * 200 + b"}",
    b"[" * 20000,
    b"{a: " * 3000,
    b"!!python/object/apply:os.system [id]",
    b"backbone: !!binary aGk=\nmethod: !!set {a, b}\ndata: 2026-99-99",
    b"backbone: {path: x, int8_threshold: 0x" + b"f" * 6000 + b"}\nmethod: {name: prefix}\ndata: {train: x}",
    b"method: {name: prefix, num_virtual_tokens: 1:1:1}\n1: 2\n? [a]\n: b",
    b"<<: {a: 1}\n<<: 3",
    b"%YAML 9.9\n---\na: 1\n---\nb: 2",
    b"a: \x00",
    b"=: =\n!!null : 1\n1.5: x\nnull: y\n2026-01-01: z",
]


def read_run(path: Path, content: bytes, overrides: list[str]) -> None:
    """Process a run file as far as ptd does before it reads the backbone."""
    path.write_bytes(content)
    with only_user_errors():
        config = load_config(path, overrides)
        config, _ = apply_deepspeed(config)
        check_batch_size(config, 2)
        with contextlib.suppress(UserError):
            open_run(config, overwrite=False)
        json.dumps(config.to_dict())
        for architecture in ("decoder", "encoder", "encoder-decoder"):
            with contextlib.suppress(UserError):
                task = make_task(config.task, config.data, architecture)
                facts = TaskFacts(config.task.kind, task.labels, task.cloze, task.output == "body", task.virtual_tokens)
                method(config.method_name).check(config.method_config(), facts)


@pytest.mark.parametrize("number", range(len(ODD_YAML)))
def test_run_files_that_are_odd(tmp_path: Path, number: int) -> None:
    read_run(tmp_path / "run.yaml", ODD_YAML[number], [])


@budget(60)
@given(content=st.binary(max_size=200) | st.text(alphabet="abk :{}[]&*!-\n\t#'\"|>%@`0e.", max_size=60).map(str.encode))
def test_run_files_of_anything(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    read_run(tmp_path_factory.getbasetemp() / "anything.yaml", content, [])


@budget(250)
@given(
    run=mutated(RUNS, most=4),
    overrides=st.lists(
        st.builds(
            "{}={}".format,
            st.sampled_from(["train.max_steps", "backbone.dtype", "method", "data.columns.prompt", "..", "a", "task"]),
            st.sampled_from(ODD_TEXTS) | st.text(max_size=10),
        )
        | st.text(max_size=10),
        max_size=1,
    ),
)
def test_run_files_that_were_changed(tmp_path_factory: pytest.TempPathFactory, run: Any, overrides: list[str]) -> None:
    try:
        content = yaml.safe_dump(run, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, RecursionError, ValueError):  # an int of more than 4300 digits cannot be written
        content = repr(run)[:200].encode("utf-8", "surrogatepass") if not isinstance(run, dict) else b"{}"
    read_run(tmp_path_factory.getbasetemp() / "changed.yaml", content, overrides)


SETTABLE = ["backbone.dtype", "data.columns", "data.columns.a.b", "data.max_length", "backbone", "x.y", "data.format"]


@budget(60)
@given(
    pairs=st.lists(
        st.builds("{}={}".format, st.sampled_from(SETTABLE), st.sampled_from(ODD_TEXTS)) | st.text(max_size=9)
    )
)
def test_settings_on_the_command_line(pairs: list[str]) -> None:
    with only_user_errors():
        data_config(parse_settings(pairs).get("data", {}))


# --- data files ----------------------------------------------------------------------------------------------------

TOKENIZER = tiny_tokenizer()
TOKENIZER.chat_template = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
LONGEST = 64
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "prompts": ("decoder", {}, {}),
    "template": ("decoder", {}, {"prompt_template": "{prompt} {v:2} {n}:"}),
    "messages": ("decoder", {}, {"format": "messages"}),
    "text": ("decoder", {}, {"format": "text"}),
    "seq2seq": ("encoder-decoder", {"kind": "seq2seq_lm"}, {}),
    "labels": ("encoder", {"kind": "classification", "class_weights": "balanced"}, {}),
    "cloze": (
        "encoder",
        {"kind": "classification", "patterns": ["{text} is {mask}"], "verbalizer": {"a": ["ya"], "b": ["no"]}},
        {},
    ),
    "tags": ("encoder", {"kind": "token_classification"}, {}),
    "answers": ("encoder", {"kind": "question_answering", "doc_stride": 4}, {}),
}
ROWS: list[list[Any]] = [
    [
        {
            "prompt": f"p{number}", "completion": "c", "n": number, "text": "one two", "pair": "three",
            "label": "ab"[number % 2],
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
            "tokens": ["one", "two"], "tags": ["O", "B-x"],
            "question": "who?", "context": "it was him " * 30 * number,
            "answers": {"text": ["him"], "answer_start": [7]},
        }
        for number in range(1, 4)
    ]
]  # fmt: skip


@st.composite
def rows_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """Draw suffix and content of a data file: rows with odd values in one of the formats, possibly damaged bytes."""
    rows = draw(mutated(ROWS))
    suffix = draw(st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]))
    content = {".jsonl": as_lines, ".json": as_json, ".csv": as_csv, ".parquet": as_parquet}[suffix](rows)
    kind = draw(st.sampled_from(["whole", "whole", "cut", "byte", "insert", "random", "encoding"]))
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    if kind == "cut":
        content = content[:place]
    elif kind == "byte":
        content = content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
    elif kind == "insert":
        odd = [b"\0", b"\n", b"\r", b'"', b",", b"\\", b"\xff", b"\xed\xa0\x80", b"[" * 5000, b"9" * 5000, b"\\ud800"]
        content = content[:place] + draw(st.sampled_from(odd)) + content[place:]
    elif kind == "random":
        content = draw(st.binary(max_size=60))
    elif kind == "encoding":
        text = content.decode("utf-8", "replace")
        content = text.encode(draw(st.sampled_from(["utf-16", "utf-32", "latin-1", "utf-7"])), "replace")
    return suffix, content


def plain(value: Any) -> str:
    try:
        return json.dumps(value)
    except (ValueError, RecursionError):  # an int of more than 4300 digits
        return "0"


def as_lines(rows: Any) -> bytes:
    return "".join(plain(row) + "\n" for row in (rows if isinstance(rows, list) else [rows])).encode()


def as_json(rows: Any) -> bytes:
    return plain(rows).encode()


def as_csv(rows: Any) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file)
    table = [row for row in (rows if isinstance(rows, list) else []) if isinstance(row, dict)]
    writer.writerow(table[0] if table else [])
    for row in table:
        writer.writerow([value if isinstance(value, str) else plain(value) for value in row.values()])
    return file.getvalue().encode("utf-8", "replace")


def as_parquet(rows: Any) -> bytes:
    sink = io.BytesIO()
    try:
        table = pa.Table.from_pylist([row for row in rows if isinstance(row, dict)])
        pyarrow.parquet.write_table(table, sink)
    except Exception:  # columns of mixed types are written as text
        table = pa.table({"prompt": [plain(row) for row in rows] if isinstance(rows, list) else ["x"]})
        pyarrow.parquet.write_table(table, sink := io.BytesIO())
    return sink.getvalue()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Let ``datasets`` cache in a folder of the tests; return the folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


counter = itertools.count()


def read_data(folder: Path, suffix: str, content: bytes, kinds: Any) -> None:
    """Read the rows and tokenize them for tasks of these kinds."""
    path = folder / f"rows{next(counter)}{suffix}"
    path.write_bytes(content)
    try:
        with only_user_errors():
            rows = load_rows(str(path), "train", what="data.train")
            for kind in kinds:
                architecture, task_section, data_section = KINDS[kind]
                with contextlib.suppress(UserError):
                    task = make_task(
                        TaskConfig(**task_section), data_config({"max_length": LONGEST, **data_section}), architecture
                    )
                    examples = task.fit(rows, "rows").tokenize(rows, TOKENIZER, what="rows")
                    assert len(examples) >= len(rows)
                    assert (examples.lengths() > 0).all()
    finally:
        path.unlink()


@budget(150)
@given(file=rows_files(), kind=st.sampled_from(sorted(KINDS)))
def test_data_files(cache: Path, file: tuple[str, bytes], kind: str) -> None:
    read_data(cache, *file, [kind])


ODD_DATA = {
    ".jsonl": [b"\0" * 50, b"{}", b"{}\n{}", b"[1]\n", b'{"a": NaN}', b'{"prompt": "' + b"x" * 10**6 + b'"}',
               b'{"prompt": ' + b"[" * 100000, b'{"prompt": ' + b"9" * 5000 + b"}",
               b'{"prompt": "\\ud800", "completion": "x"}',
               b'{"": 1}', b'{"prompt": "a", "prompt": 1}', b'{"text": "a", "label": 1e999}',
               b'{"text": "\\ud83d", "label": 0}\n{"text": "b", "label": 1}',
               b'{"tokens": ["\\ud83d"], "tags": [0]}\n{"tokens": [""], "tags": [1]}',
               b'{"question": "\\udfff", "context": "c\\ud800", "answers": [{"text": "c", "answer_start": 1e400}]}',
               b'{"question": "q", "context": "c", "answers": [{"text": "c", "answer_start": -1}]}',
               b'{"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": [false]}}',
               b'{"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": 0}}',
               b'{"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": ["0"]}}',
               b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}'],
    ".json": [b"[]", b"[[]]", b"{}", b"null", b"[" * 100000, b"[{}, 1]", b'["\\ud800"]', b"9" * 5000],
    ".csv": [b"", b"\n", b"a", b"a,a\n1,2", b'"', b"\0,\0\n1,2", b"prompt,completion\n\"" + b"x" * 10**6, b",\n,",
             b"a,b\n1", b"text,label\n\0,1\nx,2"],
    ".parquet": [b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1", b"PAR1\xff\xff\xff\x7fPAR1"],
}  # fmt: skip


@pytest.mark.parametrize("suffix", ODD_DATA)
def test_data_files_that_are_odd(cache: Path, suffix: str) -> None:
    for content in ODD_DATA[suffix]:
        read_data(cache, suffix, content, KINDS)


# --- adapters ------------------------------------------------------------------------------------------------------

LAYERS = (LayerShape(2, 4, 4), LayerShape(2, 4, 4))
SHAPE = BackboneShape("llama", 16, 100, 64, LAYERS)
FACTS = {
    "fingerprint": "0123456789ab-0123456789ab",
    "backbone_config": {"path": "x", "dtype": "float32", "quantization": "none", "trust_remote_code": False},
    "method": {"name": "prefix", "num_virtual_tokens": 3},
    "task": {"kind": "causal_lm"},
    "data": {"max_length": 32, "columns": {}},
    "versions": {"ptd": "0"},
}
ADAPTERS: dict[str, Callable[[], Adapter]] = {
    "prefix": lambda: Adapter(
        torch.ones(3, 32), PrefixLayout(LAYERS), "x", None, "CAUSAL_LM", "PREFIX_TUNING", {}, FACTS
    ),
    "soft": lambda: Adapter(torch.ones(3, 16), SoftLayout(16), "x", None, "CAUSAL_LM", "PROMPT_TUNING", {}, FACTS),
    "head": lambda: Adapter(
        torch.empty(0, 0), EmptyLayout(), "x", head={"w": torch.ones(2, 16)},
        facts={**FACTS, "method": {"name": "head"}, "task": {"kind": "classification", "labels": ["a", "b"]}},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for name, make in ADAPTERS.items():
        save_adapter(folder / name, make())
    for name in ("prefix", "soft"):
        save_adapter(folder / f"peft-{name}", ADAPTERS[name](), peft_only=True)
    return {path.name: path for path in sorted(folder.iterdir())}


def use_adapter(folder: Path) -> None:
    """Process an adapter as far as ptd does before it loads the backbone, and check whether it fits a backbone."""
    with only_user_errors():
        adapter = load_adapter(folder)
        assert torch.isfinite(adapter.flat).all()
        adapter.check_fits(SHAPE, "0123456789ab", path="x")
        list(adapter.state().tensors())
        assert not backbone_of(adapter, None).trust_remote_code
        task, data, _ = sections_of(adapter, {})
        if task is not None:
            make_task(task, data, "decoder")


def changed_copy(source: Path, name: str, content: bytes) -> Path:
    target = source.parent.with_name(f"changed-{source.name}")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    (target / name).write_bytes(content)
    return target


@budget(200)
@given(data=st.data(), name=st.sampled_from(["prefix", "soft", "head", "peft-prefix", "peft-soft"]))
def test_descriptions_of_adapters(adapters: dict[str, Path], data: st.DataObject, name: str) -> None:
    file = CONFIG if name.startswith("peft") else EXTRA
    origin = json.loads((adapters[name] / file).read_text(encoding="utf-8"))
    changed = data.draw(mutated([origin]))
    if data.draw(st.booleans()):
        changed = origin | changed if isinstance(changed, dict) else changed
    use_adapter(changed_copy(adapters[name], file, plain(changed).encode()))


@budget(120)
@given(data=st.data(), name=st.sampled_from(["prefix", "soft", "head", "peft-prefix"]))
def test_tensors_of_adapters(adapters: dict[str, Path], data: st.DataObject, name: str) -> None:
    file = HEAD if name == "head" else WEIGHTS
    content = bytearray((adapters[name] / file).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["cut", "flip", "size", "header", "random", "longer"]))
    if kind == "cut":
        del content[place:]
    elif kind == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "size":  # the size of the header, which a reader might allocate
        content[:8] = data.draw(st.sampled_from([0, 1, 7, 2**20, 2**27, 2**40, 2**63, 2**64 - 1])).to_bytes(8, "little")
    elif kind == "header":
        size = int.from_bytes(content[:8], "little")
        header = data.draw(mutated([json.loads(content[8 : 8 + size])]))
        written = plain(header).encode()
        content = bytearray(len(written).to_bytes(8, "little") + written + content[8 + size :])
    elif kind == "random":
        content = bytearray(data.draw(st.binary(max_size=80)))
    else:
        content += b"\0" * 100
    use_adapter(changed_copy(adapters[name], file, bytes(content)))


@pytest.mark.parametrize("content", [b"", b"[" * 100000, b"\xff", b"[]", b"null", b'{"prompt": ' * 2000, b"9" * 5000])
def test_descriptions_that_are_odd(adapters: dict[str, Path], content: bytes) -> None:
    for name, file in (("prefix", EXTRA), ("peft-soft", CONFIG)):
        use_adapter(changed_copy(adapters[name], file, content))
