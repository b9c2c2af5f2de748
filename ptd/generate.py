"""``ptd generate``: generate text from a frozen backbone with a tuned prompt, through Hugging Face ``generate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ptd.backbone import architecture_of, embeddings_of, load_tokenizer
from ptd.checkpoint import Adapter, load_adapter
from ptd.config import (
    BackboneConfig,
    DataConfig,
    TaskConfig,
    TaskKind,
    backbone_config,
    data_config,
    parse_method,
    task_config,
)
from ptd.data.continuations import Reader
from ptd.data.ends import ends_of_text
from ptd.data.tokens import check_ids, check_prompts, check_words
from ptd.decoding import Decoding, Tokens, generation_config, note_on_author, put_away, set_by_author
from ptd.deepspeed_config import zero3_config
from ptd.engine.evaluation import HeldOut, in_order
from ptd.engine.ranks import Ranks
from ptd.engine.setup import Prepared, prepare
from ptd.files import decode as decode_text
from ptd.files import lines_of, read_text
from ptd.inject import check_backend, decoder_start
from ptd.methods import method
from ptd.readouts import Readout
from ptd.tasks import Task, make_task
from ptd.tasks.seq2seq_lm import target_language, target_opening
from ptd.types import Architecture, HeadSettings, Reporter, UserError
from ptd.values import is_blank

Settings = Mapping[str, dict[str, Any]]
"""Section (``backbone`` or ``data``) -> key -> value: changes to those sections of the adapter's run."""

AS_TRAINED = ("dtype", "quantization", "int8_threshold")
"""Keys of the run's backbone section that also apply to its adapter. The placement of the weights does not."""


@dataclass(frozen=True)
class Tuned:
    """A backbone with an adapter (or without one), its tokenizer, and the task with its readout.

    ``taught``: the tokens that ended the adapter's training texts, as far as they are known.
    """

    prepared: Prepared
    tokenizer: Any
    adapter: Adapter | None
    task: Task
    readout: Readout
    taught: tuple[int, ...] = ()

    def held_out(self, rows: Any, batch_size: int, *, what: str, labelled: bool = True) -> HeldOut:
        """Tokenise ``rows`` (``what`` in messages); raises `UserError`, also for tokens that the backbone lacks."""
        task, tokenizer = self.task, self.tokenizer
        examples = task.tokenize(rows, tokenizer, what=what, labelled=labelled)
        check_ids(examples, tokenizer, embeddings_of(self.prepared.model), what, writes=task.generates)
        return HeldOut(task, examples, rows, batch_size, task.data.packing, tokenizer.pad_token_id)

    def room(self, used: int) -> int | None:
        """Return how many tokens fit the context after the prompt and ``used`` other tokens; None: no known limit."""
        context = self.prepared.shape.context
        if context is None or self.task.output == "seq2seq_lm":  # the encoder's input takes no room in the decoder
            return context
        return context - self.prepared.attachment.extra_positions - used


def start_ranks(settings: Settings | None) -> Ranks:
    """Join the processes of a launcher. A single process joins a process group only to shard its backbone."""
    return Ranks.start(needs_group=(settings or {}).get("backbone", {}).get("sharding", "none") != "none")


def backbone_of(adapter: Adapter | None, path: str | None, changes: dict[str, Any] | None = None) -> BackboneConfig:
    """Return the config of the adapter's backbone (or of ``path``) as in training, but not sharded, with ``changes``.

    Raises `UserError` if neither names a backbone, or a change is not valid.
    """
    named = path or (adapter.backbone if adapter is not None else "")
    if not named:
        raise UserError("the backbone is unknown: the adapter does not name it; give --backbone")
    trained = adapter.facts.get("backbone_config", {}) if adapter is not None else {}
    section = {**{key: trained[key] for key in AS_TRAINED if key in trained}, **(changes or {})}
    if section.get("quantization") != "int8" and "int8_threshold" not in (changes or {}):
        section.pop("int8_threshold", None)
    revision = adapter.revision if adapter is not None and path is None else None
    return backbone_config({**section, "path": named, "revision": revision})


