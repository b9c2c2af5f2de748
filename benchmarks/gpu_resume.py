"""Compare a run that is stopped and resumed with the same run without a stop, to check a resume on a GPU.

    python benchmarks/gpu_resume.py [--output benchmarks/results/gpu/resume.json] [--quick]

``ptd train`` runs the quickstart's backbone and task in a separate process, once in each form: SIGTERM after a few
steps, then the same command again. A row records how far the losses after the stop and the adapter are from those of
the run without a stop. A GPU may add in another order, so the bits need not be equal; ``bit_identical`` says whether
they are. A loss of optimizer state would show in the first steps after the stop.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from rows import Rows, Skip, add_arguments, start
from safetensors.torch import load_file

from ptd.errors import REQUEUE
from ptd.quickstart import BACKBONE
from ptd.quickstart.run import RECIPE
from ptd.quickstart.task import write_task

FORMS: dict[str, list[str]] = {
    "float32": ["backbone.dtype=float32"],
    "bfloat16, gradient checkpointing": ["backbone.dtype=bfloat16", "backbone.gradient_checkpointing=true"],
    "float16, loss scale": ["backbone.dtype=float16"],
    "ZeRO-3": ["backbone.dtype=bfloat16", "backbone.sharding=world"],
}
STOPPED_AFTER = 5
FIRST, REST = 1e-3, 2e-2
"""The largest relative error of a loss in the first three steps after the stop, and in the first twenty."""


def command(folder: Path, name: str, changes: list[str], steps: int) -> list[str]:
    rows, _ = write_task(folder)
    settings = [
        f"backbone.path={BACKBONE}", f"data.train={rows}", "data.eval=null", f"train.max_steps={steps}",
        "train.per_device_train_batch_size=8", "train.logging_steps=1", "train.eval_steps=null", "train.samples=0",
        "train.save_steps=null", "deepspeed=null", *changes, f"output_dir={folder / name}",
    ]  # fmt: skip
    return ["-m", "ptd.cli", "train", str(RECIPE), *settings]


def losses(output: Path) -> dict[int, float]:
    """Return the losses by step; if two starts have logged a step, the later record counts."""
    file = output / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def finish(words: list[str]) -> None:
    done = start(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said, _ = done.communicate()
    if done.returncode:
        raise RuntimeError(f"ptd train exited with {done.returncode}: " + "\n".join(said.strip().splitlines()[-8:]))


def stop(words: list[str], output: Path, steps: int) -> int:
    """Start the run, stop it with SIGTERM after `STOPPED_AFTER` steps, and return the last step it finished."""
    with (output.parent / "log").open("w+", encoding="utf-8") as log:
        process = start(words, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None and len(losses(output)) < STOPPED_AFTER:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
        log.seek(0)
        if code != REQUEUE:
            raise RuntimeError(f"ptd train exited with {code}, not {REQUEUE}: {log.read()[-2000:]}")
    reached = max(losses(output))
    assert reached < steps
    return reached


def measure(folder: Path, changes: list[str], steps: int) -> dict[str, Any]:
    for name in ("whole", "stopped"):
        shutil.rmtree(folder / name, ignore_errors=True)
    finish(command(folder, "whole", changes, steps))
    again = command(folder, "stopped", changes, steps)
    reached = stop(again, folder / "stopped", steps)
    finish(again)
    want, got = (losses(folder / name) for name in ("whole", "stopped"))
    if got.keys() != want.keys():
        raise AssertionError(f"only one of the two runs has records of the steps {sorted(got.keys() ^ want.keys())}")
    off = {step: abs(got[step] - want[step]) / abs(want[step]) for step in want}
    behind = [off[step] for step in sorted(off) if step > reached]
    plain, own = (load_file(folder / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "stopped"))
    found = {
        "stopped_after": reached, "steps": steps, "first_losses_off": max(behind[:3]), "losses_off": max(behind[:20]),
        "adapter_off": max(float((own[key] - plain[key]).norm() / plain[key].norm()) for key in plain),
        "bit_identical": all(torch.equal(own[key], plain[key]) for key in plain) and not any(off.values()),
    }  # fmt: skip
    if not (found["first_losses_off"] <= FIRST and found["losses_off"] <= REST):  # nan satisfies neither
        raise AssertionError(f"the resumed run differs from the run without a stop: {found}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="measure one form only")
    add_arguments(parser)
    args = parser.parse_args()
    steps = 300 if torch.cuda.is_available() else 40  # enough for the stop to come long before the last step
    forms = dict(list(FORMS.items())[:1]) if args.quick else FORMS
    rows = Rows(
        args.output, ("form",), program="gpu_resume", settings={"steps": steps}, replace=args.replace,
        minutes=args.minutes,
    )  # fmt: skip
    with rows.work_folder() as folder:
        for form, changes in forms.items():
            if rows.has(form=form):
                continue
            with rows.row(form=form) as row:
                if "sharding" in changes[-1] and importlib.util.find_spec("deepspeed") is None:
                    raise Skip("deepspeed is not installed")
                row |= measure(folder, changes, steps)
                print(form, json.dumps(row), flush=True)
    rows.close()


if __name__ == "__main__":
    main()
