"""Define the colours and style of the pages. Runs differ by colour and by marker, never by colour alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MARKERS = ("o", "s", "^", "D", "v", "P")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚")


@dataclass(frozen=True)
class Theme:
    """``palette``: after Okabe and Ito, for colour-blind readers; each has a contrast of 3 : 1 or more to the paper."""

    ink: str
    soft: str
    paper: str
    line: str
    palette: tuple[str, ...]


LIGHT = Theme(
    ink="#1b1f24",
    soft="#57606a",
    paper="#ffffff",
    line="#d9dee4",
    palette=("#0072b2", "#c84e00", "#008a66", "#a8508a", "#946c00", "#2a8cc7"),
)
DARK = Theme(
    ink="#e6e6e6",
    soft="#a3adb8",
    paper="#16191d",
    line="#353b43",
    palette=("#56b4e9", "#ff8a4c", "#2bc79a", "#e39bc6", "#e6b422", "#8fb8ff"),
)
SENTINEL = Theme(
    ink="#010203",
    soft="#010204",
    paper="#010205",
    line="#010206",
    palette=tuple(f"#0a0b0{number}" for number in range(len(LIGHT.palette))),
)
"""Placeholder colours in SVG, which `to_css` maps to the page's colours."""


def to_css() -> dict[str, str]:
    """Return a mapping from `SENTINEL`'s colours to the CSS colours that they stand for."""
    palette = {colour: f"var(--c{number})" for number, colour in enumerate(SENTINEL.palette)}
    return {SENTINEL.ink: "currentColor", SENTINEL.soft: "var(--soft)", **palette}


def style() -> str:
    """Return the style sheet of all pages that ptd writes, with the colours of both themes."""
    sheet = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}"
    return f":root {{ {variables(LIGHT)} }}\n{dark}\n{sheet}"


def variables(theme: Theme) -> str:
    """Return the theme as CSS variables."""
    named = {"ink": theme.ink, "soft": theme.soft, "paper": theme.paper, "line": theme.line}
    named |= {f"c{number}": colour for number, colour in enumerate(theme.palette)}
    return " ".join(f"--{name}: {colour};" for name, colour in named.items())
