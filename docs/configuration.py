"""Rewrite the tables of configuration.md from the descriptions of the configuration's own keys.

Run ``python docs/configuration.py`` (``make docs`` runs it). A table is between ``<!-- keys: SECTION -->`` and
``<!-- end -->``, the tables of all methods between ``<!-- methods -->`` and ``<!-- end of methods -->``; the rest of
the page is written by hand.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from ptd.commands.init import SECTIONS, with_choices
from ptd.config import RunConfig
from ptd.methods import method, methods

PAGE = Path(__file__).with_name("configuration.md")
TABLE = re.compile(r"(<!-- keys: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
METHODS = re.compile(r"(<!-- methods -->\n).*?(<!-- end of methods -->)", re.DOTALL)
DEFAULT = re.compile(r"; default: (.+)$")


def rewritten(page: str, names: Iterable[str] | None = None) -> str:
    """Return ``page`` with current tables, with those of the methods ``names``; None: of all methods.

    Raise `KeyError` or `UserError` for a section or a method that does not exist.
    """
    page = TABLE.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", page)
    parts = "".join(method_part(name) for name in (methods() if names is None else names))
    return METHODS.sub(lambda found: f"{found[1]}\n{parts}{found[2]}", page)


def method_part(name: str) -> str:
    """Return the heading of a method and the table of its keys."""
    keys = table(f"method {name}") if dataclasses.fields(method(name).config) else "This method has no keys.\n"
    return f"### {name}\n\n{keys}\n"


def methods_of(page: str) -> list[str]:
    """Return the names of the methods whose tables are in the page."""
    found = METHODS.search(page)
    return re.findall(r"^### (\w+)$", found[0] if found else "", flags=re.MULTILINE)


def table(section: str) -> str:
    """Return the table of a section (``backbone``), a method (``method prefix``) or the top-level keys (``-``)."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for key, required, default, said in _keys(section):
        named = DEFAULT.search(said) if default is None else None
        shown = named[1] if named else "required" if required else _shown(default)
        lines.append(f"| `{key}` | {shown} | {said[: named.start()] if named else said} |")
    return "\n".join(lines) + "\n"


def _keys(section: str) -> Iterator[tuple[str, bool, Any, str]]:
    """Yield each key, whether it is required, its default, and its description."""
    if section.startswith("method "):
        config = method(section.removeprefix("method ")).config
        hints, defaults = get_type_hints(config), config()
        for field in dataclasses.fields(config):
            said = with_choices(field.metadata["description"], hints[field.name])
            yield f"method.{field.name}", False, getattr(defaults, field.name), said
        return
    model, prefix = (RunConfig, "") if section == "-" else (SECTIONS[section], f"{section}.")
    for key, found in model.model_fields.items():
        if found.description is not None:
            default = None if found.is_required() else found.get_default(call_default_factory=True)
            yield f"{prefix}{key}", found.is_required(), default, with_choices(found.description, found.annotation)


def _shown(value: Any) -> str:
    if value is None or value == {}:
        return "–"
    plain = str(value) if isinstance(value, Path) else value
    return f"`{yaml.safe_dump(plain, default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
