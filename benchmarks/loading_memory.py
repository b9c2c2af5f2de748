"""Measure peak host memory and seconds of loading a sharded backbone: ptd against transformers under zero.Init.

    python benchmarks/loading_memory.py [--ranks 4] [--output benchmarks/results/loading_memory.json]
    python benchmarks/loading_memory.py --whole [--ranks 2] [--output benchmarks/results/loading_whole.json]

A random Llama of 0.94 B parameters in bfloat16 (1.9 GB in files of 600 MB) is written to a temporary folder. All ranks
load it, sharded over all of them: with ptd, and with transformers under DeepSpeed's zero.Init, in separate processes.
Memory is the increase of the process's own memory (anonymous and shared pages) during loading. The pages of mapped
files belong to the page cache, from which the kernel reclaims them when needed; they are reported separately.

With ``--whole``, every rank loads a whole backbone (four layers of a 7B, 2.1 GB) onto its device, in the checkpoint's
dtype and in others. ``meta`` represents the device: a weight is read and converted on the host, as on the way to a GPU,
and is then freed on the host.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, core_model_loading
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from ptd.backbone import load_model
from ptd.bench.machine import evidence
from ptd.config import BackboneConfig
from ptd.distributed.ranks import Ranks
from ptd.distributed.zero3 import Shards

WAYS = ("ptd", "transformers")
WHOLE = ("auto", "float16", "float32")
"""The dtypes in which ``--whole`` loads the checkpoint: its own dtype, and others."""
ALLOWED = 300e6
"""Bytes that a rank may use in addition to its shard and the largest weight."""


def save_backbone(folder: str, *, large_layers: bool) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 16, "num_attention_heads": 16}
    if large_layers:
        sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4, "num_attention_heads": 32}
    torch.set_default_dtype(torch.bfloat16)
    with no_init_weights():
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, tie_word_embeddings=False, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="600MB")


def memory() -> tuple[int, int]:
    """Return the process's own bytes, and those of mapped files."""
    found = {"RssAnon": 0, "RssShmem": 0, "RssFile": 0}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) * 1024
    return found["RssAnon"] + found["RssShmem"], found["RssFile"]


@contextmanager
def peaks() -> Iterator[list[int]]:
    """Yield the peaks of `memory` above its value at the start, sampled every two milliseconds."""
    start, found, done = memory(), [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            found[:] = [max(old, now - begin) for old, now, begin in zip(found, memory(), start, strict=True)]

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def load(way: str, folder: str) -> None:
    """Load the sharded backbone on this rank; rank 0 prints the highest figures of all ranks."""
    torch.set_num_threads(1)
    ranks = Ranks.start(needs_group=True)
    zero3 = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
    }
    shards = Shards(zero3, None)  # also imports and sets up DeepSpeed, which is not part of the measurement
    began = time.perf_counter()
    with peaks() as peak:
        if way == "ptd":
            with shards.receiving():
                model = load_model(BackboneConfig(path=folder), device=ranks.device, sharded=True)
            shards.run(model)
        else:
            alive = HfDeepSpeedConfig(zero3)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            del alive
    seconds = time.perf_counter() - began
    sizes = [(p.ds_tensor.numel(), p.ds_numel, p.ds_tensor.element_size()) for p in model.parameters()]
    own = {
        "peak_bytes": peak[0],
        "mapped_file_bytes": peak[1],
        "seconds": seconds,
        "shard_bytes": sum(shard * width for shard, _, width in sizes),
        "largest_weight_bytes": max(whole * width for _, whole, width in sizes),
        "backbone_bytes": sum(whole * width for _, whole, width in sizes),
    }
    found: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(found, own)
    if ranks.is_main:
        worst = {key: max(one[key] for one in found) for key in own}
        worst["peak_bytes_by_rank"] = [one["peak_bytes"] for one in found]
        print("RESULT " + json.dumps(worst), flush=True)
    ranks.stop()


def load_whole(dtype: str, folder: str) -> None:
    """Load the whole backbone onto a device on this rank; rank 0 prints the highest figures of all ranks."""
    torch.set_num_threads(1)
    read = core_model_loading._materialize_copy

    def read_on_the_host(tensor: Any, device: Any = None, dtype: Any = None) -> torch.Tensor:
        weight = read(tensor, None, dtype)
        return weight if device is None else weight.to(device)

    core_model_loading._materialize_copy = read_on_the_host
    ranks = Ranks.start(needs_group=True)
    began = time.perf_counter()
    with peaks() as peak:
        model = load_model(BackboneConfig(path=folder, dtype=dtype), device=torch.device("meta"))
    sizes = [parameter.nbytes for parameter in model.parameters()]
    own = {
        "peak_bytes": peak[0],
        "mapped_file_bytes": peak[1],
        "seconds": time.perf_counter() - began,
        "largest_weight_bytes": max(sizes),
        "backbone_bytes": sum(sizes),
    }
    found = ranks.gather(own)
    if ranks.is_main:
        print("RESULT " + json.dumps({key: max(one[key] for one in found) for key in own}), flush=True)
    ranks.stop()


def launch(way: str, folder: str, ranks: int) -> dict[str, Any]:
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *rendezvous]
    done = subprocess.run(
        [*command, __file__, "--way", way, "--folder", folder],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(lines[-1].removeprefix("RESULT ")))


def bound(ours: dict[str, Any]) -> dict[str, Any]:
    """Return the bytes that a rank may use to load its shard, and whether the measured peak is within that bound."""
    allowed = int(ours["shard_bytes"] + ours["largest_weight_bytes"] + ALLOWED)
    return {"bound_bytes": allowed, "within_bound": ours["peak_bytes"] <= allowed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--whole", action="store_true", help="load the whole backbone onto a device, instead of shards")
    parser.add_argument("--way", choices=(*WAYS, *WHOLE), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        (load_whole if args.way in WHOLE else load)(args.way, args.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_backbone(folder, large_layers=args.whole)
        results = {way: launch(way, folder, args.ranks) for way in (WHOLE if args.whole else WAYS)}
    report = {"ranks": args.ranks, **({} if args.whole else bound(results["ptd"])), **results, **evidence()}
    print(json.dumps(report, indent=2))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
