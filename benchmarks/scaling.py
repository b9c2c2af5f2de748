"""Measure weak scaling on 1, 2 and 4 ranks of this machine, fit a cost model, and predict up to 64 nodes.

    python benchmarks/scaling.py [--rounds 3] [--output benchmarks/results/scaling.json]

Measured: `ptd train` prefix-tunes a Llama with random weights (8 layers, hidden 512, fp32). Each rank has one thread,
pinned to a core (four ranks share two cores). The backbone is whole on every rank or sharded over all ranks, with few
and many virtual tokens and rows. Figures are medians over rounds, in which the cases take turns. The model
(scaling_model.py) is fitted to all cases; each case is also predicted from the others alone, which shows how far the
model can be trusted.

Predicted: tokens per second of Llama-2-7B's and 70B's shape on 1 to 64 nodes of 8 GPUs, relative to one node, for ptd
with the backbone sharded inside each node, and for data-parallel PEFT with ZeRO-3 over all ranks. The bytes come from
ptd's plan. The constants of such a cluster are assumptions (`ASSUMED`), because no GPU has been measured: the model
carries over, the constants of this machine do not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import matplotlib.pyplot as plt
import torch
from forked_ranks import start
from scaling_model import Cluster, Link, Measurement, Traffic, Work, fit, left_out, predicted, step_seconds
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ptd.commands.train
import ptd.distributed.zero3  # slow imports come before the forks
from ptd.bench.machine import evidence
from ptd.commands.plan import trace_run
from ptd.config import parse_config
from ptd.planner.placement import Machine, Placement, estimate
from ptd.planner.zero3_gathers import Limits
from ptd.quickstart import BACKBONE
from ptd.quickstart.task import write_task
from ptd.runs.metrics_log import read_records

RANKS = (1, 2, 4)
CASES: dict[str, tuple[str, int, int]] = {
    "whole, 20 virtual tokens, 2 rows": ("none", 20, 2),
    "whole, 20 virtual tokens, 8 rows": ("none", 20, 8),
    "whole, 640 virtual tokens, 2 rows": ("none", 640, 2),
    "sharded, 20 virtual tokens, 2 rows": ("world", 20, 2),
    "sharded, 20 virtual tokens, 8 rows": ("world", 20, 8),
}
"""backbone.sharding, virtual tokens, rows per rank and step."""
WARM_UP, STEPS = 4, 8
LENGTH = 128

ASSUMED = {
    "400 Gbit/s a GPU": Cluster(4e14, 0.02, Link(3e-6, 1.5e11), Link(1e-5, 4e11)),
    "200 Gbit/s a node": Cluster(4e14, 0.02, Link(3e-6, 1.5e11), Link(1e-5, 2.5e10)),
}
"""4e14 FLOP/s per GPU (NeMo publishes 402 TFLOP/s for LoRA of an 8B model in bf16 on an H100), and 20 ms per step for
everything else; inside a node (NVLink) 150 GB/s and 3 us; between nodes eight adapters of 400 Gbit/s or one of
200 Gbit/s, and 10 us."""
SHAPES = {
    "Llama-2-7B": (4096, 11008, 32, 32, 32),
    "Llama-2-70B": (8192, 28672, 80, 64, 8),
}
"""hidden, intermediate, layers, heads, key/value heads."""
NODES = (1, 2, 4, 8, 16, 32, 64)
GPUS = 8
BATCHES = {2048: (1, 2048), 16384: (4, 4096)}
"""By tokens per GPU and step: the rows, and the tokens per row."""


def prepare(work: Path) -> None:
    """Write backbone and rows to ``work``."""
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(work / "backbone")
    tokenizer.save_pretrained(work / "backbone")
    write_task(work)


def run_of(work: Path, case: str, output: Path) -> dict[str, Any]:
    sharding, virtual_tokens, rows = CASES[case]
    return {
        "backbone": {"path": str(work / "backbone"), "dtype": "float32", "sharding": sharding},
        "method": {"name": "prefix", "num_virtual_tokens": virtual_tokens},
        "data": {"train": str(work / "train.jsonl"), "max_length": LENGTH},
        "train": {
            "max_steps": WARM_UP + STEPS,
            "per_device_train_batch_size": rows,
            "learning_rate": 1e-3,
            "logging_steps": WARM_UP,
        },
        "output_dir": str(output),
    }


def rank(work: Path, case: str, output: Path, number: int) -> None:
    """Run one rank, pinned to its core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    torch.set_num_threads(1)
    ptd.commands.train.train(parse_config(run_of(work, case, output)))