@dataclass(frozen=True)
class Found:
    """An adapter and its backbone before the backbone's weights are loaded."""

    adapter: Adapter | None
    config: BackboneConfig
    task: Task
    head: HeadSettings
    tokenizer: Any

    def load(self, ranks: Ranks) -> Tuned:
        """Load the backbone and attach the adapter. All ranks call this together. Raises `UserError`."""
        prepared = prepare(self.config, ranks, zero3_config(self.config), output=self.task.output)
        prepared.attachment.inputs.placeholder = self.tokenizer.pad_token_id or 0
        readout = self.task.readout(self.tokenizer, prepared.shape.hidden_size, self.head)
        check_words(readout.token_ids(), self.tokenizer, embeddings_of(prepared.model))
        if self.adapter is not None:
            self.adapter.check_fits(prepared.shape, prepared.fingerprint, path=self.config.path)
            prepared.attachment.set(self.adapter.layout.state(self.adapter.flat.to(ranks.device)))
            _load_head(readout, self.adapter)
        taught = _taught(self.adapter)
        return Tuned(prepared, self.tokenizer, self.adapter, self.task, readout.to(ranks.device), taught)


def find_tuned(adapter: str | None, backbone: str | None, *, settings: Settings | None = None) -> Found:
    """Read the adapter, and everything of its backbone (or of ``backbone``) except the weights.

    The backbone and the data are treated as in training, except for the keys in ``settings``. The task is the one that
    the adapter was trained for. Without an adapter, or with one that PEFT wrote, it is the text task of the backbone's
    architecture. Raises `UserError` if nothing names a backbone, the adapter was made for another backbone, or a
    setting is not valid.
    """
    settings = settings or {}
    unknown = sorted(set(settings) - {"backbone", "data"})
    if unknown:
        raise UserError(f"settings: the section {unknown[0]!r} cannot be changed here; only backbone and data can")
    found = load_adapter(adapter) if adapter is not None else None
    config = backbone_of(found, backbone, settings.get("backbone"))
    architecture = architecture_of(config)
    check_backend(config.attention)
    task_section, data, head = sections_of(found, settings.get("data", {}))
    task_section = task_section or TaskConfig(kind=_text_task(architecture, config.path))
    try:
        data.check_task(task_section.kind)
    except ValueError as error:
        raise UserError(str(error)) from error
    task = make_task(task_section, data, architecture)
    return Found(found, config, task, head, load_tokenizer(config))


def load_tuned(adapter: str | None, backbone: str | None, ranks: Ranks, *, settings: Settings | None = None) -> Tuned:
    """Call `find_tuned`, then load the backbone and attach the adapter. All ranks call this together."""
    return find_tuned(adapter, backbone, settings=settings).load(ranks)


def _taught(adapter: Adapter | None) -> tuple[int, ...]:
    """Return the tokens that ended the adapter's training texts; none if the adapter does not record them."""
    training = adapter.facts.get("training") if adapter is not None else None
    ends = training.get("ends") if isinstance(training, dict) else None
    return tuple(end for end in ends if isinstance(end, int)) if isinstance(ends, list) else ()


def sections_of(adapter: Adapter | None, changes: dict[str, Any]) -> tuple[TaskConfig | None, DataConfig, HeadSettings]:
    """Return the task that the adapter records (or None), its data section with ``changes``, and its head settings.

    Raises `UserError` if a recorded value or a change is not valid.
    """
    facts = adapter.facts if adapter is not None else {}
    task, trained = facts.get("task"), facts.get("method")
    head = HeadSettings()
    if trained:
        parsed = parse_method(trained)
        head = method(trained["name"]).head(parsed)
    return task_config(task) if task else None, data_config({**facts.get("data", {}), **changes}), head


def _text_task(architecture: Architecture, path: str) -> TaskKind:
    if architecture == "encoder":
        raise UserError(f"the backbone {path} is an encoder, which has no task without an adapter; give --adapter")
    return "causal_lm" if architecture == "decoder" else "seq2seq_lm"


def _load_head(readout: Readout, adapter: Adapter) -> None:
    wanted = {name: tuple(parameter.shape) for name, parameter in readout.named_parameters()}
    given = {name: tuple(tensor.shape) for name, tensor in adapter.head.items()}
    if wanted != given:
        raise UserError(f"--adapter: its head has the tensors {given}, but its task and method require {wanted}")
    readout.load_state_dict(dict(adapter.head), strict=False)


