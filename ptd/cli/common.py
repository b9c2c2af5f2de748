"""Code that the commands share: common options, output on the main rank only, and the closing lines of a command."""

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
from ptd.errors import UserError
from ptd.files import as_path

if TYPE_CHECKING:
    from ptd.types import Reporter


def at_home(value: Path | list[Path] | None) -> Path | list[Path] | None:
    """Expand ``~`` in a path or in each path of a list; the callback of every option and argument that is a path.

    Shells leave some paths unexpanded, for example ``--output=~/out`` in bash.
    """
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
        help="Changes to keys of the run file, e.g. train.learning_rate=3e-3.",
        metavar="KEY=VALUE",
        autocompletion=completion.overrides,
    ),
]
Overwrite = Annotated[bool, typer.Option(help="Replace an existing run in output_dir.")]
Retry = Annotated[bool, typer.Option("--retry", help="Continue a run even if it has failed repeatedly.")]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        metavar="[NAME=]FOLDER",
        help="Adapter folder (ptd's or PEFT's), or a run's output folder. Repeat it as NAME=FOLDER to use several "
        "adapters at once: each row names its own.",
    ),
]
AdapterColumn = Annotated[
    str, typer.Option("--adapter-column", help="Column in which a row names its adapter; empty: the backbone alone.")
]
Backbone = Annotated[
    str | None,
    typer.Option("--backbone", "-b", help="Backbone folder or hub id; default: the backbone that the adapter names."),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Set a key of the section backbone or data, e.g. backbone.sharding=world or data.max_length=64; "
        "repeatable. Default: as in training, but with the whole backbone on every rank.",
        autocompletion=completion.settings,
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences per batch.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum number of generated tokens.")]
NumBeams = Annotated[
    int | None, typer.Option(min=1, help="Number of beams. Default: 1, no beam search.", show_default=False)
]


class Follow(enum.Enum):
    """The defaults that decoding uses: neutral values, or the model's generation_config."""

    neutral = "neutral"
    model = "model"


FromModel = Annotated[
    Follow,
    typer.Option(
        "--generation-config",
        help="Penalties, banned tokens, lengths and sampling where no option sets them: none (neutral), or those of "
        "the model's generation_config (model).",
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print only the result and errors, without progress and advice.")
]


def adapters_of(given: list[str] | None) -> str | dict[str, str] | None:
    """Return the folder of the only adapter, or name -> folder of those given as NAME=FOLDER; None without adapters.

    Raises `UserError` for several adapters that do not all have names of their own.
    """
    from ptd.runs.several import check_names

    if not given:
        return None
    named = [_named(each) for each in given]
    if len(given) == 1 and named[0] is None:
        return given[0]
    for each, pair in zip(given, named, strict=True):
        if pair is None:
            raise UserError(f"--adapter {each}: has no name, but one of several adapters needs it; write NAME=FOLDER")
    return check_names([pair for pair in named if pair is not None])


def _named(given: str) -> tuple[str, str] | None:
    """Return name and folder of NAME=FOLDER; None for a folder, whose path may contain an equals sign too."""
    name, sign, folder = given.partition("=")
    if not sign or "/" in name or as_path(given).is_dir():
        return None
    if not name.strip() or not folder:
        raise UserError(f"--adapter {given}: write it as NAME=FOLDER")
    return name.strip(), folder


def reporter_unless(quiet: bool) -> Reporter | None:
    """Return the reporter of progress on the main rank; None on other ranks or if ``quiet``."""
    from ptd.console import make_reporter

    return make_reporter() if is_main() and not quiet else None


def done(quiet: bool, written: Mapping[Path, str], then: Sequence[str], *, found: Sequence[str] = ()) -> None:
    """Print the closing lines of a command to stderr: the result ``found``, the files ``written``, the next commands.

    Prints nothing if ``quiet``, or on a rank other than the main rank.
    """
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
    """Return the existing files and folders of a finished run, each with its description."""
    left = {
        out / "adapter": "the adapter after the last step",
        out / "best": "the adapter of the best evaluation",
        out / "metrics.jsonl": "one record every train.logging_steps steps",
        out / "report.html": "a report on the run: curves, speed, samples, settings",
        out / "loss.png": "the loss curve",
        out / "run.json": "the configuration, the versions and the result",
    }
    return {path: what for path, what in left.items() if path.exists()}


def hush() -> None:
    """Silence the progress bars and advice that libraries would print on every rank."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for a package that ptd does not need
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(valid(value), indent=2))


def valid(value: Any) -> Any:
    """Return ``value`` with None for each number that is not finite, because JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: valid(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [valid(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
