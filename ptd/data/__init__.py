"""Turn rows into tokens, and tokens into micro-batches.

`load_rows` reads a file, a folder or a hub dataset. `tokenize` turns the rows into `ptd.types.Examples`, piece by piece
(`ptd.data.collecting`), in memory or in a folder (`ptd.data.cache`). `Batches` assigns the examples to steps, ranks and
micro-batches, and `prefetch` prepares the micro-batches in advance.
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
