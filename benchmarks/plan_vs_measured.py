"""Compare the peak memory of a training step that ``ptd plan`` predicts with the measured peak.

    python benchmarks/plan_vs_measured.py --output benchmarks/results/plan_vs_measured.json
    python benchmarks/plan_vs_measured.py --quick                               # a tiny model, to test the script

Each case is a Llama with random weights, written to a temporary folder, and the fullest micro-batch of its run file.
The third optimizer step is measured (DeepSpeed knows the order of the modules from then on). With a GPU, the figure is
``torch.cuda.max_memory_allocated``. Without one, it is the peak of resident memory in that step (VmHWM, reset before
the step through /proc/self/clear_refs) minus the resident memory before the backbone was loaded; by then a step of a
tiny model has made the libraries allocate what they keep. glibc returns freed blocks of 64 KiB and more to the system
immediately; otherwise the peak would include the memory that glibc keeps for reuse. OUTPUT has one row per case
(rows.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 256,
}
MODEL = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 8, "vocab_size": 8192, "max_position_embeddings": 4096,
}  # fmt: skip
PREFIX = {"name": "prefix", "num_virtual_tokens": 20}
PROJECTION = {**PREFIX, "prefix_projection": True, "encoder_hidden_size": 512}
ZERO3 = "zero3.json"
CASES: dict[str, dict[str, Any]] = {
    "replicated, packed": {"method": PROJECTION, "rows": 4, "max_length": 512},
    "gradient checkpointing": {
        "backbone": {"gradient_checkpointing": True}, "method": PREFIX, "rows": 8, "max_length": 512,
    },
    "nf4": {"backbone": {"quantization": "nf4"}, "method": PREFIX, "rows": 2, "max_length": 512},
    "int8": {"backbone": {"quantization": "int8"}, "method": PREFIX, "rows": 2, "max_length": 512},
    "bfloat16": {"backbone": {"dtype": "bfloat16"}, "method": PREFIX, "rows": 4, "max_length": 512},
    "ZeRO-3 on 2 ranks": {"method": PREFIX, "rows": 2, "max_length": 256, "deepspeed": ZERO3, "ranks": 2},
    "ZeRO-3 on 2 ranks, little reuse": {
        "method": PREFIX, "rows": 2, "max_length": 256, "ranks": 2,
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_max_reuse_distance": 10_000_000,
                                            "stage3_prefetch_bucket_size": 5_000_000}},
    },
}  # fmt: skip


def run_config(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the run file of a case as a mapping."""
    return {
        "backbone": {"path": folder, "dtype": "float32", **case.get("backbone", {})},
        "method": case["method"],
        "data": {"train": "unread.jsonl", "max_length": case["max_length"]},
        "train": {"per_device_train_batch_size": case["rows"], "max_steps": 3},
        **({"deepspeed": case["deepspeed"]} if "deepspeed" in case else {}),
    }


def write_model(folder: str, sizes: dict[str, Any], *, weights: bool = True) -> None:
    """Write a Llama of these sizes with random weights; only its config without ``weights``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **sizes, dtype="float32")
    config.save_pretrained(folder)
    if weights:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def resident() -> dict[str, int]:
    """Return VmRSS and VmHWM (since its last reset) of this process, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def work(request: dict[str, Any]) -> dict[str, int]:
    """Take three steps of the run in this process, one of its ranks; ``peak``: bytes of step 3 above the baseline."""
    import torch
    from transformers.utils import logging as transformers_logging

    from ptd.distributed.ranks import Ranks

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a line per layer and step
    ranks = Ranks.start(needs_group="deepspeed" in request["run"])
    on_gpu = ranks.device.type == "cuda"
    take_steps(
        {**request["run"], "backbone": {"path": request["small"], "dtype": "float32"}, "deepspeed": None}, ranks, 1
    )
    if "deepspeed" in request["run"]:
        from ptd.engine import sharding  # its import alone takes some 100 MB

        sharding.make_ready()
    before = resident()["VmRSS"]

    def begin() -> None:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    take_steps(request["run"], ranks, 3, before_last=begin)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident()["VmHWM"] - before
    ranks.stop()
    return {"rank": ranks.rank, "peak": peak, "baseline": 0 if on_gpu else before}


