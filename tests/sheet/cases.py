"""The inputs of the family sheet, the same for every family and both sides: rows, a prefix, a soft prompt, a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ptd.types import virtual_id
from sheet.configs import FIRST_WORD, LAST_WORD, PAD

LENGTHS = (5, 11, 3)
"""Tokens per row: all lengths differ, and one row is longer than the windows."""
SOURCES = (7, 4, 10)
"""Tokens per row that the encoder of an encoder-decoder reads."""
P = 3
NEW_TOKENS = 6


@dataclass(frozen=True)
class Rows:
    """``ids``: the tokens that the model (or the decoder) reads; ``sources``: those that the encoder reads, if any."""

    ids: list[Tensor]
    sources: list[Tensor] | None = None

    def marked(self) -> Rows:
        """Return the same rows with P virtual tokens after the first token (of an encoder-decoder: in the sources)."""
        marks = torch.tensor([virtual_id(number) for number in range(P)])
        read = self.ids if self.sources is None else self.sources
        marked = [torch.cat([row[:1], marks, row[1:]]) for row in read]
        return Rows(marked) if self.sources is None else Rows(self.ids, marked)

    def changed_last(self) -> Rows:
        """Return the same rows, each with another last token."""
        span = LAST_WORD - FIRST_WORD
        changed = [row.clone() for row in self.ids]
        for row in changed:
            row[-1] = FIRST_WORD + (row[-1] - FIRST_WORD + 7) % span
        return Rows(changed, self.sources)


def draw_rows(with_sources: bool, decoder_start: int | None) -> Rows:
    """Return the rows; the decoder of an encoder-decoder starts from ``decoder_start``."""
    generator = torch.Generator().manual_seed(11)

    def draw(count: int) -> Tensor:
        return torch.randint(FIRST_WORD, LAST_WORD, (count,), generator=generator)

    ids = [draw(length) for length in LENGTHS]
    if not with_sources:
        return Rows(ids)
    for row in ids:
        row[0] = decoder_start if decoder_start is not None else 0
    return Rows(ids, [draw(length) for length in SOURCES])


def draw_soft(width: int) -> Tensor:
    """Return embeddings of virtual tokens ``[P, width]``."""
    return 0.3 * torch.randn(P, width, generator=torch.Generator().manual_seed(12))


def draw_prefix(shapes: list[tuple[int, int, int]]) -> list[tuple[Tensor, Tensor]]:
    """Return keys ``[P, H, Dk]`` and values ``[P, H, Dv]`` for attention layers of shapes (H, Dk, Dv)."""
    generator = torch.Generator().manual_seed(13)
    return [
        (torch.randn(P, heads, key, generator=generator), torch.randn(P, heads, value, generator=generator))
        for heads, key, value in shapes
    ]


def loss_of(row: int, output: Tensor, language_model: bool) -> Tensor:
    """Return the loss of the outputs ``[S, width]`` of a row without its first output; gradients are taken of it."""
    read = output[1:]
    if language_model:
        return cross_entropy(read.float(), targets(row, len(read)), reduction="sum")
    wanted = torch.randn(output.shape, generator=torch.Generator().manual_seed(100 + row))[1:]
    return (read.float() - wanted).square().sum()


def targets(row: int, count: int) -> Tensor:
    """Return the tokens that a row's outputs should predict: ``[count]``."""
    generator = torch.Generator().manual_seed(200 + row)
    return torch.randint(FIRST_WORD, LAST_WORD, (count,), generator=generator)


@dataclass(frozen=True)
class Written:
    """The tokens of a continuation, and the logits ``[tokens, vocabulary]`` from which they were chosen."""

    tokens: list[int]
    logits: Tensor


def alone(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the usual arguments of ``generate``."""
    return {"input_ids": ids, "attention_mask": mask}


def generated(
    model: Any,
    rows: Rows,
    order: list[int],
    eos: int | None,
    inputs: Callable[[Tensor, Tensor], dict[str, Tensor]] = alone,
) -> list[Written]:
    """Return what ``generate`` writes for these rows in one batch, greedily and never ``eos`` or the padding token.

    Prompts are padded on the left, the inputs of an encoder on the right, as ptd pads them. ``inputs`` returns the
    arguments of ``generate`` for ids and mask.
    """
    encoder = rows.sources is not None
    read = [(rows.ids if rows.sources is None else rows.sources)[row] for row in order]
    width = max(map(len, read))
    ids = torch.full((len(read), width), PAD)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(read):
        place = slice(0, len(tokens)) if encoder else slice(width - len(tokens), width)
        ids[row, place] = tokens
        mask[row, place] = 1
    with torch.no_grad():
        written = model.generate(
            **inputs(ids, mask),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            pad_token_id=PAD,
            suppress_tokens=[PAD],  # some decoders treat a padding token that they wrote as padding
            output_logits=True,
            return_dict_in_generate=True,
            **({} if eos is None else {"eos_token_id": eos}),
        )
    logits = torch.stack(written.logits, dim=1)
    return [Written(row[-NEW_TOKENS:].tolist(), by) for row, by in zip(written.sequences, logits, strict=True)]


def misses(got: list[Written], right: list[Written], close: float) -> str:
    """Return where the logits differ by more than ``close`` while the earlier tokens agree; empty if nowhere."""
    wrong = []
    for row, (found, want) in enumerate(zip(got, right, strict=True)):
        same = next(
            (step for step, pair in enumerate(zip(found.tokens, want.tokens, strict=True)) if len({*pair}) > 1),
            NEW_TOKENS,
        )
        errors = [distance(found.logits[step], want.logits[step]) for step in range(min(same + 1, NEW_TOKENS))]
        step = next((step for step, error in enumerate(errors) if not error < close), None)
        if step is not None:
            wrong.append(f"row {row}: the logits of token {step} differ by {errors[step]:.2g}")
    return "; ".join(wrong)


def distance(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, in units of the root mean square of ``want``."""
    if got.shape != want.shape:
        return float("inf")
    if not bool(got.isfinite().all()):
        return float("inf")
    scale = want.double().square().mean().sqrt().clamp(min=1e-12)
    return float((got.double() - want.double()).abs().max() / scale)