def decode(
    tuned: Tuned,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    ranks: Ranks,
    *,
    batch_size: int,
    reporter: Reporter,
) -> list[str]:
    """Continue each prompt (token ids, the same on all ranks); return only the new texts, in the order of the prompts.

    Prompts of similar length form a batch, padded on the left (for an encoder on the right). The ranks share the
    batches. The batches and their random seeds do not depend on the number of ranks, so neither do the texts. Rank 0
    returns the texts, the other ranks an empty list. Raises `UserError` for a prompt without tokens, and for one that
    leaves no room for new tokens.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise UserError("a prompt has no tokens; give at least one token")
    rooms = [tuned.room(len(prompt)) for prompt in prompts]
    limits = [decoding.max_new_tokens if room is None else min(room, decoding.max_new_tokens) for room in rooms]
    if min(limits, default=1) < 1:
        longest = max(len(prompt) for prompt in prompts)
        raise UserError(
            f"a prompt of {longest} tokens leaves no room in the backbone's context for an answer; shorten the prompt"
        )
    together = tuned.prepared.sharded and ranks.world_size > 1
    one_length = tuned.prepared.attachment.verdict.left is not None
    batches = batches_of([len(prompt) for prompt in prompts], limits, batch_size, one_length=one_length)
    tokens, _ = tokens_of(tuned)
    found: dict[int, str] = {}
    reporter.start("generate", len(prompts))
    for begin in range(0, len(batches), ranks.world_size):
        number = begin + ranks.rank
        if number < len(batches):
            torch.manual_seed(int(np.random.SeedSequence([decoding.seed, number]).generate_state(1)[0]))
            chosen = [prompts[index] for index in batches[number]]
            new_tokens = limits[batches[number][0]]
            texts = _continue(tuned, chosen, decoding, tokens, new_tokens, synced=together)
            found |= zip(batches[number], texts, strict=True)
        elif together:  # this rank has no batch left, but the others need its shards in every forward pass
            _continue(tuned, [prompts[batches[-1][-1]]], Decoding(), tokens, 1, synced=True)
        reporter.advance("generate", sum(map(len, batches[: begin + ranks.world_size])))
    reporter.finish("generate")
    return in_order(found, ranks)


def batches_of(lengths: Sequence[int], limits: Sequence[int], batch_size: int, *, one_length: bool) -> list[list[int]]:
    """Return the indices of the prompts in each batch, longest prompts first.

    The prompts of a batch have the same limit of new tokens, so that no long prompt shortens the answer to another.
    With ``one_length`` they also have the same length.
    """
    batches: list[list[int]] = []
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for _, alike in groupby(order, key=lambda index: (limits[index], lengths[index] if one_length else 0)):
        members = list(alike)
        batches += [members[begin : begin + batch_size] for begin in range(0, len(members), batch_size)]
    return batches


@torch.no_grad()
def _continue(
    tuned: Tuned,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    tokens: Tokens,
    new_tokens: int,
    *,
    synced: bool,
) -> list[str]:
    """Return the new texts of one batch. ``synced``: run as many forward passes as the rank that needs the most."""
    model, of_encoder = tuned.prepared.model, tuned.task.output == "seq2seq_lm"
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), tokens.pad, device=model.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if of_encoder else slice(width - len(prompt), width)
        ids[row, place] = torch.tensor(prompt, device=model.device)
        mask[row, place] = 1
    try:
        config = generation_config(decoding, model.generation_config, tokens, new_tokens)
        also = {"tokenizer": tuned.tokenizer} if config.stop_strings else {}
        with put_away(model):
            inputs = tuned.prepared.attachment.generation_inputs(ids, mask)
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
    ranks, reporter = start_ranks(settings), reporter or Reporter()
    try:
        found = find_tuned(adapter, backbone, settings=settings)
        task = found.task
        if not task.generates:
            raise UserError("the adapter was trained to label rows, not to generate text; use ptd predict")
        tuned = found.load(ranks)
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
