"""Find the fenced blocks of Markdown pages, the marks of blocks that are not run, and their ``ptd`` commands.

A mark is a comment before the block, which the rendered page does not show::

    <!-- not run: needs a GPU -->              the block is not run
    <!-- not run (pip, make): no network -->   its commands that begin with these words are not run
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^ *```(\S*)(?: .*)?$")
MARK = re.compile(r"<!-- not run(?: \(([^)]+)\))?: (.+?) -->", re.DOTALL)
INLINE = re.compile(r"(?<!`)`(ptd [^`]+)`(?!`)", re.DOTALL)
STARTED = re.compile(r"^(?:\w+=\S* )*(?:ptd|(?:python|deepspeed|torchrun)\b.*? (?:-m|--module) ptd\.cli) ")


@dataclass(frozen=True)
class Block:
    """A fenced block; ``text`` begins in line ``line`` of ``page``, counted from 1.

    ``reason`` is the reason in the block's mark; it applies to the commands that begin with a word of ``without`` or,
    if ``without`` is empty, to the whole block.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str | None
    without: tuple[str, ...]

    @property
    def runs(self) -> bool:
        """Whether any part of the block is run."""
        return self.reason is None or bool(self.without)

    def commands(self) -> Iterator[tuple[int, str, bool]]:
        """Yield line, text and whether it is run, for each command of a shell block (continued lines are one)."""
        begun: list[str] = []
        for number, line in enumerate(self.text.splitlines(), self.line):
            begun.append(line)
            if not line.endswith("\\"):
                command = "\n".join(begun)
                runs = self.runs and not command.startswith(self.without)
                yield number - len(begun) + 1, command, runs
                begun = []


def blocks_of(page: Path) -> list[Block]:
    """Return all fenced blocks of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found, before, begun = [], "", None
    for number, line in enumerate(lines):
        fence = FENCE.match(line)
        if begun is None and fence:
            begun, language = number + 1, fence[1]
        elif begun is not None and line.strip() == "```":
            mark = MARK.search(before)
            found.append(
                Block(
                    page,
                    begun + 1,
                    language,
                    "\n".join(lines[begun:number]) + "\n",
                    mark[2] if mark else None,
                    tuple(name.strip() for name in (mark[1] or "").split(",") if name.strip()) if mark else (),
                )
            )
            begun, before = None, ""
        elif begun is None:
            # The text directly before the fence: a mark may take several lines.
            before = before + line + "\n" if line.strip() else ("" if not before.endswith("-->\n") else before)
    assert begun is None, f"{page}:{begun}: a block without an end"
    return found


def ptd_arguments(command: str) -> list[str] | None:
    """Return the arguments of ``ptd`` in a line of a shell block; None if the line starts another program."""
    started = STARTED.match(command.replace("\\\n", " "))
    if started is None:
        return None
    words = shlex.split(command.replace("\\\n", " ")[started.end() :], comments=True)
    ends = [index for index, word in enumerate(words) if word in ("|", ">", "&&", "||", ";")]
    return words[: ends[0]] if ends else words


def inline_commands(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of each ``ptd …`` command in running text."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for found in INLINE.findall(text):
        yield re.sub(r"\s+", " ", found).split()[1:]
