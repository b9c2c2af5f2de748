"""``ptd generate``: generate text from a frozen backbone with a tuned prompt, through Hugging Face ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from ptd.backbone import embeddings_of
from ptd.data import load_rows
from ptd.data.tokens import check_prompts
from ptd.files import decode_text, lines_of, read_text
from ptd.runs.decoding import Decoding
from ptd.runs.generation import decode, decoding_notes
from ptd.runs.scores import check_writes
from ptd.runs.several import COLUMN, Adapters, Part, find_adapters
from ptd.runs.several_scores import OnceReporter, continue_parts
from ptd.runs.tuned import Settings
from ptd.types import Reporter, UserError
from ptd.values import is_blank

GENERATED = "generated"
"""The field that `generate_rows` adds to a row, or replaces."""


def generate(
    prompts: Sequence[str],
    *,
    adapter: Adapters,
    use: str | Sequence[str | None] | None = None,
    backbone: str | None = None,
    settings: Settings | None = None,
    decoding: Decoding | None = None,
    raw: bool = False,
    batch_size: int = 16,
    reporter: Reporter | None = None,
) -> list[str]:
    """Continue each of ``prompts``; return only the new texts.

    A prompt is formatted as in training: it fills the adapter's prompt template or, after training on ``messages``, is
    a user message in the tokenizer's chat template. ``raw``: the prompt is used unchanged. Of several adapters by name,
    ``use`` names the one for all prompts, or one for each prompt (None: the backbone alone). Under a launcher, the
    ranks share the prompts of rank 0. Rank 0 returns the texts, the other ranks an empty list. Raises `UserError`.
    """
    found, reporter = find_adapters(adapter, backbone, settings=settings), OnceReporter(reporter or Reporter())
    if (use is not None) != found.named:
        raise UserError(
            "--use: say which adapter continues the prompts: " + ", ".join(filter(None, found.by_name))
            if found.named
            else "--use: names one of several adapters; give them as --adapter NAME=FOLDER, or remove --use"
        )
    ranks = found.start_ranks()
    try:
        _check_generates(found.first.task.generates)
        several = found.load(ranks, reporter)
        tuned = several.first
        decoding = decoding or Decoding()

        def read() -> tuple[list[list[int]], list[str | None]]:
            names: list[str | None] = [use] * len(prompts) if use is None or isinstance(use, str) else list(use)
            if len(names) != len(prompts):
                raise UserError(f"use: got {len(names)} names for {len(prompts)} prompts; give one name for each")
            ids: dict[int, list[int]] = {}
            for name in dict.fromkeys(names):
                task = check_writes(several.use(name, "--use").task)
                own = [number for number, other in enumerate(names) if other == name]
                found = task.prompts([prompts[number] for number in own], tuned.tokenizer, raw=raw)
                ids |= zip(own, found, strict=True)
            return [ids[number] for number in range(len(prompts))], names

        ids, names = ranks.on_main(read)
        by = [several.use(name, "--use") for name in names]
        check_prompts(ids, tuned.tokenizer, embeddings_of(tuned.prepared.model), "the prompts")
        for each in {id(writer): writer for writer in by}.values():
            for note in [*filter(None, [check_writes(each.task).how_typed(raw)]), *decoding_notes(each, decoding)]:
                reporter.note(note)
        return decode(by, ids, decoding, ranks, batch_size=batch_size, reporter=reporter)
    finally:
        ranks.stop()


def generate_rows(
    data: str,
    *,
    adapter: Adapters,
    column: str = COLUMN,
    backbone: str | None = None,
    settings: Settings | None = None,
    decoding: Decoding | None = None,
    batch_size: int = 16,
    reporter: Reporter | None = None,
) -> list[dict[str, Any]]:
    """Continue the prompt of each row of ``data`` (as ``data.eval``); return the rows with the new text as `GENERATED`.

    Of several adapters by name, each row reads the one that its ``column`` names, or none. The rows need no
    completions; a conversation (``data.format: messages``) ends with the answer that is generated anew. Rank 0 returns
    the rows, the other ranks an empty list. Raises `UserError`.
    """
    found, reporter = find_adapters(adapter, backbone, settings=settings), reporter or Reporter()
    ranks = found.start_ranks()
    try:
        _check_generates(found.first.task.generates)
        rows = load_rows(data, found.first.task.data.eval_split, what="--data")
        several = found.load(ranks, reporter)
        parts = [replace(part, rows=_completed(part)) for part in several.parts(rows, column, data)]
        decoding = decoding or Decoding()
        texts, _ = continue_parts(several, parts, decoding, ranks, batch_size=batch_size, reporter=reporter, what=data)
        if not ranks.is_main:
            return []
        return [row | {GENERATED: text} for row, text in zip(rows.with_format(None), texts, strict=True)]
    finally:
        ranks.stop()


def _completed(part: Part) -> Any:
    """Return the rows with a completion in each, which the tasks require but which does not change the prompt."""
    data = part.tuned.task.data
    column = data.columns.get("completion", "completion")
    if data.format != "prompt_completion" or column in part.rows.column_names:
        return part.rows
    return part.rows.add_column(column, ["."] * len(part.rows))


def _check_generates(generates: bool) -> None:
    if not generates:
        raise UserError("the adapter was trained to label rows, not to generate text; use ptd predict")


def read_prompts(source: str | Path | BinaryIO, named: str = "--file") -> list[str]:
    """Read one prompt per line from a text file, or from a stream of bytes that messages call ``named``.

    Raises `UserError` if the source cannot be read or has no prompts.
    """
    if isinstance(source, str | Path):
        if Path(source).suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
            raise UserError(
                f"{named}: {source} is a file of rows, but each line would be read as a prompt; write only the prompts "
                "into a .txt file, one per line, or use ptd eval --generate --data for rows"
            )
        text, place = read_text(source, f"{named}: cannot read"), f"{named}: {source}"
    else:
        text, place = decode_text(source.read(), f"cannot read {named}"), named
    prompts = [line for line in lines_of(text) if not is_blank(line)]
    if not prompts:
        raise UserError(f"{place} has no prompts; write one per line")
    return prompts
