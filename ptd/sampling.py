"""What a run's model writes for some held-out inputs, before the training and after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ptd.config import RunConfig
from ptd.engine.evaluation import HeldOut
from ptd.engine.ranks import Ranks
from ptd.engine.samples import write_samples
from ptd.generate import Decoding, Tuned, decode
from ptd.types import PromptState, Reporter

LONGEST, SPARE = 128, 16
"""New tokens: so many beyond the longest reference, and never more than `LONGEST`."""


@dataclass(frozen=True)
class Sampler:
    """Greedy continuations of the first ``train.samples`` held-out inputs, as ``ptd generate`` would write them.

    ``heartbeat`` is told of every token, which from a backbone that is offloaded takes long.
    """

    folder: Path
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
        held_out: HeldOut | None,
        ranks: Ranks,
        reporter: Reporter,
        heartbeat: Callable[[str], None],
    ) -> Sampler | None:
        """None where ``train.samples`` is 0. With the prompt on the backbone; every rank calls this together.

        Raises `UserError` for rows that have no prompt.
        """
        count, task = config.train.samples, tuned.task
        if count == 0 or held_out is None or not task.generates:
            return None
        room = tuned.room(LONGEST)
        longest = config.data.max_length if room is None else max(1, min(config.data.max_length, room))

        def read() -> tuple[list[list[int]], list[str]]:
            rows = held_out.rows.select(range(min(count, len(held_out.rows))))
            return task.prompts_and_references(rows, tuned.tokenizer, max_length=longest, what="data.eval")

        return cls(config.output_dir, tuned, *ranks.on_main(read), ranks, reporter, heartbeat)

    def keep(self, step: int, state: PromptState | None) -> None:
        """Write what comes of ``state`` (None: of the backbone alone) under ``step``. Every rank calls this together.

        A sharded backbone is one of all ranks: they take the same number of forward passes.
        """
        self.tuned.prepared.attachment.set(state)
        own = [[token for token in prompt if token >= 0 or state is not None] for prompt in self.prompts]
        tokenizer = self.tuned.tokenizer
        expected = max(len(tokenizer(reference)["input_ids"]) for reference in self.references)
        decoding = Decoding(max_new_tokens=min(LONGEST, expected + SPARE))
        model = self.tuned.prepared.model
        alive = model.register_forward_pre_hook(lambda *_: self.heartbeat(f"samples of step {step}"))  # each token
        try:
            texts = decode(self.tuned, own, decoding, self.ranks, batch_size=8, reporter=self.reporter)
        finally:
            alive.remove()

        def write() -> None:
            shown = [[token for token in prompt if token >= 0] for prompt in self.prompts]
            inputs = tokenizer.batch_decode(shown, skip_special_tokens=True)
            write_samples(self.folder, step, list(zip(inputs, self.references, texts, strict=True)))

        self.ranks.on_main(write)
