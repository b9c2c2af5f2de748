"""docs/troubleshooting.md quotes only messages that the code still contains."""

from __future__ import annotations

import ast
import re
import warnings
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
MESSAGES = re.findall(
    r"^\| `([^`]+)` \| .+ \| .+ \|$", PAGE.read_text(encoding="utf-8").split("## When it runs")[0], re.M
)


def text_of(node: ast.expr) -> str | None:
    """Return a string as the code writes it, with ``…`` for inserted values; None for any other expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(value.value if isinstance(value, ast.Constant) else "…" for value in node.values)
    return None


@cache
def texts() -> list[str]:
    """Return all strings in ptd's code except docstrings."""
    found = []
    for path in sorted((ROOT / "ptd").rglob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        strings = (text_of(node) for node in ast.walk(tree) if isinstance(node, ast.expr) and id(node) not in prose)
        found += [text for text in strings if text]
    return found


def test_the_page_quotes_messages() -> None:
    assert len(MESSAGES) >= 25
    assert len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_still_said(message: str) -> None:
    said = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
    assert max(map(len, message.split("…"))) > 12, "too little of it is quoted to tell it from others"
    assert any(said.fullmatch(text) for text in texts())


def test_a_message_that_nobody_says_is_found_out() -> None:
    said = re.compile(re.escape("backbone.path: there is no such folder at all"))
    assert not any(said.search(text) for text in texts())
