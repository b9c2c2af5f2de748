"""``ptd quickstart``: tune the shipped tiny backbone on several ranks with ZeRO-3, and measure it before and after."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ptd.config import load_config
from ptd.data import load_rows
from ptd.distributed.ranks import Ranks
from ptd.files import as_path, check_writable
from ptd.launch import Program, environment, local_command
from ptd.quickstart import BACKBONE
from ptd.quickstart.task import slot_accuracy, write_task
from ptd.runs.decoding import Decoding
from ptd.runs.scores import continue_rows, held_out_metrics, text_metrics
from ptd.runs.tuned import Tuned, load_tuned
from ptd.types import Reporter, UserError

RECIPE = Path(__file__).parent / "recipe.yaml"
DECODING = Decoding(max_new_tokens=72)
SAMPLES = 3
PARTS = ("data", "run")
"""Subfolders that a quickstart writes into its output folder."""


def run_quickstart(
    output: Path, *, ranks: int, overwrite: bool, reporter: Reporter | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Measure, tune and measure again in ``output``; print the results and return ``before``, ``after`` and ``prompt``.

    ``before`` and ``after`` are the metrics, ``prompt`` is that of the first held-out row. With ``quiet``, only metrics
    and samples are printed.

    Raises `UserError` if ``output`` holds an earlier quickstart and ``overwrite`` is not set, or if training fails.
    """
    reporter, output = reporter or Reporter(), as_path(output)
    say = (lambda text: None) if quiet else _headline
    held = [name for name in PARTS if (output / name).exists()]
    if held and not overwrite:
        raise UserError(f"{output} holds an earlier quickstart; choose another --output, or --overwrite to replace it")
    check_writable(output, "--output")
    for name in held:
        shutil.rmtree(output / name)
    (output / "data").mkdir(parents=True)
    train, held_out = write_task(output / "data")
    run = output / "run"
    gpus = torch.cuda.device_count()
    ranks = min(ranks, gpus) if gpus else ranks
    began = time.time()
    say(f"1/3  The frozen backbone without a prompt (3 M parameters, pretrained by this project) on {held_out}")
    prompts_as_tuned = load_config(RECIPE).data.model_dump()
    frozen = load_tuned(None, str(BACKBONE), Ranks.start(), settings={"data": prompts_as_tuned})
    before, before_texts = _measure(frozen, held_out, reporter)
    if not quiet:
        print(_row("frozen backbone", before))

    say(f"2/3  Prefix-tuning it: {ranks} rank{'s' * (ranks > 1)}, DeepSpeed ZeRO-3, 32 virtual tokens")
    command = training_command(ranks, train, held_out, run, quiet=quiet)
    if not quiet:
        print("$ " + " ".join(_shown(part) for part in command), flush=True)
    status = subprocess.run(command, env=environment(gpus), stdout=subprocess.DEVNULL, check=False).returncode
    if status:
        raise UserError(f"training failed with exit code {status}; see its messages above")

    say("3/3  The same backbone with the prefix, on the same inputs (their names were never seen in training)")
    after, after_texts = _measure(load_tuned(str(run), None, Ranks.start()), held_out, reporter)
    _print_comparison(before, after)
    rows = load_rows(str(held_out), "train", what="quickstart")
    for index in range(SAMPLES):
        print(f"\ninput      {rows[index]['prompt']}")
        print(f"frozen     {_one_line(before_texts[index])}")
        print(f"tuned      {_one_line(after_texts[index])}")
        print(f"reference  {rows[index]['completion']}")
    say(f"{time.time() - began:.0f} s in total. PEFT loads the adapter too.")
    return {"before": before, "after": after, "prompt": rows[0]["prompt"]}


def training_command(ranks: int, train: Path, held_out: Path, run: Path, *, quiet: bool = False) -> list[str]:
    """Return the command of DeepSpeed's launcher that runs ``ptd train`` on every rank of this machine."""
    overrides = [f"backbone.path={BACKBONE}", f"data.train={train}", f"data.eval={held_out}", f"output_dir={run}"]
    devices = os.environ.get("CUDA_VISIBLE_DEVICES") if torch.cuda.is_available() else None
    return local_command(Program.of(RECIPE, overrides, quiet=quiet), ranks, port=Ranks.free_port(), devices=devices)


def _measure(tuned: Tuned, held_out: Path, reporter: Reporter) -> tuple[dict[str, Any], list[str]]:
    rows = load_rows(str(held_out), "train", what="quickstart")
    metrics = held_out_metrics(tuned, rows, Ranks.start(), batch_size=16, reporter=Reporter())
    texts, references = continue_rows(tuned, rows, DECODING, Ranks.start(), batch_size=50, reporter=reporter)
    slots = [slot_accuracy(prompt, text) for prompt, text in zip(rows["prompt"], texts, strict=True)]
    return {**metrics, **text_metrics(texts, references), "slots": 100 * sum(slots) / len(slots)}, texts


def _headline(text: str) -> None:
    print(f"\n{text}", flush=True)


def _row(name: str, metrics: dict[str, Any]) -> str:
    return (
        f"{name:<17} exact match {metrics['exact_match']:5.1f} %   BLEU {metrics['bleu']:5.1f}   "
        f"slots {metrics['slots']:5.1f} %   perplexity {metrics['perplexity']:.2f}"
    )


def _print_comparison(before: dict[str, Any], after: dict[str, Any]) -> None:
    print(_row("frozen backbone", before))
    print(_row("with the prefix", after))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _shown(part: str) -> str:
    return "python" if part == sys.executable else part
