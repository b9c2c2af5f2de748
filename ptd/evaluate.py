"""``ptd eval``: loss of an adapter on data, and with generation BLEU, ROUGE-L and exact match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptd.config import DataConfig, data_config
from ptd.data import Batches, load_rows, prompts_and_references, tokenize
from ptd.engine.evaluation import evaluate_loss
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
        return evaluate_tuned(tuned, config, ranks, decoding=decoding, batch_size=batch_size, reporter=reporter)
    finally:
        ranks.stop()


def evaluate_tuned(
    tuned: Tuned,
    config: DataConfig,
    ranks: Ranks,
    *,
    decoding: Decoding | None,
    batch_size: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """Like `evaluate`, on what is loaded already; ``config.eval`` names the data."""
    assert config.eval is not None
    rows = load_rows(config.eval, config.eval_split, what="--data")
    examples = tokenize(rows, config, tuned.tokenizer, max_length=config.max_length, what="--data")
    reporter.note(f"--data: {examples.report}")
    batches = Batches(
        examples,
        rank=ranks.rank,
        world_size=ranks.world_size,
        per_device_batch_size=batch_size,
        packing=config.packing,
        shuffle=False,
        pad_token_id=tuned.tokenizer.pad_token_id or 0,
    )
    result: dict[str, Any] = evaluate_loss(tuned.prepared.model, batches, ranks, reporter)
    if decoding is not None:
        prompts, references = prompts_and_references(rows, config, tuned.tokenizer, max_length=config.max_length)
        outputs = decode(tuned, prompts, decoding, batch_size=batch_size, reporter=reporter)
        result |= text_metrics(outputs, references)
    return result


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