def measure(work: Path, case: str, ranks: int, place: int) -> dict[str, float]:
    """Return means over the steps after the warm-up: seconds, tokens of all ranks, bytes sent by all ranks."""
    output = work / f"{ranks}-{place}-{list(CASES).index(case)}"
    job = start(ranks, lambda number: rank(work, case, output, number), output.with_suffix(".logs"))
    if any(job.wait(timeout=300)):
        raise SystemExit("\n".join(job.log(number) for number in range(ranks)))
    records = [record for record in read_records(output) if record["step"] > WARM_UP and "loss" in record]
    return {
        "seconds": statistics.mean(record["step_seconds"] for record in records),
        "tokens": sum(record["tokens"] for record in records) / STEPS,
        "network_bytes": statistics.mean(record["network_bytes"] for record in records),
    }


def measured_work(work: Path, case: str, ranks: int, found: dict[str, float]) -> Work:
    """Return the work of a rank: FLOPs from the plan's trace, scaled to the measured tokens, and the counted bytes."""
    config = parse_config(run_of(work, case, work / "unused"))
    trace = trace_run(config, capability=None, local_ranks=ranks, supervised=0.31)
    flops = trace.flops / trace.tokens * found["tokens"] / ranks
    sent = found["network_bytes"] / ranks
    fetches = sum(use.event is not None and use.event.kind == "fetch" for use in trace.timeline)
    gathered = Traffic(fetches) if CASES[case][0] == "world" and ranks > 1 else Traffic()
    return Work(flops, weights=gathered, training=Traffic(3 if ranks > 1 else 0, inside=sent))


