"""The ptd side of ``benchmarks/quality.py``: the same run that the command line starts, with the method's defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quality_jobs import (
    BATCH_ROWS,
    EVAL_ROWS,
    HIDDEN,
    MAX_NEW_TOKENS,
    UNTRAINED,
    WARM_UP,
    Job,
    P,
    bytes_of,
    sections_of,
)
from quality_tasks import read_mrs, slots_of_references, text_metrics

RECIPES = (
    "causal_lm.yaml",
    "causal_lm_p_tuning.yaml",
    "classification_cloze.yaml",
    "classification_head.yaml",
    "token_classification.yaml",
)
"""The recipes that set the learning rates of methods. A method without a recipe has the configuration's default."""


def method_section(method: str) -> dict[str, Any]:
    """Return ptd's ``method`` section: the method's defaults, with P virtual tokens or the number after its name."""
    if method in UNTRAINED or method == "head":
        return {"name": "hard_prompt" if method in UNTRAINED else "head"}
    name, _, mlp = method.partition("+")
    name, _, tokens = name.partition(" ")
    section: dict[str, Any] = {"name": name, "num_virtual_tokens": int(tokens or P)}
    return section | ({"prefix_projection": True, "encoder_hidden_size": HIDDEN} if mlp == "mlp" else {})


def ptd_rates(method: str) -> dict[str, float]:
    """Return ptd's learning rates of a method, as keys of ``train``: those of the first recipe with this method, or
    else the configuration's default. A rate that is None has no key."""
    from ptd.config import TrainConfig, load_config

    section = method_section(method)
    for recipe in RECIPES:
        config = load_config(recipe)
        same = config.method["name"] == section["name"]
        if same and bool(config.method.get("prefix_projection")) == ("prefix_projection" in section):
            rates = {name: getattr(config.train, name) for name in ("learning_rate", "head_learning_rate")}
            break
    else:
        rates = {"learning_rate": TrainConfig.model_fields["learning_rate"].default}
    return {name: rate for name, rate in rates.items() if rate is not None}


def run_ptd(job: Job) -> dict[str, Any]:
    """Train, evaluate and generate with the functions of ``ptd train``, ``ptd eval`` and ``ptd generate``."""
    from ptd.commands.evaluate import evaluate
    from ptd.commands.generate import generate
    from ptd.commands.train import train
    from ptd.runs.metrics_log import read_records

    cell, data, out = job.cell, Path(job.data), Path(job.folder) / "out"
    settings = {"data": sections_of(job)["data"]}
    plain = cell.method == "frozen"
    result: dict[str, Any] = {"trained_parameters": 0, "adapter_bytes": 0, "learning_rate": None}
    if not plain:
        train(run_config(job, out))
        described = json.loads((out / "run.json").read_text(encoding="utf-8"))
        result["trained_parameters"] = described.get("trained_parameters", 0)
    if cell.method not in UNTRAINED:
        result |= costs(read_records(out))
        result["adapter_bytes"] = bytes_of(out / "adapter")
    where: dict[str, Any] = {"adapter": None if plain else str(out), "backbone": job.backbone}
    for name, prefix in (("test", ""), ("development", "development_")):
        file = str(data / f"{name}.jsonl")
        found = evaluate(file, **where, settings=settings if plain else None, batch_size=EVAL_ROWS)
        result |= {f"{prefix}{key}": found[key] for key in ("loss", "accuracy") if key in found}
        result |= {key: found[key] for key in ("supervised_tokens",) if key in found and not prefix}
    if cell.task == "e2e" and job.texts:
        from ptd.runs.decoding import Decoding

        mrs = read_mrs(data)
        given = generate(
            list(mrs), **where, settings=settings if plain else None,
            decoding=Decoding(max_new_tokens=MAX_NEW_TOKENS), batch_size=EVAL_ROWS,
        )  # fmt: skip
        result |= text_metrics(dict(zip(mrs, given, strict=True)), mrs)
        result |= {"slots_of_references": slots_of_references(mrs)} if plain else {}
    return result


def train_section(job: Job) -> dict[str, Any]:
    """Return ptd's ``train`` section for the cell, without the learning rate."""
    return {
        "max_steps": job.steps,
        "per_device_train_batch_size": BATCH_ROWS,
        "warmup_ratio": WARM_UP,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "report_to": [],
        "seed": job.cell.seed,
    }


def run_config(job: Job, out: Path) -> Any:
    """Return the run configuration of a ptd cell: a training run, or for a hard prompt an evaluation."""
    from ptd.config import load_config

    cell, sections, data = job.cell, sections_of(job), Path(job.data)
    rates = {} if job.overrides else ptd_rates(cell.method)
    if cell.learning_rate is not None:
        rates["learning_rate"] = cell.learning_rate
    rows = "eval" if cell.method in UNTRAINED else "train"
    run = {
        "backbone": {"path": job.backbone},
        "method": {} if job.overrides else method_section(cell.method),
        "task": sections["task"],
        "data": {**sections["data"], rows: str(data / ("test" if rows == "eval" else "train")) + ".jsonl"},
        "train": {**train_section(job), **rates},
        "output_dir": str(out),
    }
    file = Path(job.folder) / "run.yaml"
    file.write_text(json.dumps(run), encoding="utf-8")  # JSON is valid YAML
    return load_config(file, list(job.overrides))


def costs(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a run's seconds, useful tokens/s, peak memory, peak learning rate and last loss, from its step records."""
    steps = [record for record in records if "step_seconds" in record]
    seconds = sum(record["step_seconds"] for record in steps)
    return {
        "seconds": seconds,
        "tokens_per_second": sum(record["tokens"] for record in steps) / seconds,
        "peak_memory_bytes": steps[-1]["peak_memory_bytes"],
        "learning_rate": max(record["lr"] for record in steps),
        "train_loss": steps[-1]["loss"],
    }
