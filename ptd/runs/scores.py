"""Score a tuned backbone on rows: its loss and metrics, and its texts compared with the references."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ptd.distributed.ranks import Ranks
from ptd.engine.evaluation import evaluate_held_out
from ptd.runs.decoding import Decoding
from ptd.runs.generation import decode, decoding_notes
from ptd.runs.tuned import Tuned
from ptd.tasks import Task, WritingTask
from ptd.types import Reporter, UserError


def check_writes(task: Task) -> WritingTask:
    """Return the task if its rows have prompts to continue; otherwise raise `UserError`."""
    if not task.generates:
        raise UserError("--generate: the adapter was trained to label rows, not to generate text; remove --generate")
    if task.data.format == "text":
        raise UserError(
            "--generate: data.format: text has no prompts to generate from; use prompt_completion or messages"
        )
    return task


def held_out_metrics(
    tuned: Tuned, rows: Any, ranks: Ranks, *, batch_size: int, reporter: Reporter, what: str = "--data"
) -> dict[str, Any]:
    """Return the loss and metrics of ``rows``, computed over all ranks."""
    held_out = tuned.held_out(rows, batch_size, what=what)
    reporter.note(f"--data: {held_out.examples.report}")
    return evaluate_held_out(held_out, tuned.prepared, tuned.readout, ranks, reporter)


@dataclass(frozen=True)
class RowsToContinue:
    """Rows as prompts (token ids), with the text that should follow each."""

    prompts: list[list[int]]
    references: list[str]


def rows_to_continue(
    tuned: Tuned, rows: Any, decoding: Decoding, reporter: Reporter, what: str = "--data"
) -> RowsToContinue:
    """Return the prompts and references of ``rows`` as the task writes them, with notes on what does not fit."""
    task = check_writes(tuned.task)
    room = tuned.room(decoding.max_new_tokens)
    longest = task.data.max_length if room is None else max(1, min(task.data.max_length, room))
    prompts, references = task.prompts_and_references(rows, tuned.tokenizer, max_length=longest, what=what)
    filled = sum(len(prompt) == longest for prompt in prompts)
    if longest < task.data.max_length and filled:
        reporter.note(
            f"--generate: {filled:,} prompts fill the {longest:,} tokens that --max-new-tokens leaves in the "
            "backbone's context; longer prompts were truncated on the left"
        )
    lengths = [len(ids) for ids in tuned.tokenizer(references, add_special_tokens=False, verbose=False)["input_ids"]]
    long = sum(length > decoding.max_new_tokens for length in lengths)
    if long:
        reporter.note(
            f"--max-new-tokens: {long:,} of {len(references):,} references are longer than {decoding.max_new_tokens:,} "
            f"tokens (the longest has {max(lengths):,}), so no generated text can match them"
        )
    for note in decoding_notes(tuned, decoding):
        reporter.note(note)
    return RowsToContinue(prompts, references)


def continue_rows(
    tuned: Tuned,
    rows: Any,
    decoding: Decoding,
    ranks: Ranks,
    *,
    batch_size: int,
    reporter: Reporter,
    what: str = "--data",
) -> tuple[list[str], list[str]]:
    """Return the text generated for each row's prompt (rank 0; an empty list elsewhere), and each row's reference."""
    found = rows_to_continue(tuned, rows, decoding, reporter, what)
    texts = decode(tuned, found.prompts, decoding, ranks, batch_size=batch_size, reporter=reporter)
    return texts, found.references


def text_metrics(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return corpus BLEU (sacrebleu, 0–100), mean ROUGE-L F1 (0–100) and exact match after stripping (0–100).

    On English, ROUGE-L equals that of rouge_score. In other scripts it compares words; in scripts without spaces it
    compares characters.
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    outputs, references = [text.strip() for text in outputs], [text.strip() for text in references]
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = list(zip(references, outputs, strict=True))
    return {
        "bleu": sacrebleu.corpus_bleu(outputs, [references]).score,
        "rouge_l": 100 * sum(scorer.score(*pair)["rougeL"].fmeasure for pair in pairs) / len(pairs),
        "exact_match": 100 * sum(reference == output for reference, output in pairs) / len(pairs),
        "generated": len(pairs),
    }


class _Words:
    """A tokenizer for ROUGE; the one of rouge_score knows no letters but a to z."""

    def tokenize(self, text: str) -> list[str]:
        """Split into lower-case words. Each character of a script without spaces and each symbol (emoji) is a word."""
        return _WORD.findall(text.lower())


_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""The scripts without spaces: Thai, Lao, Burmese, Khmer, kana and Han."""


_SYMBOLS = "\u2600-\u27bf\U0001f000-\U0001faff"


_WORD = re.compile(f"[{_ALONE}{_SYMBOLS}]|[^\\W_{_ALONE}]+")
