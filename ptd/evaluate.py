"""``ptd eval``: loss of an adapter on data, and with generation BLEU, ROUGE-L and exact match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptd.config import DataConfig, data_config
from ptd.data import load_rows, prompts_and_references, tokenize
from ptd.engine.evaluation import evaluate_loss, held_out_batches
from ptd.engine.ranks import Ranks
from ptd.generate import Decoding, Tuned, decode, load_tuned
from ptd.types import Reporter


def evaluate(
    data: str,
    *,
    adapter: str | None,
    backbone: str | None = None,
    settings: dict[str, Any] | None = None,
    decoding: Decoding | None = None,
    batch_size: int = 16,
    dtype: str = "auto",
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Evaluate on ``data`` (as ``data.eval``); with ``decoding`` also generate and compare with the references.

    The rows are read as the adapter was trained (its ``data`` section), changed by ``settings``. Without ``adapter``
    the plain ``backbone`` is evaluated. Under a launcher the loss is taken over all ranks. Raises `UserError`.
    """
    ranks, reporter = Ranks.start(), reporter or Reporter()
    try:
        tuned = load_tuned(adapter, backbone, ranks, dtype=dtype)
        config = data_config({**tuned.data, "eval": data, **(settings or {})})
        rows = load_rows(data, config.eval_split, what="--data")
        result = held_out_loss(tuned, rows, config, ranks, batch_size=batch_size, reporter=reporter)
        if decoding is not None:
            result |= text_metrics(
                *continue_rows(tuned, rows, config, decoding, batch_size=batch_size, reporter=reporter)
            )
        return result
    finally:
        ranks.stop()


def held_out_loss(
    tuned: Tuned, rows: Any, config: DataConfig, ranks: Ranks, *, batch_size: int, reporter: Reporter
) -> dict[str, Any]:
    """Loss, perplexity and number of supervised tokens of ``rows``, over all ranks."""
    examples = tokenize(rows, config, tuned.tokenizer, max_length=config.max_length, what=config.eval or "--data")
    reporter.note(f"--data: {examples.report}")
    batches = held_out_batches(
        examples,
        batch_size=batch_size,
        packing=config.packing,
        pad_token_id=tuned.tokenizer.pad_token_id,
        ranks=ranks,
    )
    return evaluate_loss(tuned.prepared.model, batches, ranks, reporter)


def continue_rows(
    tuned: Tuned, rows: Any, config: DataConfig, decoding: Decoding, *, batch_size: int, reporter: Reporter
) -> tuple[list[str], list[str]]:
    """What the model generates for the prompt of each row, and the row's reference."""
    room = tuned.room(decoding.max_new_tokens)
    longest = config.max_length if room is None else max(1, min(config.max_length, room))
    what = config.eval or "--data"
    prompts, references = prompts_and_references(rows, config, tuned.tokenizer, max_length=longest, what=what)
    return decode(tuned, prompts, decoding, batch_size=batch_size, reporter=reporter), references


def text_metrics(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU (sacrebleu, 0–100), mean ROUGE-L F1 (0–100) and exact match after stripping (0–100)."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    outputs, references = [text.strip() for text in outputs], [text.strip() for text in references]
    scorer = RougeScorer(["rougeL"])
    pairs = list(zip(references, outputs, strict=True))
    return {
        "bleu": sacrebleu.corpus_bleu(outputs, [references]).score,
        "rouge_l": 100 * sum(scorer.score(*pair)["rougeL"].fmeasure for pair in pairs) / len(pairs),
        "exact_match": 100 * sum(reference == output for reference, output in pairs) / len(pairs),
        "generated": len(pairs),
    }
