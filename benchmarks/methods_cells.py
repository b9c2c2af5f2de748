"""One cell of ``benchmarks/methods.py``: a method trained on a task and measured, by ptd or by PEFT.

Both sides see the same rows in the same order, the same number of steps, batch size, virtual tokens and schedule
(AdamW, linear decay to 0, gradients clipped to norm 1). PEFT (`methods_peft`) runs as its users run it: padded batches,
plain loop, the backbone in training mode (so with its dropout, which ptd leaves off).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from methods_tasks import LABELS, TAGS, Row, data_of

P = {"intents": 8, "entities": 8, "advert": 32}
"""Virtual tokens of every method."""
STEPS = {"intents": 80, "entities": 80, "advert": 100}
BATCH_ROWS = 8
MAX_NEW_TOKENS = 72
PROMPT_TEMPLATE = "{prompt}\n"


@dataclass(frozen=True)
class Cell:
    """One training run. ``split``: measured on development or on test rows; ``steps`` None: the task's own number."""

    side: Literal["ptd", "peft"]
    method: str
    task: str
    rows: int
    seed: int
    learning_rate: float
    split: Literal["dev", "test"]
    steps: int
    eval_rows: int

    def key(self, backbone: str) -> str:
        """Identity of the cell's result: all settings, the backbone's name and the code that makes the cell."""
        settings = json.dumps(
            [asdict(self), backbone, method_section(self) if self.side == "ptd" else None, _sources()]
        )
        return hashlib.sha256(settings.encode()).hexdigest()[:20]


def _sources() -> str:
    files = [Path(__file__).with_name(name) for name in ("methods_tasks.py", "methods_cells.py", "methods_peft.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def hidden_size(method: str, task: str) -> int:
    """Hidden size of a re-parameterisation: 128, but 256 for the MLP of the quickstart's recipe."""
    return 256 if method == "prefix + MLP" and task == "advert" else 128


def method_section(cell: Cell) -> dict[str, Any]:
    """ptd's ``method`` section."""
    tokens = {"num_virtual_tokens": P[cell.task]}
    pooling = {"pooling": "mean"} if cell.task == "intents" else {}
    hidden = {"encoder_hidden_size": hidden_size(cell.method, cell.task)}
    projection = {"prefix_projection": True, **hidden}
    return {
        "frozen": {"name": "prefix"},
        "head": {"name": "head"},
        "head, mean": {"name": "head", **pooling},
        "head + MLP, mean": {"name": "head", **pooling, "hidden_sizes": [128]},
        "head + MLP": {"name": "head", "hidden_sizes": [128]},
        "prompt": {"name": "prompt", **tokens},
        "p_tuning": {"name": "p_tuning", **hidden, **({} if template_marks(cell.task) else tokens)},
        "prefix": {"name": "prefix", **tokens},
        "prefix + MLP": {"name": "prefix", **tokens, **projection},
        "p_tuning_v2": {"name": "p_tuning_v2", **tokens, **pooling},
        "p_tuning_v2 + MLP": {"name": "p_tuning_v2", **tokens, **pooling, **projection},
    }[cell.method]


def template_marks(task: str) -> str | None:
    """Where p_tuning's virtual tokens stand; None: in front, as tagged words have no template."""
    half = P[task] // 2
    return {
        "intents": f"{{v:{half}}} {{text}} {{v:{half}}}",
        "entities": None,
        "advert": f"{{v:{half}}}{PROMPT_TEMPLATE}{{v:{half}}}",
    }[task]


def sections(cell: Cell) -> dict[str, Any]:
    """ptd's ``task`` and ``data`` sections, without the files."""
    marks = template_marks(cell.task) if cell.method == "p_tuning" and cell.side == "ptd" else None
    if cell.task == "advert":
        data = {"prompt_template": marks or PROMPT_TEMPLATE, "max_length": 192}
        return {"task": {"kind": "causal_lm"}, "data": data}
    task: dict[str, Any] = {"kind": "token_classification", "labels": TAGS}
    if cell.task == "intents":
        task = {"kind": "classification", "labels": LABELS, **({"patterns": [marks]} if marks else {})}
    return {"task": task, "data": {"max_length": 128}}


def run_cell(cell: Cell, backbone: str) -> dict[str, Any]:
    """Train and measure.

    Returns the task's metrics, ``trained_parameters``, ``seconds`` of the optimizer steps alone, ``seconds_in_all``
    where ptd ran, and ``peak_memory_bytes`` of the process while it trained (resident, with Python and libraries); or
    ``error``, what PEFT said where it cannot do this.
    """
    import torch

    torch.set_num_threads(1)
    train, held_out = data_of(cell.task, cell.seed, cell.rows, cell.eval_rows, cell.split)
    with TemporaryDirectory(prefix="ptd-methods-") as name:
        folder = Path(name)
        for file, rows in (("train", train), ("eval", held_out)):
            write_rows(folder / f"{file}.jsonl", rows)
        if cell.side == "ptd":
            return run_ptd(cell, backbone, folder)
        from methods_peft import run_peft

        return run_peft(cell, backbone, folder)


def write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_ptd(cell: Cell, backbone: str, folder: Path) -> dict[str, Any]:
    """The cell through ``ptd.train``, as ``ptd train`` runs it."""
    from ptd.config import parse_config
    from ptd.engine.records import read_records
    from ptd.evaluate import evaluate
    from ptd.generate import Decoding
    from ptd.train import train

    parts = sections(cell)
    held_out, decoding = str(folder / "eval.jsonl"), Decoding(max_new_tokens=MAX_NEW_TOKENS)
    if cell.method == "frozen":
        settings = {"data": parts["data"]}
        found = evaluate(held_out, adapter=None, backbone=backbone, settings=settings, decoding=decoding, batch_size=30)
        return {**_numbers(found), "trained_parameters": 0, "seconds": 0.0}
    config = {
        "backbone": {"path": backbone, "dtype": "float32"},
        "method": method_section(cell),
        "task": parts["task"],
        "data": {**parts["data"], "train": str(folder / "train.jsonl"), "eval": held_out},
        "train": {
            "max_steps": cell.steps,
            "learning_rate": cell.learning_rate,
            "per_device_train_batch_size": BATCH_ROWS,
            "per_device_eval_batch_size": 30,
            "logging_steps": 10,
            "seed": cell.seed,
        },
        "output_dir": str(folder / "out"),
    }
    result = train(parse_config(config))
    steps = [record for record in read_records(folder / "out") if "step_seconds" in record]
    ends = [0, *(record["step"] for record in steps)]
    metrics = {key.removeprefix("eval_"): value for key, value in result.items() if key.startswith("eval_")}
    if cell.task == "advert" and cell.split == "test":
        metrics |= evaluate(held_out, adapter=str(folder / "out"), decoding=decoding, batch_size=30)
    described = json.loads((folder / "out" / "run.json").read_text(encoding="utf-8"))
    return {
        **_numbers(metrics),
        "trained_parameters": described["trained_parameters"],
        "seconds": sum(r["step_seconds"] * (end - begin) for r, begin, end in zip(steps, ends, ends[1:], strict=False)),
        "seconds_in_all": result["seconds"],
        "peak_memory_bytes": steps[-1]["peak_memory_bytes"],
    }


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