def take_steps(run: dict[str, Any], ranks: Any, steps: int, before_last: Any = lambda: None) -> None:
    """Take optimizer steps on the fullest micro-batch of a run, with the components of ``ptd train``."""
    import torch

    from ptd.backbone import architecture_of
    from ptd.config import parse_config
    from ptd.config.deepspeed import apply_deepspeed
    from ptd.engine.loop import Loop
    from ptd.engine.member import Member
    from ptd.engine.prompt_step import Trained
    from ptd.engine.setup import prepare
    from ptd.planner.worst_case_batch import rows_of, sample_batch
    from ptd.runs.build import build_step, build_trained
    from ptd.tasks import make_task
    from ptd.types import Reporter

    config, zero3 = apply_deepspeed(parse_config({key: value for key, value in run.items() if value is not None}))
    task = make_task(config.task, config.data, architecture_of(config.backbone))
    prepared = prepare(config.backbone, ranks, zero3, output=task.output)
    if ranks.device.type == "cpu" and zero3 is None:
        # On a CPU, weights that need no conversion stay in the mapped file, and all its pages would count as resident.
        for parameter in prepared.model.parameters():
            parameter.data = parameter.data.clone()
    trained = build_trained(config, prepared, task, None)
    trained = Trained(ranks.distribute(trained.encoder), trained.readout.to(ranks.device))
    step = build_step(config, trained, ranks, prepared.model.dtype)
    batch = sample_batch(config, task, trained.readout, rows_of(config), packed=prepared.attachment.packable)
    ids = torch.randint(0, prepared.shape.vocab_size, batch.input_ids.shape)
    batch = batch.map(lambda tensor: ids if tensor is batch.input_ids else tensor)
    loop = Loop(prepared, ranks, Reporter(), [Member(config.train, step, None)])  # type: ignore[arg-type]
    for index in range(steps):
        if index == steps - 1:
            before_last()
        loop.take_step(index, [[batch]])


def measure(run: dict[str, Any], small: str, ranks: int) -> list[dict[str, int]]:
    """Run each rank of a case as a separate process, and return their reports."""
    from rows import start

    from ptd.distributed.ranks import Ranks

    common = {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(Ranks.free_port()), "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }  # fmt: skip
    request = json.dumps({"run": run, "small": small})
    started = [
        start(
            [__file__, "--worker", request],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate() for process in started]
    failed = [errors for process, (_, errors) in zip(started, said, strict=True) if process.returncode]
    if failed:
        raise RuntimeError("a worker failed: " + "\n".join(failed[0].strip().splitlines()[-8:]))
    return [json.loads(output.strip().splitlines()[-1]) for output, _ in said]


def measured(case: dict[str, Any], folder: str, small: str, device: str) -> dict[str, Any]:
    """Return the row of a case. Raises `Skip` if this machine cannot measure it."""
    import torch
    from rows import Skip

    from ptd.commands.plan import plan
    from ptd.config import parse_config

    ranks, run = case.get("ranks", 1), run_config(case, folder)
    if device == "cuda" and ranks > torch.cuda.device_count():
        raise Skip(f"this case needs {ranks} GPUs, but there are {torch.cuda.device_count()}")
    for package, needed in (("bitsandbytes", "quantization" in run["backbone"]), ("deepspeed", "deepspeed" in run)):
        if needed and importlib.util.find_spec(package) is None:
            raise Skip(f"{package} is not installed")
    found = plan(parse_config(run), gpus=ranks, device=device, alternatives=False)
    peak = max(report["peak"] for report in measure(run, small, ranks))
    return {
        "planned_bytes": found.own.peak, "measured_bytes": peak,
        "planned_over_measured": round(found.own.peak / peak, 4), "items": found.own.items,
        "run": {**run, "backbone": {**run["backbone"], "path": "random weights"}},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of the cases to measure")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two cases, to test the script")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    if "--worker" in sys.argv:  # imports only what it needs, because its memory is measured
        print(json.dumps(work(json.loads(sys.argv[-1]))))
        return
    import torch
    from rows import Rows, add_arguments

    add_arguments(parser)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SMALL if args.quick else MODEL
    only = args.only or (list(CASES)[:2] if args.quick else list(CASES))
    rows = Rows(
        args.output, ("case",), program="plan_vs_measured", settings={"model": model}, replace=args.replace,
        minutes=args.minutes,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as small:
        write_model(folder, model)
        write_model(small, SMALL)
        for name in only:
            if rows.has(case=name):
                continue
            with rows.row(case=name) as row:
                row |= measured(CASES[name], folder, small, device)
                print(f"{name:34} planned {row['planned_bytes'] / 2**20:8.0f} MiB  "
                      f"measured {row['measured_bytes'] / 2**20:8.0f} MiB  "
                      f"ratio {row['planned_over_measured']:.3f}", flush=True)  # fmt: skip
    rows.close()


if __name__ == "__main__":
    main()
