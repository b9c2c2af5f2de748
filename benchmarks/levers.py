"""Measure each lever of ptd's step, alone and as the only one missing, on the same batches in one process.

    python benchmarks/levers.py [--lengths e2e instructions] [--dtype float32] [--steps 12] [--rows 8] [--threads 1]
        [--output F]
    python benchmarks/levers.py --quick                   # a tiny backbone and two steps, to test the script

The backbone is that of throughput.py: a Llama of 8 layers, hidden 512, 8 query and 4 key/value heads, vocabulary
32,000, random weights. P = 30 virtual tokens are trained directly, with 8 packed rows per step. Rows have the lengths
of E2E or of instruction data, and 45 % of the tokens are supervised, as in throughput.py. The settings take turns on
every batch. With one thread, times are CPU time, which other work on the machine disturbs less. The losses with a lever
are compared with those of the plain step, to check that both do the same work. On a GPU there are four layers of
Llama-3-8B's shape, times are wall time, and Liger's kernels take the place of torch.compile. OUTPUT has a row for each
setting, for one kind of lengths after the other (rows.py). If a setting fails, its row records that, and the others
continue.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from typing import Any

import numpy as np
import torch
from rows import Rows, Skip, add_arguments, free_memory
from throughput import LENGTHS, MODEL, SUPERVISED
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ptd.backbone.liger import use_liger
from ptd.backbone.shared_input import share_inputs
from ptd.data import Batches
from ptd.distributed.network_meter import NetworkMeter
from ptd.distributed.ranks import Ranks
from ptd.engine.bucket_padding import pays
from ptd.engine.forward import Forward
from ptd.engine.host_memory import keep_freed_memory
from ptd.engine.prompt_step import PromptStep, StepSums, Trained, build_optimizer, finish_step
from ptd.inject import Attachment, compile_layers
from ptd.methods.prefix import PrefixEncoder
from ptd.readouts.language_model import LanguageModel
from ptd.types import DataReport, Examples

P = 30
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
LLAMA_3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
LEVERS = {
    "tail": "the last layer's MLP and output projection at supervised positions only",
    "loss": "cross-entropy and its gradient in the memory of the logits, in blocks",
    "compile": "torch.compile of each layer (backbone.compile)",
}
if not ON_GPU:
    LEVERS["joined"] = "attention with the prefix copied before each sequence's keys (backbone.attention), not merged"
else:
    LEVERS["liger"] = "Liger's kernels for RMSNorm with its residual, RoPE and SwiGLU (backbone.liger), not compiled"
    LEVERS["shared"] = "one gradient for linear layers with the same input, which a run has together with Liger"
ALL = tuple(lever for lever in LEVERS if not (ON_GPU and lever == "compile"))
"""On a GPU, what a run does by default; on a CPU, all levers."""
SETTINGS: dict[str, tuple[str, ...]] = {
    "none": (),
    **{lever: (lever,) for lever in LEVERS},
    **{f"all but {lever}": tuple(name for name in ALL if name != lever) for lever in ALL},
    "all": ALL,
    **({"all, compile for liger": ("tail", "loss", "compile")} if ON_GPU else {}),
}
WARM_UP = 3
"""Warm-up steps: the first compiles, the others warm caches and allocators."""


def llama(dtype: torch.dtype, quick: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {**MODEL, **LLAMA_3_8B, "num_hidden_layers": 4, "head_dim": 128} if ON_GPU else MODEL
    if quick:
        shape = {**MODEL, "num_hidden_layers": 2}
    config = AutoConfig.for_model("llama", **shape, use_cache=False)
    with DEVICE:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def examples_of(kind: str, rows: int) -> Examples:
    draw = np.random.default_rng(0)
    lengths = LENGTHS[kind](draw, rows)
    completions = (SUPERVISED * lengths).round().astype(int)
    parts = zip(lengths - completions, completions, strict=True)
    supervised = np.concatenate([np.repeat([False, True], pair) for pair in parts])
    tokens = draw.integers(0, MODEL["vocab_size"], len(supervised)).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Examples.of_text(tokens, supervised, offsets, DataReport(rows, len(tokens), int(supervised.sum())))


class Step:
    """ptd's engine in one process, with some of the levers."""

    def __init__(
        self, examples: Examples, rows: int, dtype: torch.dtype, levers: tuple[str, ...], quick: bool = False
    ) -> None:
        self.batches = Batches(examples, rank=0, world_size=1, per_device_batch_size=rows)
        model = llama(dtype, quick)
        backend = "auto" if ON_GPU or "joined" in levers else "merge"
        if "liger" in levers:
            use_liger(model)
        if "shared" in levers:
            share_inputs(model)
        self.attachment = Attachment(model, backend=backend)
        if "tail" not in levers:
            self.attachment.stacks[-1].tail.modules.clear()
            self.attachment.stacks[-1].tail.begin = lambda tokens, kept: None  # type: ignore[method-assign]
        if "loss" not in levers:
            self.attachment.head.module = None
        if "compile" in levers:
            compile_layers(self.attachment.model)
        self.run = Forward(self.attachment, DEVICE, rounds=pays(DEVICE, dtype))
        torch.manual_seed(0)
        trained = Trained(PrefixEncoder(self.attachment.shape.layers, P), LanguageModel()).to(DEVICE)
        optimizer = build_optimizer(trained, learning_rate=1e-3, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.01)
        ranks = Ranks(0, 1, 1, DEVICE)
        self.step = PromptStep(trained, optimizer, ranks, NetworkMeter(ranks), max_grad_norm=1.0)

    def __call__(self, number: int) -> float:
        self.attachment.set(self.step.encode())
        (batch,) = self.batches.step(number)
        reading = self.step.readout(self.run, batch)
        reading.loss.backward()
        sums = StepSums.zero(DEVICE)
        sums.add(reading, batch)
        return finish_step([self.step], [sums])[0].read().loss


