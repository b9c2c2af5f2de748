"""Continue prompts with a tuned backbone, through Hugging Face `generate`, in batches."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ptd.async_copy import to_device
from ptd.data.continuations import Reader
from ptd.data.ends import ends_of_text
from ptd.distributed.ranks import Ranks
from ptd.engine.evaluation import in_order
from ptd.inject import decoder_start
from ptd.runs.decoding import Decoding, Tokens, generation_config, note_on_author, put_away, set_by_author
from ptd.runs.tuned import Tuned
from ptd.tasks.seq2seq_lm import target_language, target_opening
from ptd.types import Reporter, UserError


def decode(
    tuned: Tuned | Sequence[Tuned],
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    ranks: Ranks,
    *,
    batch_size: int,
    reporter: Reporter,
) -> list[str]:
    """Continue each prompt (token ids, the same on all ranks); return only the new texts, in the order of the prompts.

    ``tuned``: what continues the prompts; a sequence names one for each prompt, all on the same backbone.

    Prompts of similar length form a batch, padded on the left (for an encoder on the right). The ranks share the
    batches. The batches and their random seeds do not depend on the number of ranks, so neither do the texts. Rank 0
    returns the texts, the other ranks an empty list. Raises `UserError` for a prompt without tokens, and for one that
    leaves no room for new tokens.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise UserError("a prompt has no tokens; give at least one token")
    by = [tuned] * len(prompts) if isinstance(tuned, Tuned) else list(tuned)
    if not by:
        return []
    rooms = [each.room(len(prompt)) for each, prompt in zip(by, prompts, strict=True)]
    limits = [decoding.max_new_tokens if room is None else min(room, decoding.max_new_tokens) for room in rooms]
    if min(limits) < 1:
        longest = max(len(prompt) for prompt in prompts)
        raise UserError(
            f"a prompt of {longest} tokens leaves no room in the backbone's context for an answer; shorten the prompt"
        )
    together = by[0].prepared.sharded and ranks.world_size > 1
    one_length = by[0].prepared.attachment.verdict.left is not None
    tokens_by = {id(each): tokens_of(each)[0] for each in by}
    kinds = [tokens_by[id(each)] for each in by]  # a text ends where its writer learned to end
    batches = batches_of([len(prompt) for prompt in prompts], limits, batch_size, one_length=one_length, kinds=kinds)
    batches = [sorted(batch, key=lambda index: by[index].member or 0) for batch in batches]
    found: dict[int, str] = {}
    reporter.start("generate", len(prompts))
    for begin in range(0, len(batches), ranks.world_size):
        number = begin + ranks.rank
        if number < len(batches):
            torch.manual_seed(int(np.random.SeedSequence([decoding.seed, number]).generate_state(1)[0]))
            chosen = [prompts[index] for index in batches[number]]
            first = batches[number][0]
            writers = [by[index] for index in batches[number]]
            texts = _continue(writers, chosen, decoding, kinds[first], limits[first], synced=together)
            found |= zip(batches[number], texts, strict=True)
        elif together:  # this rank has no batch left, but the others need its shards in every forward pass
            last = batches[-1][-1]
            _continue([by[last]], [prompts[last]], Decoding(), kinds[last], 1, synced=True)
        reporter.advance("generate", sum(map(len, batches[: begin + ranks.world_size])))
    reporter.finish("generate")
    return in_order(found, ranks)


def batches_of(
    lengths: Sequence[int],
    limits: Sequence[int],
    batch_size: int,
    *,
    one_length: bool,
    kinds: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """Return the indices of the prompts in each batch, longest prompts first.

    The prompts of a batch have the same limit of new tokens, so that no long prompt shortens the answer to another.
    With ``one_length`` they also have the same length. ``kinds``: prompts of different kinds share no batch.
    """
    batches: list[list[int]] = []
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds or ()))}
    kind_of = [numbers[kind] for kind in kinds] if kinds is not None else [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda index: (kind_of[index], -lengths[index]))
    for _, alike in groupby(order, key=lambda i: (kind_of[i], limits[i], lengths[i] if one_length else 0)):
        members = list(alike)
        batches += [members[begin : begin + batch_size] for begin in range(0, len(members), batch_size)]
    return batches


@torch.no_grad()
def _continue(
    writers: Sequence[Tuned],
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    tokens: Tokens,
    new_tokens: int,
    *,
    synced: bool,
) -> list[str]:
    """Return the new texts of one batch, each by its own writer.

    ``synced``: run as many forward passes as the rank that needs the most.
    """
    tuned = writers[0]
    members = None if tuned.member is None else [each.member or 0 for each in writers]
    attachment = tuned.prepared.attachment
    model, of_encoder = tuned.prepared.model, tuned.task.output == "seq2seq_lm"
    width = max(len(prompt) for prompt in prompts)
    padded = any(len(prompt) < width for prompt in prompts) or attachment.ragged(members)
    ids, mask = (to_device(each, model.device) for each in _rectangle(prompts, tokens.pad, left=not of_encoder))
    try:
        config = generation_config(decoding, model.generation_config, tokens, new_tokens)
        also = {"tokenizer": tuned.tokenizer} if config.stop_strings else {}
        with put_away(model), attachment.reading(members), attachment.padding_known(padded):
            inputs = attachment.generation_inputs(ids, mask)
            output = model.generate(**inputs, generation_config=config, synced_gpus=synced, **also)
    except ValueError as error:
        if not (decoding.generation_config == "model" and set_by_author(model.generation_config)):
            raise
        raise UserError(f"--generation-config: transformers rejects the model's own settings: {error}") from error
    reader, texts = Reader(tuned.tokenizer), []
    for prompt, row in zip(prompts, output[:, 1 if of_encoder else width :].tolist(), strict=True):
        size = next((place for place, token in enumerate(row) if token in tokens.ends), len(row))
        written = row[:size]
        if of_encoder:
            texts.append(reader.text(written, skip_special_tokens=True))
        else:
            texts.append(reader.behind(prompt, written))
    return texts


def _rectangle(prompts: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Return token ids and mask ``[B, S]`` of prompts that are padded on the left or right, on the host."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    place = torch.arange(int(lengths.max()))
    useful = place >= place.shape[0] - lengths[:, None] if left else place < lengths[:, None]
    ids = torch.full(useful.shape, pad)
    ids[useful] = torch.tensor([token for prompt in prompts for token in prompt])
    return ids, useful.long()


def tokens_of(tuned: Tuned) -> tuple[Tokens, str | None]:
    """Return the ids that generation needs, and a note on ids of the model's config that are not followed (or None)."""
    tokenizer, model, size = tuned.tokenizer, tuned.prepared.model, tuned.prepared.shape.vocab_size
    own = model.generation_config
    taught = {*tuned.taught, *(tuned.task.ends(tokenizer) if tuned.task.generates else ())}
    ends, note = ends_of_text(tokenizer, own.eos_token_id, taught, size)
    fillers = (tokenizer.pad_token_id, *ends, 0)
    pad = next(token for token in fillers if token is not None and 0 <= token < size)
    if tuned.task.output != "seq2seq_lm":
        return Tokens(ends, pad, own.bos_token_id), note
    language = target_language(tokenizer)
    start = language if language is not None else decoder_start(model)
    return Tokens(ends, pad, own.bos_token_id, pad if start is None else start, target_opening(tokenizer)), note


def decoding_notes(tuned: Tuned, decoding: Decoding) -> list[str]:
    """Return notes for the user on how texts are generated."""
    found = [tokens_of(tuned)[1], note_on_author(decoding, tuned.prepared.model.generation_config)]
    return [note for note in found if note is not None]
