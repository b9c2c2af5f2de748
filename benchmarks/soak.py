"""Compare a run on two ranks that is killed again and again with the same run without kills.

    python benchmarks/soak.py [--kills 200] [--steps-per-kill 12] [--seed 0] [--output benchmarks/results/soak.json]

A tiny Llama with random weights is prefix-tuned through an MLP that is split over two gloo ranks, with a checkpoint
every 3 steps and an evaluation every 25. SIGKILL hits a random rank at a random time: one kill in eight comes while the
ranks start, the others a random time after the first step, so that the kills spread over the whole run, including saves
and evaluations. The same command then continues the run. At the end, every record and the adapter must equal those of
the run without kills, bit for bit, and no kill may leave a checkpoint that a later start has to pass over.

All ranks are forked from this process (forked_ranks.py): they are real processes, but their start needs no imports. The
exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import matplotlib.pyplot  # noqa: F401
import torch
import yaml
from forked_ranks import Job, start
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ptd.bench.machine import evidence
from ptd.cli import main as ptd_main
from ptd.runs.metrics_log import read_records

ROOT = Path(__file__).parents[1]
RANKS, SAVE_STEPS, EVAL_STEPS = 2, 3, 25
IN_START = 1 / 8
TIMING = {"tokens_per_second", "step_seconds", "phase_seconds", "peak_memory_bytes"}
TIMING |= {"slowest_rank", "slowest_rank_seconds", "mean_rank_seconds"}
"""Fields of a record that differ between any two runs."""


def prepare(folder: Path, steps: int) -> Path:
    """Write backbone, rows and run file, and return the path of the run file."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "ptd" / "quickstart" / "backbone")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    draw = random.Random(0)
    for name, rows in (("train", 60), ("eval", 6)):
        content = [
            {"prompt": f"{draw.randrange(99)} and {draw.randrange(99)}: ", "completion": "so " * draw.randrange(1, 9)}
            for _ in range(rows)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    settings = {
        "backbone": {"path": str(folder / "backbone")},
        "method": {"name": "prefix", "num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 64},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "max_length": 64},
        "train": {
            "max_steps": steps,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.003,
            "save_steps": SAVE_STEPS,
            "eval_steps": EVAL_STEPS,
            "logging_steps": 1,
        },
    }
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return run_file


def begin(run_file: Path, output: Path, logs: Path) -> Job:
    """Start ``ptd train`` on all ranks."""

    def work(rank: int) -> None:
        # Without --retry, a run that was killed this often would wait for a person.
        sys.argv = ["ptd", "train", "--retry", str(run_file), f"output_dir={output}"]
        ptd_main()

    return start(RANKS, work, logs)


def steps_done(job: Job) -> int:
    """Return the last step that this start has finished; 0 before the first."""
    return max(map(int, re.findall(r"^train (\d+)/", job.log(0), re.MULTILINE)), default=0)


def sleep_until(job: Job, deadline: float) -> None:
    while time.monotonic() < deadline and not job.poll():
        time.sleep(0.001)


def one_kill(job: Job, draw: random.Random, start_seconds: float, reach_seconds: float) -> dict[str, Any] | None:
    """Kill one rank of ``job`` at a random time, and return what was hit; None if that rank had exited by then."""
    began = time.monotonic()
    in_start = draw.random() < IN_START
    delay, victim = draw.random(), draw.randrange(RANKS)
    if in_start:
        sleep_until(job, began + delay * start_seconds)
    else:
        while not steps_done(job) and not job.poll():
            time.sleep(0.005)
        sleep_until(job, time.monotonic() + delay * reach_seconds)
    if job.poll():
        return None
    job.kill(signal.SIGKILL, victim)
    codes = job.wait(grace=0.5)
    if codes[victim] == 0:
        return None
    return {"rank": victim, "step": steps_done(job), "seconds": time.monotonic() - began}


def is_finished(output: Path) -> bool:
    run = output / "run.json"
    return run.exists() and json.loads(run.read_text(encoding="utf-8"))["status"] == "finished"


def left_alone(run_file: Path, folder: Path) -> tuple[float, float]:
    """Run without kills; return the seconds until the first step, and the seconds per step."""
    began = time.monotonic()
    job = begin(run_file, folder / "whole", folder / "logs" / "whole")
    while not steps_done(job) and not job.poll():
        time.sleep(0.005)
    first = time.monotonic() - began
    codes = job.wait(timeout=3600)
    if any(codes):
        raise RuntimeError(f"the run without kills failed with exit codes {codes}:\n{job.log(0)[-4000:]}")
    seconds = [record["step_seconds"] for record in read_records(folder / "whole") if "loss" in record]
    return first, max(statistics.median(seconds), (time.monotonic() - began - first) / len(seconds))


def soak(run_file: Path, folder: Path, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """Kill and continue the run until it is finished; return statistics of the kills."""
    first, step_seconds = left_alone(run_file, folder)
    print(f"without kills: first step after {first:.1f} s, {1000 * step_seconds:.0f} ms per step", flush=True)
    draw, killed, reached = random.Random(seed), [], 0
    seen: collections.Counter[str] = collections.Counter()
    checkpoints = folder / "soaked" / "checkpoints"
    began, finished = time.monotonic(), False
    while not finished:
        job = begin(run_file, folder / "soaked", folder / "logs" / f"{len(killed):04d}")
        hit = None
        if len(killed) < kills:
            # The mean delay is a fifth below an even spread, so that the last kill comes before the run finishes.
            reach = min(1.6 / (kills - len(killed)), 0.6) * (steps - reached) * step_seconds
            hit = one_kill(job, draw, first, reach)
        codes = job.wait(timeout=3600)
        finished = is_finished(folder / "soaked")
        if hit is not None:
            killed.append(hit)
            reached = max(reached, hit["step"])
            seen["while training" if hit["step"] else "during the start"] += 1
            seen["with a checkpoint half written"] += any(checkpoints.glob(".writing-*"))
            print(f"kill {len(killed)}/{kills}: rank {hit['rank']} at step {hit['step'] or 'start'}", flush=True)
        elif not finished:
            raise RuntimeError(f"a start without a kill failed with exit codes {codes}:\n{job.log(0)[-4000:]}")
        seen["checkpoints passed over"] += job.log(0).count("passed over")
    return {
        "kills": len(killed),
        "steps": steps,
        "kills_seen": dict(seen),
        "kills_by_rank": [sum(hit["rank"] == rank for hit in killed) for rank in range(RANKS)],
        "seconds_per_restart": round(statistics.median(hit["seconds"] for hit in killed), 2) if killed else None,
        "seconds": round(time.monotonic() - began, 1),
    }


def differences(whole: Path, soaked: Path) -> list[str]:
    """Return the differences between the two runs, apart from timing."""
    sides = [read_records(folder) for folder in (whole, soaked)]
    found = [
        f"step {one['step']}, {key}: {one.get(key)} without kills, {other.get(key)} with kills"
        for one, other in zip(*sides, strict=False)
        for key in sorted((one.keys() | other.keys()) - TIMING)
        if one.get(key) != other.get(key)
    ]
    if len(sides[0]) != len(sides[1]):
        found.append(f"{len(sides[0])} records without kills, {len(sides[1])} with kills")
    for name in ("adapter", "best"):
        file = Path(name) / "adapter_model.safetensors"
        if (whole / file).read_bytes() != (soaked / file).read_bytes():
            found.append(f"{file} differs")
    leftover = sorted(path.name for path in (soaked / "checkpoints").glob(".*"))
    return found + [f"left over: {name}" for name in leftover]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps-per-kill", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the folder with runs and logs, and print its path")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "soak.json")
    arguments = parser.parse_args()
    steps = arguments.steps_per_kill * arguments.kills
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        run_file = prepare(folder, steps)
        result = soak(run_file, folder, arguments.kills, steps, arguments.seed)
        found = differences(folder / "whole", folder / "soaked")
    finally:
        if arguments.keep:
            print(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if result["kills"] < arguments.kills:
        found.append(f"the run finished after only {result['kills']} kills")
    if result["kills_seen"].get("checkpoints passed over"):
        found.append("a checkpoint was damaged by a kill")
    result = {**result, "differences": len(found), "first_differences": found[:20], **evidence()}
    result["hardware"] += f", {RANKS} ranks × 1 thread, gloo"
    print(json.dumps(result, indent=2))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
