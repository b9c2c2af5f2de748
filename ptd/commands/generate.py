"""``ptd generate``: generate text from a frozen backbone with a tuned prompt, through Hugging Face ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ptd.backbone import embeddings_of
from ptd.data.tokens import check_prompts
from ptd.files import decode_text, lines_of, read_text
from ptd.runs.decoding import Decoding
from ptd.runs.generation import decode, decoding_notes
from ptd.runs.tuned import Settings, find_tuned
from ptd.types import Reporter, UserError
from ptd.values import is_blank


def generate(
    prompts: Sequence[str],
    *,
    adapter: str | None,
    backbone: str | None = None,
    settings: Settings | None = None,
    decoding: Decoding | None = None,
    raw: bool = False,
    batch_size: int = 16,
    reporter: Reporter | None = None,
) -> list[str]:
    """Continue each of ``prompts``; return only the new texts.

    A prompt is formatted as in training: it fills the adapter's prompt template or, after training on ``messages``, is
    a user message in the tokenizer's chat template. ``raw``: the prompt is used unchanged. Under a launcher, the ranks
    share the prompts of rank 0. Rank 0 returns the texts, the other ranks an empty list. Raises `UserError`.
    """
    found, reporter = find_tuned(adapter, backbone, settings=settings), reporter or Reporter()
    ranks = found.start_ranks()
    try:
        task = found.task
        if not task.generates:
            raise UserError("the adapter was trained to label rows, not to generate text; use ptd predict")
        tuned = found.load(ranks, reporter)
        ids = ranks.on_main(lambda: task.prompts(prompts, tuned.tokenizer, raw=raw))
        check_prompts(ids, tuned.tokenizer, embeddings_of(tuned.prepared.model), "the prompts")
        decoding = decoding or Decoding()
        for note in [*filter(None, [task.how_typed(raw)]), *decoding_notes(tuned, decoding)]:
            reporter.note(note)
        return decode(tuned, ids, decoding, ranks, batch_size=batch_size, reporter=reporter)
    finally:
        ranks.stop()


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
