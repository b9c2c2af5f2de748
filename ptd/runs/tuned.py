"""A backbone with a tuned prompt or head, loaded for inference from an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
from ptd.config.deepspeed import zero3_config
from ptd.data.tokens import check_ids, check_words
from ptd.distributed.ranks import Ranks
from ptd.engine.evaluation import HeldOut
from ptd.engine.setup import Prepared, prepare
from ptd.inject import check_backend
from ptd.methods import method
from ptd.readouts import Readout
from ptd.tasks import Task, make_task
from ptd.types import Architecture, HeadSettings, Reporter, UserError

Settings = Mapping[str, dict[str, Any]]
"""Section (``backbone`` or ``data``) -> key -> value: changes to those sections of the adapter's run."""


AS_TRAINED = ("dtype", "quantization", "int8_threshold")
"""Keys of the run's backbone section that also apply to its adapter. The placement of the weights does not."""


@dataclass(frozen=True)
class Tuned:
    """A backbone with an adapter (or without one), its tokenizer, and the task with its readout.

    ``taught``: the tokens that ended the adapter's training texts, as far as they are known. ``member``: which of the
    backbone's prompts is the adapter's, or `NO_MEMBER`; None: the backbone has only this prompt.
    """

    prepared: Prepared
    tokenizer: Any
    adapter: Adapter | None
    task: Task
    readout: Readout
    taught: tuple[int, ...] = ()
    member: int | None = None

    def held_out(self, rows: Any, batch_size: int, *, what: str, labelled: bool = True) -> HeldOut:
        """Tokenise ``rows`` (``what`` in messages); raises `UserError`, also for tokens that the backbone lacks."""
        task, tokenizer = self.task, self.tokenizer
        examples = task.tokenize(rows, tokenizer, what=what, labelled=labelled)
        check_ids(examples, tokenizer, embeddings_of(self.prepared.model), what, writes=task.generates)
        return HeldOut(task, examples, rows, batch_size, task.data.packing, tokenizer.pad_token_id, self.member)

    def room(self, used: int) -> int | None:
        """Return how many tokens fit the context after the prompt and ``used`` other tokens; None: no known limit."""
        context = self.prepared.shape.context
        if context is None or self.task.output == "seq2seq_lm":  # the encoder's input takes no room in the decoder
            return context
        return context - self.prepared.attachment.extra_for(self.member) - used


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
class TunedReference:
    """An adapter and its backbone before the backbone's weights are loaded."""

    adapter: Adapter | None
    config: BackboneConfig
    task: Task
    head: HeadSettings
    tokenizer: Any

    def start_ranks(self) -> Ranks:
        """Join the processes of a launcher. A single process joins a process group only to shard the backbone."""
        return Ranks.start(needs_group=self.config.sharded)

    def load(self, ranks: Ranks, reporter: Reporter | None = None) -> Tuned:
        """Load the backbone and attach the adapter. All ranks call this together. Raises `UserError`."""
        prepared = self.prepare(ranks, reporter)
        tuned = self.on(prepared)
        if self.adapter is not None:
            prepared.attachment.set(self.adapter.state_on(ranks.device))
        return tuned

    def prepare(self, ranks: Ranks, reporter: Reporter | None = None) -> Prepared:
        """Load the backbone, without the adapter. All ranks call this together."""
        prepared = prepare(self.config, ranks, zero3_config(self.config), output=self.task.output)
        if reporter is not None and prepared.attachment.notice is not None:
            reporter.note(f"backbone.attention: {prepared.attachment.notice}")
        prepared.attachment.inputs.placeholder = self.tokenizer.pad_token_id or 0
        return prepared

    def on(self, prepared: Prepared, member: int | None = None) -> Tuned:
        """Return the adapter with its task and readout on a loaded backbone, without attaching its prompt.

        Raises `UserError` if the adapter was made for another backbone.
        """
        readout = self.task.readout(self.tokenizer, prepared.shape.hidden_size, self.head)
        check_words(readout.token_ids(), self.tokenizer, embeddings_of(prepared.model))
        if self.adapter is not None:
            self.adapter.check_fits(prepared.shape, prepared.fingerprint, path=self.config.path)
            _load_head(readout, self.adapter)
        readout = readout.to(prepared.run.device)
        return Tuned(prepared, self.tokenizer, self.adapter, self.task, readout, _taught(self.adapter), member)


def find_tuned(adapter: str | None, backbone: str | None, *, settings: Settings | None = None) -> TunedReference:
    """Read the adapter, and everything of its backbone (or of ``backbone``) except the weights.

    The backbone and the data are treated as in training, except for the keys in ``settings``. The task is the one that
    the adapter was trained for. Without an adapter, or with one that PEFT wrote, it is the text task of the backbone's
    architecture. Raises `UserError` if nothing names a backbone, the adapter was made for another backbone, or a
    setting is not valid.
    """
    check_sections(settings or {})
    found = load_adapter(adapter) if adapter is not None else None
    config = backbone_of(found, backbone, (settings or {}).get("backbone"))
    task, head = task_of(found, config, (settings or {}).get("data", {}))
    return TunedReference(found, config, task, head, load_tokenizer(config))


def check_sections(settings: Settings) -> None:
    """Raise `UserError` if ``settings`` change any section but ``backbone`` and ``data``."""
    unknown = sorted(set(settings) - {"backbone", "data"})
    if unknown:
        raise UserError(f"settings: the section {unknown[0]!r} cannot be changed here; only backbone and data can")


def task_of(adapter: Adapter | None, config: BackboneConfig, changes: dict[str, Any]) -> tuple[Task, HeadSettings]:
    """Return the task that the adapter was trained for, with ``changes`` to its data section, and its head settings.

    Without an adapter, or with one that PEFT wrote, it is the text task of the backbone's architecture. Raises
    `UserError`.
    """
    architecture = architecture_of(config)
    check_backend(config.attention)
    task_section, data, head = sections_of(adapter, changes)
    task_section = task_section or TaskConfig(kind=_text_task(architecture, config.path))
    try:
        data.check_task(task_section.kind)
    except ValueError as error:
        raise UserError(str(error)) from error
    return make_task(task_section, data, architecture), head


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
