"""What the commands share: options that several have, who prints, and how a command ends."""

from __future__ import annotations

import enum
import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptd.cli import completion
from ptd.files import as_path

if TYPE_CHECKING:
    from ptd.types import Reporter


def at_home(value: Path | list[Path] | None) -> Path | list[Path] | None:
    """The callback of every option and argument that is a path: what it means, whatever shell it came through."""
    if value is None:
        return None
    return [as_path(each) for each in value] if isinstance(value, list) else as_path(value)


RunFile = Annotated[
    Path,
    typer.Argument(
        help="The run file (YAML).", metavar="RUN.yaml", autocompletion=completion.run_files, callback=at_home
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes to it, e.g. train.learning_rate=3e-3.",
        metavar="KEY=VALUE",
        autocompletion=completion.overrides,
    ),
]
Overwrite = Annotated[bool, typer.Option(help="Replace a run that is in output_dir already.")]
Retry = Annotated[bool, typer.Option("--retry", help="Continue a run also if it failed again and again.")]
Adapter = Annotated[
    str | None, typer.Option("--adapter", "-a", help="Adapter folder (ptd's or PEFT's), or a run's output folder.")
]
Backbone = Annotated[
    str | None, typer.Option("--backbone", "-b", help="Backbone folder or hub id; default: the one the adapter names.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="A key of the sections backbone or data, e.g. backbone.sharding=world or data.max_length=64; repeatable. "
        "Default: as in training, the backbone whole on every rank.",
        autocompletion=completion.settings,
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences that run together.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
NumBeams = Annotated[int | None, typer.Option(min=1, help="Beams. Default: 1, no beam search.", show_default=False)]


class Follow(enum.Enum):
    """Whose settings decoding follows."""

    neutral = "neutral"
    model = "model"


FromModel = Annotated[
    Follow,
    typer.Option(
        "--generation-config",
        help="Whose penalties, bans, lengths and sampling hold where no option says otherwise: nobody's (neutral), or "
        "those that the model's author set (model).",
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no advice: the result alone, and what goes wrong.")
]


def reporter_unless(quiet: bool) -> Reporter | None:
    """Who says how far it is: the main rank, unless it is to be quiet."""
    from ptd.console import make_reporter

    return make_reporter() if is_main() and not quiet else None


def done(quiet: bool, written: Mapping[Path, str], then: Sequence[str], *, found: Sequence[str] = ()) -> None:
    """The end of a command, on stderr: what it ``found``, what was written where, and what to type next."""
    if quiet or not is_main():
        return
    sys.stdout.flush()
    width = max((len(str(path)) for path in written), default=0)
    files = [f"{path!s:<{width}}  {what}" for path, what in written.items()]
    blocks = {"result": list(found), "written": files, "next": list(then)}
    for title, lines in blocks.items():
        for number, line in enumerate(lines):
            print(f"{title + ':' if number == 0 else '':<9}{line}".rstrip(), file=sys.stderr)


def left_by(out: Path) -> dict[Path, str]:
    """What a finished run leaves in its folder, as far as it is there."""
    left = {
        out / "adapter": "the adapter, after the last step",
        out / "best": "the adapter of the best evaluation",
        out / "metrics.jsonl": "a record every train.logging_steps",
        out / "report.html": "a page on the run: curves, speed, samples, settings",
        out / "loss.png": "the curve",
        out / "run.json": "the configuration, the versions and the result",
    }
    return {path: what for path, what in left.items() if path.exists()}


def hush() -> None:
    """Keep libraries from talking over ours: their progress bars and advice on every rank."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for a package that is not needed
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(valid(value), indent=2))


def valid(value: Any) -> Any:
    """The value as JSON can have it: null for a number that is not finite."""
    if isinstance(value, dict):
        return {key: valid(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [valid(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
