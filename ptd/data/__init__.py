"""Rows -> tokens -> micro-batches.

`load_rows` reads a file, folder or hub dataset; `tokenize` makes `ptd.types.Examples` of the rows; `Batches` deals them
out to steps, ranks and micro-batches, and `prefetch` does so ahead of time.
"""

from ptd.data.batches import Batches
from ptd.data.formats import prompts_and_references, tokenize
from ptd.data.prefetch import prefetch
from ptd.data.sources import check_source, load_rows
from ptd.data.templates import marks_of
from ptd.data.typed import fill_prompts, prompt_tokens

__all__ = [
    "Batches",
    "check_source",
    "fill_prompts",
    "load_rows",
    "marks_of",
    "prefetch",
    "prompt_tokens",
    "prompts_and_references",
    "tokenize",
]
