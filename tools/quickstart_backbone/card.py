"""The model card that pretraining writes next to the quickstart's backbone."""

from __future__ import annotations

import datetime
import os
import platform

import tokenizers
import torch
import transformers

_CARD = """\
# A tiny pretrained backbone for the ptd quickstart

A Llama of {parameters} parameters, trained from scratch on generated English about invented restaurants, hotels, shops,
museums, musicians, cats and boats. It exists so that prefix tuning can be tried in minutes, offline, on two CPU cores.

## How it was made

    {command}

| | |
|---|---|
| date | {date} |
| hardware | {cores} CPU cores, bf16 autocast over fp32 weights{compiled} |
| time of the training loop | {minutes:.1f} minutes |
| steps | {steps:,} of {rows} rows of {row_tokens} tokens |
| tokens | {tokens:,} |
| final loss | {loss:.4f} (weighted mean over the last 100 steps) |
| optimizer | AdamW, betas 0.9 and 0.95, weight decay 0.1, clipping at 1 |
| learning rate | peak {peak}, warm-up and cosine over the wall-clock time |
| versions | Python {python}, torch {torch}, transformers {transformers}, tokenizers {tokenizers} |

The corpus is generated (`tools/quickstart_backbone/corpus.py`) and contains no outside data. The first view of each
entity cannot be predicted and has weight {first_weight} in the loss. The corpus, the tokenizer and the initial weights
are seeded, but the number of steps depends on the wall-clock time, so a second run gives a different model.

## Shape

4 layers, hidden size 256, 8 query and 4 key/value heads of size 32, feed-forward size 640, tied embeddings, byte-level
BPE of 1,536 tokens with single digits, stored in bf16. It was trained on documents of up to {row_tokens} tokens;
positions up to 1,024 are accepted, but those beyond {row_tokens} did not occur in training.

The tokenizer adds no token by itself: a text starts without a BOS, and `add_special_tokens` makes no difference.
`<|endoftext|>` ends each document (it is EOS, and BOS only in name); `<|pad|>` is padding and was never trained on.

## What it can and cannot do

It can restate a record about the seven domains in the styles of its corpus: it copies values and invented names,
including names it never saw, and ends its texts. It knows no facts, follows no instruction, answers no question outside
these styles and writes only this small subset of English. Use it only to try the toolkit.
"""


def model_card(command: str, parameters: int, compiled: bool, **facts: object) -> str:
    """Return the card's text; ``facts`` are the numbers of the run, named as in the template."""
    return _CARD.format(
        command=command,
        parameters=f"{parameters / 1e6:.2f} M",
        compiled=", torch.compile" if compiled else "",
        date=datetime.date.today().isoformat(),
        cores=os.cpu_count(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
        **facts,
    )
