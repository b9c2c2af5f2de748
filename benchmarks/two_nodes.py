"""The program that `two_nodes.sh` runs on its hosts: prefix-tuning with ptd or PEFT, two ranks each, on a slow link.

The backbone is a Llama with random weights (63 M parameters in bf16: 8 layers, hidden 768, vocabulary of the
quickstart's tokenizer). 20 virtual tokens are trained directly on the quickstart's rows, 4 per rank and step. ZeRO-3
gathers one layer ahead and keeps no weight from forward to backward, as it must if the backbone does not fit. ptd
runs through `ptd train`; PEFT with ZeRO-3 runs with `HfDeepSpeedConfig`, `get_peft_model`, an AdamW that DeepSpeed owns
and padded batches. Each runs as its users run it.

For each rate of the link, the program measures ``STEPS`` optimizer steps: their mean time on rank 0, and the increase
of the interface's byte counters (both directions), including acknowledgements and the headers of Ethernet, IP and TCP.
The steps before them are the warm-up, in which DeepSpeed compares the layers' order over all ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEPS = 4
"""Warm-up steps, and measured steps at each rate."""
ROWS, P, MAX_LENGTH = 4, 20, 128
ZERO3 = {
    "stage": 3,
    "overlap_comm": True,
    "stage3_prefetch_bucket_size": 7_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 20_000_000,
    "stage3_max_reuse_distance": 1_000_000,
}
TOKENIZER = Path(__file__).parents[1] / "ptd" / "quickstart" / "backbone"


class Link:
    """The link between the hosts, seen from the first host: sets its rate, reads its bytes."""

    def __init__(self, device: str, hosts: list[str]) -> None:
        self.device, self.hosts = device, hosts

    def limit(self, rate: str) -> None:
        """Limit both directions to ``rate``, written as for tc."""
        for host in self.hosts:
            limit = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
            subprocess.run(["tc", "-n", host, "qdisc", "replace", "dev", self.device, "root", *limit], check=True)

    def bytes(self) -> int:
        """Return the bytes sent and received so far, including all headers."""
        show = ["ip", "-s", "-j", "link", "show", "dev", self.device]
        (link,) = json.loads(subprocess.run(show, capture_output=True, check=True).stdout)
        return int(link["stats64"]["rx"]["bytes"] + link["stats64"]["tx"]["bytes"])


class Phases:
    """Sets the link's rate after the warm-up and after each rate's steps, and reads the bytes in between."""

    def __init__(self, link: Link, rates: list[str]) -> None:
        self.link, self.rates, self.wire = link, rates, list[int]()
        self._before = 0

    @property
    def total_steps(self) -> int:
        return STEPS * (1 + len(self.rates))

    def after(self, step: int) -> None:
        """Note that ``step`` (counted from 1) is finished."""
        phase, within = divmod(step, STEPS)
        if within:
            return
        now = self.link.bytes()
        if phase > 1:
            self.wire.append((now - self._before) // STEPS)
        if phase <= len(self.rates):
            self.link.limit(self.rates[phase - 1])
        self._before = self.link.bytes()


def prepare(work: Path) -> None:
    """Write backbone and rows to ``work``."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from ptd.quickstart.task import write_task

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(work / "backbone")
    tokenizer.save_pretrained(work / "backbone")
    write_task(work)


def run_ptd(sharding: str, work: Path, phases: Phases) -> list[dict[str, Any]]:
    from ptd.commands.train import train
    from ptd.config import parse_config
    from ptd.runs.metrics_log import read_records
    from ptd.types import Reporter

    class Watch(Reporter):
        def advance(self, task: str, done: int, line: str | None = None) -> None:
            phases.after(done)

    raw: dict[str, Any] = {
        "backbone": {"path": str(work / "backbone"), "dtype": "bfloat16", "sharding": sharding},
        "method": {"name": "prefix", "num_virtual_tokens": P},
        "data": {"train": str(work / "train.jsonl"), "max_length": MAX_LENGTH},
        "train": {
            "max_steps": phases.total_steps,
            "per_device_train_batch_size": ROWS,
            "learning_rate": 5e-3,
            "logging_steps": STEPS,
        },
        "output_dir": str(work / f"out-{sharding}"),
    }
    if sharding != "none":
        raw["deepspeed"] = {"zero_optimization": ZERO3}
    train(parse_config(raw), reporter=Watch())
    if not phases.wire:
        return []
    keys = ("step_seconds", "network_bytes_between_nodes", "network_bytes", "network")
    steps = [record for record in read_records(work / f"out-{sharding}") if "step_seconds" in record]
    return [{key: record[key] for key in keys} for record in steps[1:]]