def measure_all(rounds: int) -> list[dict[str, Any]]:
    """Measure every case on every number of ranks, in turns, and return the medians over the rounds."""
    seen: dict[tuple[str, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work)
        for place in range(rounds):
            for case in CASES:
                for ranks in RANKS:
                    found = measure(work, case, ranks, place)
                    seen.setdefault((case, ranks), []).append(found)
                    print(f"{case}, {ranks} ranks: {found['seconds']:.3f} s per step", file=sys.stderr)
        results = []
        for (case, ranks), each in seen.items():
            middle = {key: statistics.median(one[key] for one in each) for key in each[0]}
            results.append({"case": case, "ranks": ranks, **middle, "work": measured_work(work, case, ranks, middle)})
    return results


def predictions(shape: str, tokens: int) -> list[dict[str, Any]]:
    """Predict steps of ``tokens`` tokens per GPU, for every cluster, number of nodes and system."""
    rows, sequence = BATCHES[tokens]
    hidden, intermediate, layers, heads, kv_heads = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(
            vocab_size=32000, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=sequence + 64,
            dtype="bfloat16",
        ).save_pretrained(folder)  # fmt: skip
        run = {
            "backbone": {"path": folder, "sharding": "node", "gradient_checkpointing": shape.endswith("70B")},
            "method": {"name": "prefix", "num_virtual_tokens": 30},
            "data": {"train": "unread.jsonl", "max_length": sequence},
            "train": {"per_device_train_batch_size": rows, "max_steps": 1},
        }
        trace = trace_run(parse_config(run), capability=(9, 0), local_ranks=GPUS)
    found = []
    for network, cluster in ASSUMED.items():
        for nodes in NODES:
            machine = Machine(GPUS, nodes, 80 << 30)
            for system in ("ptd", "PEFT"):
                # PEFT gathers its weights over all ranks, including the trained weights.
                placement = Placement(sharding="node", group_size=GPUS)
                if system == "PEFT":
                    placement = Placement(sharding="world", group_size=GPUS * nodes)
                each = estimate(trace, placement, machine, rows=rows, accumulation=1, limits=Limits())
                weights = each.sent_for_weights
                training = Traffic(3, each.sent_inside - weights["inside"], each.sent_between - weights["between"])
                if system == "PEFT":
                    around = 2 * (GPUS * nodes - 1) / (GPUS * nodes) * 2 * trace.trained_numel
                    training = Traffic(2, around, around if nodes > 1 else 0)
                messages = math.ceil(weights["inside"] / (2 * Limits().prefetch_bucket_size))
                work = Work(trace.flops, Traffic(messages, weights["inside"], weights["between"]), training)
                for overlap in (0.0, 1.0):
                    seconds = step_seconds(work, cluster, ranks_per_node=GPUS, nodes=nodes, overlap=overlap)
                    found.append(
                        {
                            "shape": shape, "tokens": tokens, "network": network, "nodes": nodes,
                            "system": system, "overlap": overlap, "seconds": seconds,
                            "tokens_per_second_per_gpu": tokens / seconds,
                            "bytes_between_nodes_per_node": each.sent_between if system == "ptd" else
                            weights["between"] + training.between,
                        }
                    )  # fmt: skip
    for row in found:
        same = ("shape", "tokens", "network", "system", "overlap")
        first = next(one for one in found if one["nodes"] == 1 and all(one[key] == row[key] for key in same))
        row["efficiency"] = first["seconds"] / row["seconds"]
    return found


def plot(rows: list[dict[str, Any]], output: Path) -> None:
    """Plot one panel per shape, batch and network: efficiency over nodes, from no overlap to the full overlap."""
    panels = [(shape, tokens) for shape in SHAPES for tokens in BATCHES]
    figure, axes = plt.subplots(len(ASSUMED), len(panels), figsize=(4.2 * len(panels), 3.4 * len(ASSUMED)), sharey=True)
    for line, network in enumerate(ASSUMED):
        for column, (shape, tokens) in enumerate(panels):
            axis = axes[line][column]
            for system, colour in (("ptd", "tab:blue"), ("PEFT", "tab:orange")):
                series = {
                    overlap: [
                        row["efficiency"] * 100
                        for row in rows
                        if (row["shape"], row["tokens"], row["network"]) == (shape, tokens, network)
                        and (row["system"], row["overlap"]) == (system, overlap)
                    ]
                    for overlap in (0.0, 1.0)
                }
                label = {"ptd": "ptd, sharded in the node", "PEFT": "PEFT with ZeRO-3"}[system]
                axis.fill_between(NODES, series[0.0], series[1.0], color=colour, alpha=0.25)
                axis.plot(NODES, series[1.0], color=colour, marker="o", markersize=3, label=label)
                axis.plot(NODES, series[0.0], color=colour, linestyle=":")
            axis.set_title(f"{shape}, {tokens:,} tokens per GPU,\n{network}", fontsize=9)
            axis.set_xscale("log", base=2)
            axis.set_xticks(NODES, [str(count) for count in NODES])
            axis.set_ylim(0, 105)
            axis.grid(alpha=0.3)
            if line == len(ASSUMED) - 1:
                axis.set_xlabel("nodes of 8 GPUs")
            if column == 0:
                axis.set_ylabel("tokens/s per GPU, % of one node")
    axes[0][0].legend(fontsize=8, loc="lower left")
    figure.suptitle(
        "Predicted, not measured: solid lines with gathers overlapped by computation, dotted without overlap",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    plt.close(figure)


def table(results: list[dict[str, Any]], errors: list[float], cluster: Cluster) -> None:
    print("| case | ranks | s per step | tokens/s | × one rank | model's error | error if predicted from the others |")
    print("|---|---|---|---|---|---|---|")
    rates = {(row["case"], row["ranks"]): row["tokens"] / row["seconds"] for row in results}
    for row, error in zip(results, errors, strict=True):
        rate = rates[row["case"], row["ranks"]]
        ratio = rate / rates[row["case"], 1]
        model = row["model_seconds"] / row["seconds"] - 1
        print(
            f"| {row['case']} | {row['ranks']} | {row['seconds']:.3f} | {rate:.0f} | {ratio:.2f} × | {model:+.0%} | "
            f"{error:+.0%} |"
        )
    print(
        f"\none rank: {cluster.flops_per_second / 1e9:.1f} GFLOP/s and {cluster.fixed * 1e3:.1f} ms per step; "
        f"{cluster.inside.latency * 1e6:.0f} us per hop, {cluster.inside.bytes_per_second / 1e6:.0f} MB/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file; the plot is written next to it")
    args = parser.parse_args()
    results = measure_all(args.rounds)
    cores = len(os.sched_getaffinity(0))
    measurements = [Measurement(row["case"], row.pop("work"), row["ranks"], cores, row["seconds"]) for row in results]
    cluster = fit(measurements)
    errors = left_out(measurements)
    for row, each, error in zip(results, measurements, errors, strict=True):
        row |= {"flops": each.work.flops, "model_seconds": predicted(each, cluster), "left_out_error": error}
    table(results, errors, cluster)
    future = [row for shape in SHAPES for tokens in BATCHES for row in predictions(shape, tokens)]
    print(
        "\n| shape | tokens per GPU | network | nodes | ptd, % of one node | PEFT with ZeRO-3, % | "
        "ptd : PEFT, tokens/s |"
    )
    print("|---|---|---|---|---|---|---|")
    for first in future:
        if first["system"] == "ptd" and first["overlap"] == 0.0 and first["nodes"] in (8, 64):
            keys = ("shape", "tokens", "network", "nodes")
            four = {(r["system"], r["overlap"]): r for r in future if all(r[k] == first[k] for k in keys)}
            shown = [
                " – ".join(f"{four[system, overlap]['efficiency']:.0%}" for overlap in (0.0, 1.0))
                for system in ("ptd", "PEFT")
            ]
            ratios = " – ".join(
                f"{four['PEFT', overlap]['seconds'] / four['ptd', overlap]['seconds']:.2f}" for overlap in (1.0, 0.0)
            )
            print(f"| {' | '.join(str(first[key]) for key in keys)} | {' | '.join(shown)} | {ratios} |")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        content = {**evidence(), "rounds": args.rounds, "measured": results, "predicted": future}
        args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        plot(future, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
