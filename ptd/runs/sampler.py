"""Store the model's outputs (texts, labels or answers) for some held-out rows before and after training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ptd.checkpoint.files import writing
from ptd.config import RunConfig
from ptd.distributed.ranks import Ranks
from ptd.engine.evaluation import HeldOut, scores_of
from ptd.runs.decoding import Decoding
from ptd.runs.generation import decode
from ptd.runs.samples_log import write_samples
from ptd.runs.tuned import Tuned
from ptd.tasks import LabellingTask, WritingTask
from ptd.types import PromptState, Reporter, Sample

LONGEST, SPARE = 128, 16
"""Limit of new tokens: `SPARE` more than the longest reference, but at most `LONGEST`."""
LETTERS = 400
"""Maximum number of characters stored of a labelled row, of its label and of the model's answer."""


@dataclass(frozen=True)
class Sampler:
    """Stores the model's outputs for the first ``train.samples`` held-out rows.

    ``look(step, state)`` returns the samples for the prompt ``state`` after ``step`` steps (on rank 0; an empty list
    elsewhere). All ranks call it together: with a sharded backbone they need the same number of forward passes.
    """

    folder: Path
    look: Callable[[int, PromptState], list[Sample]]
    ranks: Ranks

    @classmethod
    def of(
        cls,
        config: RunConfig,
        tuned: Tuned,
        held_out: HeldOut | None,
        ranks: Ranks,
        reporter: Reporter,
        heartbeat: Callable[[str], None],
    ) -> Sampler | None:
        """Build the sampler for a backbone with its prompt attached; None if ``train.samples`` is 0.

        All ranks call this together. The sampler calls ``heartbeat`` for every generated token, because generation
        with an offloaded backbone is slow. Raises `UserError` for rows that have no prompt.
        """
        count, task = config.train.samples, tuned.task
        if count == 0 or held_out is None:
            return None
        if task.generates:
            look: Callable[[int, PromptState], list[Sample]] = Continuations.of(
                config, tuned, task, held_out, count, ranks, reporter, heartbeat
            )
        else:
            look = Answers.of(tuned, task, held_out, count, ranks, reporter)
        return cls(config.output_dir, look, ranks)

    def keep(self, step: int, state: PromptState) -> None:
        """Write the samples of ``state`` under ``step``. All ranks call this together."""
        samples = self.look(step, state)

        def write() -> None:
            with writing(self.folder):
                write_samples(self.folder, step, samples)

        self.ranks.on_main(write)


@dataclass(frozen=True)
class Continuations:
    """Greedy continuations as in ``ptd generate``; before the first step, those of the backbone without a prompt."""

    tuned: Tuned
    prompts: list[list[int]]
    references: list[str]
    ranks: Ranks
    reporter: Reporter
    heartbeat: Callable[[str], None]

    @classmethod
    def of(
        cls,
        config: RunConfig,
        tuned: Tuned,
        task: WritingTask,
        held_out: HeldOut,
        count: int,
        ranks: Ranks,
        reporter: Reporter,
        heartbeat: Callable[[str], None],
    ) -> Continuations:
        room = tuned.room(LONGEST)
        longest = config.data.max_length if room is None else max(1, min(config.data.max_length, room))

        def read() -> tuple[list[list[int]], list[str]]:
            rows = held_out.rows.select(range(min(count, len(held_out.rows))))
            return task.prompts_and_references(rows, tuned.tokenizer, max_length=longest, what="data.eval")

        return cls(tuned, *ranks.on_main(read), ranks, reporter, heartbeat)

    def __call__(self, step: int, state: PromptState) -> list[Sample]:
        alone = step == 0
        self.tuned.prepared.attachment.set(None if alone else state)
        texts_of = [[token for token in prompt if token >= 0] for prompt in self.prompts]
        tokenizer = self.tuned.tokenizer
        expected = max(len(tokenizer(reference)["input_ids"]) for reference in self.references)
        decoding = Decoding(max_new_tokens=min(LONGEST, expected + SPARE))
        model = self.tuned.prepared.model
        alive = model.register_forward_pre_hook(lambda *_: self.heartbeat(f"samples of step {step}"))  # per token
        given = texts_of if alone else self.prompts
        try:
            texts = decode(self.tuned, given, decoding, self.ranks, batch_size=8, reporter=self.reporter)
        finally:
            alive.remove()
        if not self.ranks.is_main:
            return []
        inputs = tokenizer.batch_decode(texts_of, skip_special_tokens=True)
        return [Sample(*each) for each in zip(inputs, self.references, texts, strict=True)]


@dataclass(frozen=True)
class Answers:
    """Predictions as in ``ptd predict``; before the first step, those of the initial prompt and head.

    ``held_out``: only the sampled rows.
    """

    tuned: Tuned
    task: LabellingTask
    held_out: HeldOut
    ranks: Ranks
    reporter: Reporter

    @classmethod
    def of(
        cls, tuned: Tuned, task: LabellingTask, held_out: HeldOut, count: int, ranks: Ranks, reporter: Reporter
    ) -> Answers:
        few = None if held_out.rows is None else held_out.rows.select(range(min(count, len(held_out.rows))))
        examples = ranks.on_main(lambda: task.tokenize(few, tuned.tokenizer, what="data.eval"))
        return cls(tuned, task, replace(held_out, examples=examples, rows=few), ranks, reporter)

    def __call__(self, step: int, state: PromptState) -> list[Sample]:
        prepared, few = self.tuned.prepared, self.held_out
        prepared.attachment.set(state)
        scores = scores_of(few, prepared, self.tuned.readout, self.ranks, self.reporter)
        if not self.ranks.is_main:
            return []
        found = self.task.samples(self.task.answers(scores, few.examples, few.rows), few.rows)
        return [
            replace(each, prompt=_short(each.prompt), reference=_short(each.reference), text=_short(each.text))
            for each in found
        ]


def _short(text: str) -> str:
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"
