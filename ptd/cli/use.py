"""``ptd eval``, ``generate``, ``predict``, ``inspect``, ``export`` and ``import``: the commands that use an adapter."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ptd.cli.common import (
    Adapter,
    AdapterColumn,
    Backbone,
    BatchSize,
    Changes,
    Follow,
    FromModel,
    MaxNewTokens,
    NumBeams,
    Quiet,
    adapters_of,
    at_home,
    done,
    hush,
    is_main,
    print_json,
    reporter_unless,
    valid,
)
from ptd.errors import UserError
from ptd.files import check_target, check_writable, write_text


def evaluate(
    data: Annotated[str, typer.Option("--data", "-d", help="Rows to evaluate on: file, dataset folder or hub name.")],
    adapter: Adapter = None,
    adapter_column: AdapterColumn = "adapter",
    backbone: Backbone = None,
    changes: Changes = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Also generate texts and report BLEU, ROUGE-L and exact match.")
    ] = False,
    max_new_tokens: MaxNewTokens = 128,
    num_beams: NumBeams = None,
    generation_config: FromModel = Follow.neutral,
    batch_size: BatchSize = 16,
    quiet: Quiet = False,
) -> None:
    """Measure an adapter on data. Print the loss, the task's metrics and, with --generate, text metrics as JSON.

    Without --adapter, the frozen backbone is evaluated without a prompt. With several, the result has those of each.
    """
    from ptd.config import parse_settings

    settings = parse_settings(changes or [])
    if not generate and generation_config is not Follow.neutral:
        raise UserError("--generation-config: has no effect without --generate; add --generate, or remove it")
    hush()
    from ptd.commands.evaluate import evaluate as run_evaluation
    from ptd.runs.decoding import Decoding

    decoding = Decoding(max_new_tokens, num_beams=num_beams, generation_config=generation_config.value)
    result = run_evaluation(
        data,
        adapter=adapters_of(adapter),
        column=adapter_column,
        backbone=backbone,
        settings=settings,
        decoding=decoding if generate else None,
        batch_size=batch_size,
        reporter=reporter_unless(quiet),
    )
    if is_main():
        print_json(result)


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; default: one per line from stdin.")] = None,
    adapter: Adapter = None,
    use: Annotated[
        str | None, typer.Option("--use", help="Name of the adapter that continues the prompts, one of several.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="Rows whose prompts to continue: file, dataset folder or hub name."),
    ] = None,
    adapter_column: AdapterColumn = "adapter",
    backbone: Backbone = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Text file with one prompt per line.", callback=at_home)
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Send each prompt unchanged, without the prompt template or chat template."),
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="Sampling temperature; 0: greedy decoding. Default: 0.", show_default=False),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Probability of the nucleus to sample from. Default: 1, all tokens.", show_default=False
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=0, help="Sample from the k likeliest tokens. Default: 0, all tokens.", show_default=False),
    ] = None,
    num_beams: NumBeams = None,
    generation_config: FromModel = Follow.neutral,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch_size: BatchSize = 16,
    changes: Changes = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per line: prompt and completion.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Continue prompts with the tuned backbone. Print one completion per line; with --data, each row as JSON.

    After training on chats (data.format: messages), each prompt is a user message in the tokenizer's chat template.
    """
    from ptd.commands.generate import generate as run_generation
    from ptd.commands.generate import generate_rows
    from ptd.config import parse_settings
    from ptd.runs.decoding import Decoding

    settings = parse_settings(changes or [])
    adapters = adapters_of(adapter)
    if data is not None and (prompts or file is not None or raw or use is not None or as_json):
        raise UserError(
            "--data: rows have prompts and names of their own; remove prompts, --file, --raw, --use, --json"
        )
    typed = _prompts(prompts, file) if is_main() and data is None else []
    hush()
    decoding = Decoding(max_new_tokens, temperature, top_p, top_k, num_beams, seed, generation_config.value)
    reporter = reporter_unless(quiet)
    if data is not None:
        rows = generate_rows(
            data,
            adapter=adapters,
            column=adapter_column,
            backbone=backbone,
            settings=settings,
            decoding=decoding,
            batch_size=batch_size,
            reporter=reporter,
        )
        for row in rows:
            print(json.dumps(valid(row), ensure_ascii=False, default=str))
        return
    texts = run_generation(
        typed,
        adapter=adapters,
        use=use,
        backbone=backbone,
        settings=settings,
        decoding=decoding,
        raw=raw,
        batch_size=batch_size,
        reporter=reporter,
    )
    for prompt, text in zip(typed, texts, strict=True):
        print(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False) if as_json else text)


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    from ptd.commands.generate import read_prompts

    if given and file is not None:
        raise UserError("give prompts as arguments or with --file, not both")
    if given:
        return given
    if file is not None:
        return read_prompts(file)
    if sys.stdin.isatty():
        raise UserError("no prompt was given; give prompts as arguments, with --file, or on stdin")
    return read_prompts(sys.stdin.buffer, "stdin")


