"""Measure many prompts over one backbone at once: ``python benchmarks/many.py generation MODEL``.

``generation``: tokens per second of batches whose rows read five prefixes and none, against the same batches with one
prefix for all rows. Both run in turn in one process, so that a change of the machine's speed affects both. The prompts
have random values, and every row writes the same number of tokens. Prints one JSON object per kind of batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ptd.backbone import TextConditioner
from ptd.config import backbone_config
from ptd.distributed.ranks import Ranks
from ptd.engine.setup import Prepared, prepare
from ptd.types import NO_MEMBER, PrefixKV, PrefixLayout, Prompts, PromptState
from ptd.versions import versions

ADAPTERS = 5


def prefixes(prepared: Prepared, count: int) -> list[PromptState]:
    """Return prefixes that are the keys and values of random tokens, so that texts stay ordinary."""
    generator = torch.Generator().manual_seed(0)
    conditioner = TextConditioner(prepared.attachment, None, None, seed=0)
    made: list[PromptState] = []
    for _ in range(ADAPTERS):
        tokens = torch.randint(5, prepared.shape.vocab_size, (count,), generator=generator).tolist()
        flat = conditioner.keys_and_values([tokens])
        made.append(PrefixLayout(prepared.shape.layers).state(flat.to(prepared.model.device)))
    assert all(isinstance(each, PrefixKV) for each in made)
    return made


def batch(prepared: Prepared, rows: int) -> dict[str, torch.Tensor]:
    """Return prompts of 12 to 42 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.linspace(12, 42, rows).long()
    ids = torch.randint(5, prepared.shape.vocab_size, (rows, 42), generator=generator)
    mask = (torch.arange(42) >= 42 - lengths[:, None]).long()
    device = prepared.model.device
    return prepared.attachment.generation_inputs((ids * mask).to(device), mask.to(device))


@torch.no_grad()
def seconds(prepared: Prepared, inputs: Any, new: int, members: Sequence[int] | None) -> tuple[float, float]:
    """Return the seconds of one batch, and the processor seconds of this process."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    with prepared.attachment.reading(members):
        out = prepared.model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    out.cpu()
    return time.perf_counter() - begin, time.process_time() - begin_cpu


def generation(asked: argparse.Namespace) -> dict[str, Any]:
    """Return the median speeds of both ways, and the median, smallest and largest ratio of neighbouring batches."""
    ranks = Ranks.start()
    prepared = prepare(backbone_config({"path": asked.model, "dtype": asked.dtype}), ranks)
    inputs = batch(prepared, asked.rows)
    states = prefixes(prepared, asked.virtual_tokens)
    order = sorted((*range(ADAPTERS), NO_MEMBER)[row % (ADAPTERS + 1)] for row in range(asked.rows))
    ways: dict[str, tuple[Any, Sequence[int] | None]] = {
        "single": (states[0], None),
        "mixed": (Prompts(tuple(states)), order),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for time_of in range(asked.times + 1):
        for name, (state, members) in ways.items():
            prepared.attachment.set(state)
            spent = seconds(prepared, inputs, asked.new_tokens, members)
            if time_of:  # the first of each is a warm-up
                found[name].append(spent)
    tokens = asked.rows * asked.new_tokens
    speeds = {name: tokens / statistics.median(spent for spent, _ in each) for name, each in found.items()}
    ratios: dict[str, Any] = {}
    for place, clock in enumerate(("wall", "cpu")):
        pairs = [mixed[place] / single[place] for single, mixed in zip(found["single"], found["mixed"], strict=True)]
        ratios[clock] = [round(each, 3) for each in (statistics.median(pairs), min(pairs), max(pairs))]
    return {
        "part": "generation",
        "model": Path(asked.model).name,
        "rows": asked.rows,
        "new_tokens": asked.new_tokens,
        "virtual_tokens": asked.virtual_tokens,
        "tokens_per_second": {name: round(speed, 1) for name, speed in speeds.items()},
        "time_mixed_over_single": ratios,
    }


PARTS = {"generation": generation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("model", help="folder of a language model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--virtual-tokens", type=int, default=32)
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    result = PARTS[asked.part](asked)
    print(json.dumps(result))
    if asked.output is not None:
        asked.output.write_text(json.dumps({**result, "versions": versions()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