def measure(args: argparse.Namespace, kind: str, dtype: torch.dtype, clock: Any, rows: Rows) -> None:
    """Add a row for each setting that has none yet, measured in turns with the plain step, the reference of all."""
    named = {name: levers for name, levers in SETTINGS.items() if not rows.has(lengths=kind, levers=name)}
    if importlib.util.find_spec("liger_kernel") is None:
        for name in [name for name, levers in named.items() if "liger" in levers]:
            rows.failed(Skip("liger-kernel is not installed"), lengths=kind, levers=name)
            del named[name]
    if not named:
        return
    named = {"none": (), **named}
    warm_up, total = args.warm_up, args.steps + args.warm_up
    examples = examples_of(kind, args.rows * total)
    runs: dict[str, Step] = {}
    seconds: dict[str, list[float]] = {name: [] for name in named}
    losses: dict[str, list[float]] = {name: [] for name in named}
    for number in range(total):
        for name, levers in list(named.items()):
            (rows.mark if number else rows.begin)(lengths=kind, levers=name)
            try:
                if not number:
                    runs[name] = Step(examples, args.rows, dtype, levers, args.quick)
                began = clock()
                losses[name].append(runs[name](number))
                seconds[name].append(clock() - began)
            except Exception as error:
                del named[name]
                runs.pop(name, None)
                rows.failed(error, lengths=kind, levers=name)
                if name == "none":
                    raise SystemExit(f"{kind}: the plain step failed, so nothing can be compared with it") from None
    plain, batches = seconds["none"], runs["none"].batches
    tokens = [int(examples.lengths(np.array(batches.rows(number))).sum()) for number in range(total)]
    cells = []
    for name in named:
        spent = seconds[name][warm_up:]
        ratios = [before / own for before, own in zip(plain[warm_up:], spent, strict=True)]
        difference = max(abs(a - b) / b for a, b in zip(losses[name], losses["none"], strict=True))
        cells.append(
            {
                "lengths": kind,
                "levers": name,
                "tokens_per_second": statistics.median(n / s for n, s in zip(tokens[warm_up:], spent, strict=True)),
                "against_none": statistics.median(ratios),
                "quartiles": statistics.quantiles(ratios, n=4)[::2],
                "first_step_seconds": seconds[name][0],
                "loss_difference": difference,
            }
        )
    rows.add(*(cell for cell in cells if not rows.has(lengths=kind, levers=cell["levers"])))
    runs.clear()
    free_memory()


def table(cells: list[dict[str, Any]]) -> str:
    lines = [
        "| lengths | levers | tokens/s | × none (quartiles) | first step, s | loss differs by |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells:
        if cell["outcome"] != "measured":
            lines.append(f"| {cell['lengths']} | {cell['levers']} | {cell['outcome']}: {cell['reason']} | | | |")
            continue
        low, high = cell["quartiles"]
        lines.append(
            f"| {cell['lengths']} | {cell['levers']} | {cell['tokens_per_second']:,.0f} | {cell['against_none']:.3f} "
            f"({low:.3f}, {high:.3f}) | {cell['first_step_seconds']:.1f} | {cell['loss_difference']:.0e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tiny backbone and two steps, to test the script")
    add_arguments(parser)
    arguments = parser.parse_args()
    arguments.warm_up = WARM_UP
    if arguments.quick:
        arguments.lengths, arguments.steps, arguments.rows, arguments.warm_up = arguments.lengths[:1], 2, 2, 1
    torch.set_num_threads(arguments.threads)
    if not ON_GPU:
        keep_freed_memory()  # as a run does
    alone = arguments.threads == 1 and not ON_GPU
    clock = time.process_time if alone else time.perf_counter
    settings = {name: getattr(arguments, name) for name in ("dtype", "threads", "steps", "rows", "quick")}
    settings["clock"] = "CPU time of the process" if alone else "wall time"
    rows = Rows(
        arguments.output, ("lengths", "levers"), program="levers", sources=("benchmarks/throughput.py",),
        settings=settings, about={"levers": LEVERS, "load": os.getloadavg()[0]}, replace=arguments.replace,
        minutes=arguments.minutes,
    )  # fmt: skip
    for kind in arguments.lengths:
        measure(arguments, kind, getattr(torch, arguments.dtype), clock, rows)
    print(table(rows.records))
    rows.close()


if __name__ == "__main__":
    main()