def run_peft(work: Path, phases: Phases) -> list[dict[str, Any]]:
    import deepspeed
    import torch
    import torch.distributed as dist
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference; needs a compiler and a minute
    settings = {
        "zero_optimization": ZERO3,
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    deepspeed.init_distributed("gloo")
    kept = HfDeepSpeedConfig(settings)  # transformers uses it for as long as the object exists
    model = AutoModelForCausalLM.from_pretrained(work / "backbone", dtype=torch.bfloat16)
    model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=trained)
    tokenizer = AutoTokenizer.from_pretrained(work / "backbone")
    rows = [json.loads(line) for line in (work / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds: list[float] = []
    for step in range(phases.total_steps):
        first = (step * dist.get_world_size() + dist.get_rank()) * ROWS
        batch = peft_batch([rows[index % len(rows)] for index in range(first, first + ROWS)], tokenizer)
        began = time.perf_counter()
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        assert torch.isfinite(loss.detach())
        seconds.append(time.perf_counter() - began)
        if dist.get_rank() == 0:
            phases.after(step + 1)
    del kept
    means = [sum(seconds[start : start + STEPS]) / STEPS for start in range(STEPS, len(seconds), STEPS)]
    return [{"step_seconds": mean} for mean in means] if phases.wire else []


def peft_batch(rows: list[dict[str, str]], tokenizer: Any) -> dict[str, Any]:
    """Return a batch padded on the right, with labels −100 on prompt and padding."""
    import torch

    pairs = [
        (
            tokenizer(row["prompt"], add_special_tokens=False)["input_ids"],
            [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
        )
        for row in rows
    ]
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for index, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        ids[index, :end], mask[index, :end] = torch.tensor([*prompt, *completion]), 1
        labels[index, len(prompt) : end] = torch.tensor(completion)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(system: str, work: Path, link: Link, rates: list[str]) -> None:
    phases = Phases(link, rates)
    toolkit, sharding = system.split("-")
    rows = run_ptd(sharding, work, phases) if toolkit == "ptd" else run_peft(work, phases)
    if int(os.environ["RANK"]) == 0:
        measured = [
            {"system": system, "rate": rate, **row, "wire_bytes": wire}
            for rate, row, wire in zip(rates, rows, phases.wire, strict=True)
        ]
        (work / f"{system}.json").write_text(json.dumps(measured), encoding="utf-8")


def report(work: Path, output: Path, systems: list[str]) -> None:
    """Write all results with their evidence, and print a table."""
    from ptd.bench.machine import evidence

    results = [row for system in systems for row in json.loads((work / f"{system}.json").read_text(encoding="utf-8"))]
    found = evidence("peft") | {"command": f"benchmarks/two_nodes.sh {output} {' '.join(systems)}"}
    found["hardware"] += ", 2 namespaces × 2 ranks × 1 thread, gloo"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**found, "steps": STEPS, "results": results}, indent=2) + "\n", encoding="utf-8")
    print("| system | link | s per step | MB per step on the wire | MB per step in metrics.jsonl (wire against it) |")
    print("|---|---|---|---|---|")
    for row in results:
        counted = row.get("network_bytes_between_nodes")
        said = f"{counted / 1e6:.2f} ({row['wire_bytes'] / counted - 1:+.1%})" if counted else "–"
        shown = [row["system"], row["rate"], f"{row['step_seconds']:.2f}", f"{row['wire_bytes'] / 1e6:.2f}", said]
        print(f"| {' | '.join(shown)} |")


def main(what: str, *arguments: str) -> None:
    if what == "prepare":
        prepare(Path(arguments[0]))
    elif what == "run":
        system, work, device, hosts, rates = arguments
        run(system, Path(work), Link(device, hosts.split()), rates.split())
    else:
        report(Path(arguments[0]), Path(arguments[1]), list(arguments[2:]))


if __name__ == "__main__":
    main(*sys.argv[1:])
