"""Compare the optimizers of ``train.optimizer``: the held-out loss over the learning rate.

    python benchmarks/optimizers.py [--steps 200] [--seeds 0] [--output benchmarks/results/optimizers.json]

The methods of `METHODS` train the quickstart's backbone on its rows, in one process, with the recipe's batches and
schedule. A row holds the final held-out loss of a run; OUTPUT.md has a table of the means over the seeds.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

from rows import Rows, add_arguments

from ptd.commands.train import train
from ptd.config import load_config
from ptd.quickstart import BACKBONE
from ptd.quickstart.run import RECIPE
from ptd.quickstart.task import write_task

METHODS = {
    "prefix": "{name: prefix, num_virtual_tokens: 32}",
    "prefix, MLP": "{name: prefix, num_virtual_tokens: 32, prefix_projection: true, encoder_hidden_size: 256}",
    "prompt": "{name: prompt, num_virtual_tokens: 32}",
}
"""The section ``method`` of the run file."""
RATES: dict[str, tuple[float, ...]] = {
    "adamw": (0.05, 0.1, 0.2),
    "adamw_8bit": (0.05, 0.2),
    "lion": (0.05, 0.1, 0.2, 0.4),
}
"""The values of ``train.learning_rate``; 0.05 is the default."""
NAMES = ("method", "optimizer", "learning_rate", "seed")


def run(data: tuple[Path, Path], output: Path, steps: int, name: dict[str, Any]) -> float:
    """Return the held-out loss at the end of a run."""
    rows, held_out = data
    shutil.rmtree(output, ignore_errors=True)
    overrides = [
        f"method={METHODS[name['method']]}",
        f"backbone.path={BACKBONE}",
        f"data.train={rows}",
        f"data.eval={held_out}",
        f"train.max_steps={steps}",
        f"train.eval_steps={steps}",
        f"train.optimizer={name['optimizer']}",
        f"train.learning_rate={name['learning_rate']!r}",
        f"train.seed={name['seed']}",
        "train.samples=0",
        "train.report_to=[]",
        "deepspeed=null",
        f"output_dir={output}",
    ]
    return float(train(load_config(RECIPE, overrides))["eval_loss"])


def table(records: list[dict[str, Any]]) -> str:
    """Return the mean held-out loss over the seeds, one line per optimizer and rate, one column per method."""
    lines = ["| optimizer | learning rate | " + " | ".join(METHODS) + " |", "|---|---|" + "---|" * len(METHODS)]
    for optimizer, rates in RATES.items():
        for rate in rates:
            cells = []
            for method in METHODS:
                same = {"method": method, "optimizer": optimizer, "learning_rate": rate, "outcome": "measured"}
                losses = [each["loss"] for each in records if same.items() <= each.items()]
                cells.append(f"{statistics.mean(losses):.4f}" if losses else "–")
            lines.append(f"| {optimizer} | {rate:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    add_arguments(parser)
    arguments = parser.parse_args()
    settings = {"steps": arguments.steps}
    rows = Rows(
        arguments.output, NAMES, program="optimizers", settings=settings, replace=arguments.replace,
        minutes=arguments.minutes,
    )  # fmt: skip
    with rows.work_folder() as folder:
        (folder / "data").mkdir(exist_ok=True)
        data = write_task(folder / "data")
        for seed in arguments.seeds:
            for method in METHODS:
                for optimizer, rates in RATES.items():
                    for rate in rates:
                        name = {"method": method, "optimizer": optimizer, "learning_rate": rate, "seed": seed}
                        if not rows.has(**name):
                            with rows.row(**name) as row:
                                row["loss"] = run(data, folder / "run", arguments.steps, name)
    print(table(rows.records), end="")
    if arguments.output is not None:
        arguments.output.with_suffix(".md").write_text(table(rows.records), encoding="utf-8")
    rows.close()


if __name__ == "__main__":
    main()
