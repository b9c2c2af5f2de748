"""The only reader of texts and the only reader of paths: line ends, refusals, ``~``, and where files can be written."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from ptd.cli import COMMANDS, launch
from ptd.cli.common import at_home
from ptd.commands.generate import read_prompts
from ptd.config import load_config, parse_config
from ptd.config.deepspeed import apply_deepspeed
from ptd.files import as_path, check_target, check_writable, decode_text, lines_of, read_text, write_text
from ptd.launch.deepspeed import read_hostfile
from ptd.methods.settings import initial_text
from ptd.types import UserError

NO_LINE_ENDS = "a\u2028b\u2029c\x0bd\x0ce\x1cf\x1dg\x1eh\x85i"
"""Text with the characters that `str.splitlines` treats as line ends in addition to the three real ones."""


def refusal(call: Any, *args: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


def test_lines_end_in_three_ways_only() -> None:
    assert lines_of(f"{NO_LINE_ENDS}\r\nb\rc\nd") == [NO_LINE_ENDS, "b", "c", "d"]
    assert lines_of("a\n\nb\n") == ["a", "", "b"]
    assert lines_of("") == []
    assert len(NO_LINE_ENDS.splitlines()) == 9


def test_file_and_stdin_give_the_same_prompts(tmp_path: Path) -> None:
    content = f"\ufeffone \r\n\r\n{NO_LINE_ENDS}\rthree\n \n".encode()
    (tmp_path / "prompts.txt").write_bytes(content)
    expected = ["one ", NO_LINE_ENDS, "three"]
    assert read_prompts(tmp_path / "prompts.txt") == expected
    assert read_prompts(io.BytesIO(content), "stdin") == expected


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    if (child := os.fork()) == 0:
        with pipe.open("wb") as file:
            file.write(b"\xef\xbb\xbfa\nb\n")
        os._exit(0)
    assert read_prompts(pipe) == ["a", "b"]
    os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a\nb".encode("utf-16"), "but UTF-16"),
        ("a\nb".encode("utf-32"), "but UTF-32"),
        ("a\nb".encode("utf-16-be"), "it has null bytes"),
        ("grün".encode("latin-1"), "can't decode byte 0xfc in position 2"),
    ],
)
def test_other_encodings_are_named(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "given"
    file.write_bytes(content)
    for read in (read_prompts, read_hostfile, load_config, lambda path: initial_text(InitText(path))):
        said = refusal(read, file)
        assert str(file) in said
        assert f"it is not UTF-8 text ({reason if 'decode' not in reason else ''}" in said
        assert reason in said
    said = refusal(decode_text, content, "cannot read stdin")
    assert said.startswith("cannot read stdin: it is not UTF-8 text")
    assert reason in said


class InitText:
    """The settings of a method that starts from a file."""

    init, init_text = "text", None

    def __init__(self, file: Path) -> None:
        self.init_text_file = file


def test_every_reader_strips_the_mark_and_knows_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, text in {
        "run.yaml": "backbone: {path: m}\r\nmethod: {name: prefix}\r\ndata: {train: t.jsonl}\r\ndeepspeed: ~/ds.json",
        "ds.json": '{"zero_optimization": {"stage": 0}}',
        "text.txt": "one\r\ntwo",
        "hosts": "node1 slots=2\r\nnode2 slots=2",
    }.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    config = load_config("~/run.yaml")
    assert config.deepspeed == str(tmp_path / "ds.json")
    apply_deepspeed(config)
    assert initial_text(InitText(Path("~/text.txt"))) == "one\ntwo"
    assert [host.name for host in read_hostfile(Path("~/hosts"))] == ["node1", "node2"]
    assert read_text("~/text.txt", "cannot read") == "one\ntwo"


def test_every_path_of_a_run_file_knows_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse_config(
        {
            "backbone": {"path": "~/m", "offload": "nvme", "sharding": "node", "offload_folder": "~/nvme"},
            "method": {"name": "prompt", "init": "text", "init_text_file": "~/t"},
            "data": {"train": "~/a.jsonl", "eval": "~/b"},
            "deepspeed": "~/ds.json",
            "output_dir": "~/out",
        }
    )
    given = [
        *(config.backbone.path, config.backbone.offload_folder, config.data.train, config.data.eval),
        *(config.deepspeed, config.output_dir, config.method_config().init_text_file),
    ]
    names = ["m", "nvme", "a.jsonl", "b", "ds.json", "out", "t"]
    assert [str(path) for path in given] == [str(tmp_path / name) for name in names]
    # A name on the Hub and a relative path stay as they are.
    plain = parse_config({"backbone": {"path": "gpt2"}, "method": {"name": "prefix"}, "data": {"train": "a~b/c"}})
    assert (plain.backbone.path, plain.data.train) == ("gpt2", "a~b/c")


def test_a_home_that_is_not_there_is_named() -> None:
    assert "no-such-user" in refusal(as_path, "~no-such-user/x")
    raw = {"backbone": {"path": "m"}, "method": {"name": "prefix"}, "data": {}, "output_dir": "~no-such-user/x"}
    assert "output_dir: ~no-such-user/x: there is no such home folder" in refusal(parse_config, raw)


def paths_of(command: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the typer declaration of each option and argument of a command that is a path."""
    for name, hint in get_type_hints(command, include_extras=True).items():
        kind, *told = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if "Path" in str(kind):
            yield f"{command.__name__} {name}", told[0]


def test_every_path_of_the_command_line_knows_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert at_home(Path("~/a")) == tmp_path / "a"
    assert at_home([Path("~/a"), Path("b")]) == [tmp_path / "a", Path("b")]
    commands = [*COMMANDS.values(), *(each.callback for each in launch.app.registered_commands)]
    found = {name: told for command in commands for name, told in paths_of(command)}
    assert len(found) >= 20
    assert [name for name, told in found.items() if told.callback is not at_home] == []


def test_where_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert check_target(tmp_path / "new" / "deep" / "o.jsonl", "--output") == tmp_path / "new" / "deep" / "o.jsonl"
    assert not (tmp_path / "new").exists()
    assert f"--output: {tmp_path / 'file'} is a file" in refusal(check_target, tmp_path / "file" / "o", "--output")
    assert f"--output: {tmp_path} is a folder; give a file" in refusal(check_target, tmp_path, "--output")
    assert "cannot write to /proc" in refusal(check_target, "/proc/none/o", "--output")
    assert "contains a null character" in refusal(check_writable, "a\0b", "output_dir")
    write_text(tmp_path / "new" / "o.jsonl", "é\n", "--output")
    assert (tmp_path / "new" / "o.jsonl").read_bytes() == "é\n".encode()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["o.jsonl"]
    assert "--output: cannot write /dev/full (No space left on device)" in refusal(
        write_text, "/dev/full", "a", "--output"
    )
