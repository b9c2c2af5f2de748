"""Useful tokens a second of prefix-tuning: ptd against PEFT with a plain loop, on the same batches, in one process.

    python benchmarks/vs_peft_cpu.py [--repeats 15] [--threads 2] [--output benchmarks/results/vs_peft_cpu.json]

A tiny Llama (8 layers, hidden 512, 8 query and 4 key/value heads, vocabulary 32,000, random weights, fp32), P = 30
virtual tokens trained directly, batches of 8 rows with the lengths of the E2E data set (80 ± 20 tokens, 37 % of them
supervised; 24 % of a padded batch is padding). PEFT runs as its users run it: padded batch, attention mask, SDPA,
labels of −100, AdamW. ptd runs its own engine: packed batch, supervised positions only, reduction at the prompt. Each
repetition times one optimizer step of each on the same rows, in turns; useful tokens are those of the rows, without
padding. Before timing, one step's loss and prefix gradient of both sides are compared: both do the same work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ptd.data import Batches
from ptd.engine.forward import Forward
from ptd.engine.meter import NetworkMeter
from ptd.engine.prompt_step import PromptStep, Trained, build_optimizer
from ptd.engine.ranks import Ranks
from ptd.inject import Attachment
from ptd.methods.prefix import PrefixEncoder
from ptd.readouts.language_model import LanguageModel
from ptd.types import DataReport, Examples
from ptd.versions import versions

P, ROWS, VOCABULARY = 30, 8, 32_000
CPU = torch.device("cpu")


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def e2e_like(rows: int, seed: int = 0) -> Examples:
    """Rows with the lengths of E2E's development set under a 32k byte-level BPE (4,672 rows, measured).

    Prompts 50.7 ± 12.7 tokens, supervised completions 29.4 ± 8.9, correlation 0.67.
    """
    random = np.random.default_rng(seed)
    covariance = 0.67 * 12.7 * 8.9
    drawn = random.multivariate_normal([50.7, 29.4], [[12.7**2, covariance], [covariance, 8.9**2]], rows)
    prompts, completions = np.clip(drawn.round(), [15, 8], [70, 60]).astype(int).T
    supervised = np.concatenate(
        [np.repeat([False, True], lengths) for lengths in zip(prompts, completions, strict=True)]
    )
    tokens = random.integers(0, VOCABULARY, len(supervised)).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(prompts + completions)])
    return Examples.of_text(tokens, supervised, offsets, DataReport(rows, len(tokens), int(supervised.sum())))


class Peft:
    """PEFT and a plain training loop."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
        self.model = get_peft_model(tiny_llama(), config)
        self.prompt = self.model.prompt_encoder["default"].embedding.weight
        self.optimizer = torch.optim.AdamW([self.prompt], lr=1e-3)

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        width = int(self.examples.lengths[rows].max())
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full((len(rows), width), -100)
        for index, row in enumerate(rows):
            tokens, next_tokens = (torch.from_numpy(np.array(values)) for values in self.examples[row])
            ids[index, : len(tokens)], mask[index, : len(tokens)] = tokens.long(), 1
            labels[index, 1 : len(tokens)] = next_tokens[:-1].long()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def loss(self, rows: list[int]) -> Tensor:
        return self.model(**self.batch(rows)).loss

    def step(self, rows: list[int]) -> float:
        loss = self.loss(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([self.prompt], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Ptd:
    """ptd's engine on one process."""

    def __init__(self, examples: Examples, prompt: Tensor) -> None:
        self.batches = Batches(examples, rank=0, world_size=1, per_device_batch_size=ROWS)
        self.model = tiny_llama()
        self.attachment = Attachment(self.model)
        self.run = Forward(self.model, self.attachment, CPU)
        encoder = PrefixEncoder(self.attachment.shape.layers, P)
        with torch.no_grad():
            encoder.embedding.copy_(prompt)
        trained = Trained(encoder, LanguageModel())
        optimizer = build_optimizer(trained, learning_rate=1e-3, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.01)
        ranks = Ranks(0, 1, 1, CPU)
        self.prompt_step = PromptStep(trained, optimizer, ranks, NetworkMeter(ranks), max_grad_norm=1.0)

    def loss(self, step: int) -> Tensor:
        self.attachment.set(self.prompt_step.encode())
        (batch,) = self.batches.step(step)
        return self.prompt_step.readout(self.run, batch).loss / batch.supervised_tokens

    def step(self, step: int) -> float:
        self.attachment.set(self.prompt_step.encode())
        (batch,) = self.batches.step(step)
        reading = self.prompt_step.readout(self.run, batch)
        reading.loss.backward()
        return self.prompt_step.finish(reading.loss, reading.weight, batch.tokens, batch.supervised_tokens).loss


def assert_same_work(peer: Peft, mine: Ptd) -> dict[str, float]:
    """Relative difference of loss and prefix gradient on the first batch."""
    theirs = peer.loss(mine.batches.rows(0))
    (their_gradient,) = torch.autograd.grad(theirs, peer.prompt)
    ours = mine.loss(0)
    ours.backward()
    our_gradient = mine.prompt_step._leaf_gradient()
    difference = {
        "loss": abs(float(ours.detach() - theirs.detach())) / float(theirs.detach()),
        "gradient": float((our_gradient - their_gradient).norm() / their_gradient.norm()),
    }
    assert max(difference.values()) < 1e-5, difference
    return difference


def measure(repeats: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    examples = e2e_like(ROWS * (repeats + 3))
    theirs = Peft(examples)
    ours = Ptd(examples, theirs.prompt.detach())
    same = assert_same_work(theirs, ours)
    steps = {"peft": lambda step: theirs.step(ours.batches.rows(step)), "ptd": ours.step}
    rates: dict[str, list[float]] = {"peft": [], "ptd": []}
    for step in range(repeats + 2):
        useful = int(examples.lengths[ours.batches.rows(step)].sum())
        timed = {}
        for name, run in steps.items():
            began = time.perf_counter()
            run(step)
            timed[name] = useful / (time.perf_counter() - began)
        if step >= 2:  # the first two warm caches and allocators
            for name, rate in timed.items():
                rates[name].append(rate)
    ratios = [mine / peer for mine, peer in zip(rates["ptd"], rates["peft"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "useful_tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": {"median": statistics.median(ratios), "quartiles": [quartiles[0], quartiles[2]]},
        "relative_difference": same,
        "repeats": repeats,
        "threads": threads,
    }


def evidence() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line for line in cpus if line.startswith("model name")), ":").split(":")[1].strip()
    return {
        "date": date.today().isoformat(),
        "commit": commit,
        "hardware": f"{os.cpu_count()} × {model or platform.processor()}",
        "versions": {**versions(), "peft": peft.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = {**measure(arguments.repeats, arguments.threads), **evidence()}
    print(json.dumps(result, indent=2))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
