"""Pretrain the quickstart's backbone from scratch: ``python tools/quickstart_backbone/pretrain.py --output DIR``.

The package ships the result in ``ptd/quickstart/backbone``. Two CPU cores make it in the time given by ``--minutes``:
first a byte-level BPE tokenizer, then a Llama of 3 M parameters, trained in bf16 autocast over fp32 weights. The
schedule depends on the elapsed time instead of a step count, so a slower machine takes fewer steps, not more time.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from card import model_card
from corpus import FIRST_VIEW_WEIGHT, Segment, collections
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY = 1536
ROW_TOKENS, BATCH_ROWS = 256, 8
PEAK_LEARNING_RATE, WARMUP_FRACTION, FINAL_FRACTION = 2e-3, 0.03, 0.02
DOCUMENTS_PER_BLOCK = 2000
TOKENIZER_SEED, TRAIN_SEED = 1, 2


@dataclass
class Outcome:
    """The numbers of a pretraining run, for the log and the model card."""

    steps: int
    tokens: int
    minutes: float
    loss: float


def train_tokenizer(documents: int = 12000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with an end-of-text and a separate padding token; it adds no token by itself.

    Each digit is a token, so that the model copies a number digit by digit instead of needing a token for each number.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = ("".join(text for text, _ in document) for document in collections(TOKENIZER_SEED))
    tokenizer.train_from_iterator(itertools.islice(texts, documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a randomly initialised Llama of 3.15 M parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[list[Segment]]) -> list[tuple[list[int], list[float]]]:
    """Return token ids and loss weights of each document, ended by the end-of-text token and truncated to one row."""
    texts = ["".join(text for text, _ in document) for document in documents]
    encoded = []
    for document, encoding in zip(documents, tokenizer.backend_tokenizer.encode_batch(texts), strict=True):
        ends = list(itertools.accumulate(len(text) for text, _ in document))
        weights, segment = [], 0
        for start, _ in encoding.offsets:
            while start >= ends[segment]:
                segment += 1
            weights.append(document[segment][1])
        encoded.append(([*encoding.ids, tokenizer.eos_token_id][:ROW_TOKENS], [*weights, 1.0][:ROW_TOKENS]))
    return encoded


def packed_batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield batches of token ids, loss weights and document numbers without end, each ``[BATCH_ROWS, ROW_TOKENS]``.

    Whole documents are packed into rows, longest first. If a document were cut in two, the second half would train the
    model to guess values that it could not copy from the first half.
    """
    stream, rng = collections(seed), random.Random(seed)
    while True:
        waiting: list[list[tuple[list[int], list[float]]]] = [[] for _ in range(ROW_TOKENS + 1)]
        for document in encode(tokenizer, list(itertools.islice(stream, DOCUMENTS_PER_BLOCK))):
            waiting[len(document[0])].append(document)
        rows = []
        for length in range(ROW_TOKENS, 0, -1):
            while waiting[length]:
                row, free = [waiting[length].pop()], ROW_TOKENS - length
                while (fitting := next((size for size in range(free, 0, -1) if waiting[size]), 0)) > 0:
                    row.append(waiting[fitting].pop())
                    free -= fitting
                row.append(([tokenizer.pad_token_id] * free, [0.0] * free))
                rows.append(
                    (
                        [token for ids, _ in row for token in ids],
                        [weight for _, weights in row for weight in weights],
                        [number for number, (ids, _) in enumerate(row) for _ in ids],
                    )
                )
        rng.shuffle(rows)
        for start in range(0, len(rows) - BATCH_ROWS + 1, BATCH_ROWS):
            yield tuple(torch.tensor(column) for column in zip(*rows[start : start + BATCH_ROWS], strict=True))


def document_mask(documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a causal mask within each document ``[B, 1, S, S]`` and positions that restart per document ``[B, S]``.

    Without the mask, the values of other documents in the row distract from those to copy, and the model learns to copy
    later.
    """
    same = documents[:, :, None] == documents[:, None, :]
    mask = same & torch.ones(same.shape[1:], dtype=torch.bool).tril()
    return mask[:, None], mask.sum(-1) - 1


def learning_rate(progress: float) -> float:
    """Return the rate at ``progress`` (0 to 1): linear warm-up, then a cosine down to a small fraction of the peak."""
    if progress < WARMUP_FRACTION:
        return PEAK_LEARNING_RATE * progress / WARMUP_FRACTION
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - WARMUP_FRACTION) / (1 - WARMUP_FRACTION)))
    return PEAK_LEARNING_RATE * (FINAL_FRACTION + (1 - FINAL_FRACTION) * cosine)


def weighted_loss(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean next-token cross-entropy of ``logits [B, S, V]``, ``ids [B, S]``, ``weights [B, S]``."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, minutes: float, compiled: bool) -> Outcome:
    """Train ``model`` in place for ``minutes`` of wall time, counted from the end of the first step, which compiles."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    gains = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    began, step = time.monotonic(), 0
    recent: list[float] = []
    model.train()
    forward = torch.compile(model) if compiled else model
    for step, (ids, weights, documents) in enumerate(packed_batches(tokenizer, TRAIN_SEED), start=1):
        progress = (time.monotonic() - began) / (60 * minutes)
        if progress >= 1:
            step -= 1
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        mask, positions = document_mask(documents)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = forward(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        loss = weighted_loss(logits, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent = [*recent[-99:], loss.item()]
        if step == 1:
            began = time.monotonic()
        if step % 50 == 0:
            print(f"step {step} loss {sum(recent[-50:]) / 50:.4f} seconds {time.monotonic() - began:.0f}", flush=True)
    model.eval()
    spent = (time.monotonic() - began) / 60
    return Outcome(step, step * BATCH_ROWS * ROW_TOKENS, spent, sum(recent) / len(recent))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str, folder: Path) -> None:
    """Write model, tokenizer, generation defaults and model card as a folder that ``from_pretrained`` reads."""
    # The attribute would otherwise hold a path on the machine that trained the model.
    model.config._name_or_path = ""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=128,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for model, tokenizer and model card")
    parser.add_argument("--minutes", type=float, default=20.0, help="wall time of the training loop")
    parser.add_argument(
        "--no-compile", action="store_true", help="run eagerly; needs no C++ compiler, but takes fewer steps"
    )
    arguments = parser.parse_args()
    torch.manual_seed(TRAIN_SEED)
    tokenizer = train_tokenizer()
    model = build_model(tokenizer)
    outcome = pretrain(model, tokenizer, arguments.minutes, compiled=not arguments.no_compile)
    print(outcome)
    card = model_card(
        command=f"python tools/quickstart_backbone/pretrain.py --output DIR --minutes {arguments.minutes:g}",
        parameters=model.num_parameters(),
        compiled=not arguments.no_compile,
        rows=BATCH_ROWS,
        row_tokens=ROW_TOKENS,
        peak=PEAK_LEARNING_RATE,
        first_weight=FIRST_VIEW_WEIGHT,
        **asdict(outcome),
    )
    save(model, tokenizer, card, arguments.output)


if __name__ == "__main__":
    main()
