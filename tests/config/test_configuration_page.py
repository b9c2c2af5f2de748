"""docs/configuration.md describes every key exactly as the configuration does, and nothing else."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from ptd.commands.init import SECTIONS, in_plain_words
from ptd.methods import methods

DOCS = Path(__file__).parents[2] / "docs"
script = SimpleNamespace(**runpy.run_path(str(DOCS / "configuration.py")))


def test_the_tables_are_current() -> None:
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    shown = script.methods_of(page)
    assert {"head", "hard_prompt", "prompt", "p_tuning", "prefix", "p_tuning_v2"} <= set(shown)
    assert page == script.rewritten(page, shown), "run: python docs/configuration.py"


def test_every_section_has_its_table() -> None:
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- keys: (.+?) -->", page)) == {*SECTIONS, "-"}


def test_a_new_method_gets_its_table() -> None:
    page = "before\n<!-- methods -->\n<!-- end of methods -->\nafter\n"
    found = script.rewritten(page)
    assert script.methods_of(found) == list(methods())
    assert "| `method.num_virtual_tokens` | `16` | P, the number of virtual tokens in the prompt |" in found
    assert script.rewritten(found) == found


def test_a_line_that_was_changed_by_hand_is_put_right() -> None:
    page = "before\n<!-- keys: train -->\n| mine |\n<!-- end -->\nafter\n"
    found = script.rewritten(page)
    assert "| `train.warmup_ratio` | `0.0` | length of the warm-up as a share of all steps |" in found
    assert "mine" not in found
    assert found.startswith("before\n")
    assert found.endswith("<!-- end -->\nafter\n")
    assert script.rewritten(found) == found


@pytest.mark.parametrize(
    ("said", "plain"),
    [
        ("`auto` or `cls`", "auto or cls"),
        ("kept ([reports](reports.md#samples))", "kept"),
        ("a path ([what holds](x.md)); default: none", "a path; default: none"),
        ("see [tasks](tasks.md) for more", "see tasks for more"),
    ],
)
def test_comments_of_a_run_file_are_without_markup(said: str, plain: str) -> None:
    assert in_plain_words(said) == plain
