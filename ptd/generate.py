"""``ptd generate``: text from a frozen backbone with a tuned prompt, through Hugging Face ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ptd.backbone import architecture_of, load_tokenizer
from ptd.checkpoint import Adapter, load_adapter
from ptd.config import BackboneConfig, data_config, task_config
from ptd.engine.ranks import Ranks
from ptd.engine.setup import Prepared, prepare
from ptd.methods import method_head
from ptd.readouts import Readout
from ptd.tasks import Task, make_task
from ptd.tasks.seq2seq_lm import target_language
from ptd.types import Architecture, Reporter, UserError


@dataclass(frozen=True)
class Decoding:
    """How to choose the next token: greedy by default; ``temperature`` samples, ``num_beams`` searches."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Tuned:
    """A backbone with an adapter on it (or none), its tokenizer, and the task with its readout."""

    prepared: Prepared
    tokenizer: Any
    adapter: Adapter | None
    task: Task
    readout: Readout

    def room(self, used: int) -> int | None:
        """Tokens that can be generated after ``used`` others beside the prompt; None: no known limit."""
        context = self.prepared.shape.context
        if context is None or self.task.output == "seq2seq_lm":  # what the encoder reads takes none of the decoder's
            return context
        return context - self.prepared.attachment.extra_positions - used


def load_tuned(
    adapter: str | None,
    backbone: str | None,
    ranks: Ranks,
    *,
    dtype: str = "auto",
    settings: dict[str, Any] | None = None,
) -> Tuned:
    """Load the adapter's backbone (or ``backbone``) and put the adapter on it.

    The task is the one the adapter was trained for, its ``data`` section changed by ``settings``; without an adapter,
    or with one that PEFT wrote, the text task of the backbone's architecture. Raises `UserError` if nothing names a
    backbone, or the adapter was made for another one.
    """
    found = load_adapter(adapter) if adapter is not None else None
    path = backbone or (found.backbone if found is not None else "")
    if not path:
        raise UserError("no backbone is known: the adapter names none; give --backbone")
    revision = found.revision if found is not None and backbone is None else None
    config = BackboneConfig(path=path, revision=revision, dtype=dtype)
    facts = found.facts if found is not None else {}
    architecture = architecture_of(config)
    described = facts.get("task") or {"kind": _text_task(architecture, path)}
    task = make_task(task_config(described), data_config({**facts.get("data", {}), **(settings or {})}), architecture)
    tokenizer = load_tokenizer(config)
    prepared = prepare(config, ranks, output=task.output)
    readout = task.readout(tokenizer, prepared.shape.hidden_size, method_head(facts.get("method", {})))
    if found is not None:
        found.check_fits(prepared.shape, prepared.fingerprint, path=path)
        prepared.attachment.set(found.layout.state(found.flat.to(ranks.device)))
        _load_head(readout, found)
    return Tuned(prepared, tokenizer, found, task, readout.to(ranks.device))


def _text_task(architecture: Architecture, path: str) -> str:
    if architecture == "encoder":
        raise UserError(f"the backbone {path} is an encoder, which has no task of its own; give --adapter")
    return "causal_lm" if architecture == "decoder" else "seq2seq_lm"


def _load_head(readout: Readout, adapter: Adapter) -> None:
    wanted = {name: tuple(parameter.shape) for name, parameter in readout.named_parameters()}
    given = {name: tuple(tensor.shape) for name, tensor in adapter.head.items()}
    if wanted != given:
        raise UserError(f"--adapter: its head holds {given}, but its task and method describe {wanted}")
    readout.load_state_dict(dict(adapter.head), strict=False)


def decode(
    tuned: Tuned, prompts: Sequence[Sequence[int]], decoding: Decoding, *, batch_size: int, reporter: Reporter
) -> list[str]:
    """Continue each prompt (token ids); returns the new text only, in the order given.

    Prompts of similar length run together, padded on the left (those of an encoder on the right). Raises `UserError`
    for one that leaves no room.
    """
    model, tokenizer = tuned.prepared.model, tuned.tokenizer
    of_encoder = tuned.task.output == "seq2seq_lm"
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    longest = max((len(prompt) for prompt in prompts), default=0)
    room = tuned.room(longest)
    if any(len(prompt) == 0 for prompt in prompts):
        raise UserError("a prompt has no tokens; give at least one")
    if room is not None and room < 1:
        raise UserError(
            f"a prompt of {longest} tokens leaves no room in the backbone's context for an answer; shorten it"
        )
    new_tokens = decoding.max_new_tokens if room is None else min(room, decoding.max_new_tokens)
    generation = _generation_config(tuned, decoding, new_tokens)
    texts = [""] * len(prompts)
    torch.manual_seed(decoding.seed)
    reporter.start("generate", len(prompts))
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        width = len(prompts[chosen[0]])
        ids = torch.full((len(chosen), width), generation.pad_token_id, device=model.device)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            prompt = torch.tensor(prompts[index], device=model.device)
            place = slice(0, len(prompt)) if of_encoder else slice(width - len(prompt), width)
            ids[row, place] = prompt
            mask[row, place] = 1
        with torch.no_grad():
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=generation)
        written = output if of_encoder else output[:, width:]
        for index, text in zip(chosen, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            texts[index] = text
        reporter.advance("generate", min(begin + batch_size, len(order)))
    reporter.finish("generate")
    return texts


def _generation_config(tuned: Tuned, decoding: Decoding, max_new_tokens: int) -> GenerationConfig:
    own = tuned.prepared.model.generation_config
    eos = own.eos_token_id if own.eos_token_id is not None else tuned.tokenizer.eos_token_id
    first_eos = eos[0] if isinstance(eos, list) else eos
    pad = tuned.tokenizer.pad_token_id if tuned.tokenizer.pad_token_id is not None else first_eos
    sampling = decoding.temperature > 0
    start = own.decoder_start_token_id
    if start is None and tuned.task.output == "seq2seq_lm":
        start = target_language(tuned.tokenizer)
    options: dict[str, Any] = {}
    if sampling:
        options = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampling,
        num_beams=decoding.num_beams,
        eos_token_id=eos,
        pad_token_id=pad if pad is not None else 0,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=start,
        forced_bos_token_id=own.forced_bos_token_id,
        **options,
    )


def generate(
    prompts: Sequence[str],
    *,
    adapter: str | None,
    backbone: str | None = None,
    decoding: Decoding | None = None,
    batch_size: int = 16,
    dtype: str = "auto",
    reporter: Reporter | None = None,
) -> list[str]:
    """Continue each of ``prompts`` (put into the adapter's prompt template); returns the new text only.

    Raises `UserError`.
    """
    tuned = load_tuned(adapter, backbone, Ranks.start(), dtype=dtype)
    if not tuned.task.generates:
        raise UserError("the adapter was trained to label, not to write; use ptd predict")
    ids = tuned.task.prompts(prompts, tuned.tokenizer)
    return decode(tuned, ids, decoding or Decoding(), batch_size=batch_size, reporter=reporter or Reporter())


def read_prompts(path: Path) -> list[str]:
    """One prompt a line of a text file. Raises `UserError` if it cannot be read or is empty."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file: cannot read {path}: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--file: {path} has no prompts; write one a line")
    return prompts