def predict(
    data: Annotated[str, typer.Option("--data", "-d", help="Rows to label: file, dataset folder or hub name.")],
    adapter: Annotated[
        list[str],
        typer.Option(
            "--adapter",
            "-a",
            metavar="[NAME=]FOLDER",
            help="Adapter folder, or a run's output folder; repeatable as NAME=FOLDER.",
        ),
    ],
    adapter_column: AdapterColumn = "adapter",
    backbone: Backbone = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSONL file to write; default: stdout.", callback=at_home)
    ] = None,
    changes: Changes = None,
    batch_size: BatchSize = 16,
    quiet: Quiet = False,
) -> None:
    """Label rows with the tuned backbone. Print each row as JSON with its label and probabilities, tags, or answer."""
    from ptd.config import parse_settings

    settings = parse_settings(changes or [])
    if output is not None and is_main():
        check_target(output, "--output")
    hush()
    from ptd.commands.predict import predict as run_prediction

    found = run_prediction(
        data,
        adapter=adapters_of(adapter),
        column=adapter_column,
        backbone=backbone,
        settings=settings,
        batch_size=batch_size,
        reporter=reporter_unless(quiet),
    )
    if not is_main():
        return
    lines = [json.dumps(valid(row), ensure_ascii=False, default=str) for row in found]
    if output is None:
        print("\n".join(lines))
    else:
        write_text(output, "".join(line + "\n" for line in lines), "--output")
        done(
            quiet,
            {output: f"{len(lines)} rows"},
            [f"ptd eval {' '.join(f'--adapter {shlex.quote(each)}' for each in adapter)} --data ROWS_WITH_ANSWERS"],
        )


def inspect_(
    adapter: Annotated[str, typer.Argument(help="Adapter folder (ptd's or PEFT's), or a run's output folder.")],
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="Rows to measure the prompt's effect on: file, dataset folder or hub name."),
    ] = None,
    backbone: Backbone = None,
    changes: Changes = None,
    rows: Annotated[int, typer.Option(min=1, help="Maximum number of rows, evenly spaced over the data.")] = 64,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder to write; default: inspect/ in the adapter's folder.", callback=at_home
        ),
    ] = None,
    batch_size: BatchSize = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure what a prompt does. Attention on it per layer and head, norms, ranks, the loss without each token.

    Writes inspect.json, figures and index.html, which holds everything and opens without a network.
    """
    from ptd.config import parse_settings

    settings = parse_settings(changes or [])
    hush()
    from ptd.console import print_inspection
    from ptd.inspection import ADDS, output_folder, write_inspection
    from ptd.inspection import inspect as run_inspection
    from ptd.inspection.tables import headline, sections

    folder = output or output_folder(adapter)
    if is_main():
        check_writable(folder, "--output")
    reporter = reporter_unless(quiet)
    found = run_inspection(
        adapter, data=data, backbone=backbone, settings=settings, rows=rows, batch_size=batch_size, reporter=reporter
    )
    if not is_main():
        return
    write_inspection(found, folder)
    print_json(found) if as_json else print_inspection(headline(found), found["notes"], sections(found))
    if data is None and not quiet:
        print(ADDS, file=sys.stderr)
    written = {
        folder / "index.html": "the whole result; the same folder has its figures as PNG",
        folder / "inspect.json": "the numbers",
    }
    done(quiet, written, [])


def export_(
    source: Annotated[str, typer.Argument(help="Adapter folder or run output folder.")],
    target: Annotated[Path, typer.Argument(help="New folder to write.", callback=at_home)],
    base_model: Annotated[
        str | None, typer.Option(help="Backbone that the PEFT folder is to name, e.g. a hub id.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write an adapter as a plain PEFT folder. peft.PeftModel.from_pretrained loads it."""
    from ptd.commands.export import export_adapter

    note = export_adapter(source, target, base_model=base_model)
    if note is not None:
        print(note, file=sys.stderr)
    print(target)
    then = [
        f"peft.PeftModel.from_pretrained(model, {str(target)!r})   # in Python",
        f"ptd import {shlex.quote(str(target))} NEW_FOLDER   # converts it back",
    ]
    done(quiet, {target: "the adapter in PEFT's format"}, then)


def import_(
    source: Annotated[str, typer.Argument(help="Folder of a PEFT prompt adapter.")],
    target: Annotated[Path, typer.Argument(help="New folder to write.", callback=at_home)],
    backbone: Backbone = None,
    quiet: Quiet = False,
) -> None:
    """Write a PEFT adapter as a ptd adapter. It may be a prefix, prompt or p-tuning; its backbone is checked."""
    hush()
    from ptd.commands.export import import_adapter

    import_adapter(source, target, backbone=backbone)
    print(target)
    done(
        quiet,
        {target: "the adapter, bound to its backbone"},
        [f"ptd eval --adapter {shlex.quote(str(target))} --data rows.jsonl"],
    )
