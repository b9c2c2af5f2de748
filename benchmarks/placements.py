"""Tune a backbone in every placement that one GPU allows: tokens per second, peak memory, and the plan's prediction.

    python benchmarks/placements.py [--steps 20] [--output benchmarks/results/gpu/placements.json]  # Llama-2-7B's shape
    python benchmarks/placements.py --quick                                                         # a tiny one, a CPU

Random weights of that shape are written to a temporary folder (13.5 GB, kept until everything is measured), with the
quickstart's tokenizer and rows that fill ``data.max_length``. Each placement is a run of launch/recipes/7b.yaml in a
separate process, started through ``ptd train`` as a user would; the figures come from its metrics.jsonl and run.json.
Tokens per second is the median over the steps without the first three. OUTPUT has one row per placement (rows.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch
from rows import ROOT, Rows, Skip, add_arguments, free_memory, start
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

PLACEMENTS = {
    "bf16, replicated": [],
    "int8": ["backbone.quantization=int8"],
    "nf4": ["backbone.quantization=nf4"],
    "ZeRO-3": ["backbone.sharding=world"],
    "ZeRO-3, shards in host memory": ["backbone.sharding=world", "backbone.offload=cpu"],
    "bf16, gradient checkpointing": ["backbone.gradient_checkpointing=true"],
}
LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
TINY = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
NEEDS = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "ZeRO-3": "deepspeed"}
"""The package that a placement needs, by the first word of its name."""
WARM_UP = 3


def save_backbone(folder: Path, shape: dict[str, int]) -> None:
    """Write the backbone to ``folder``, unless an earlier start has written all of it."""
    if (folder / "complete").exists():
        return
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(vocab_size=32_000, max_position_embeddings=4096, tie_word_embeddings=False, **shape)
    torch.set_default_dtype(torch.bfloat16)
    with no_init_weights(), torch.device(device):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    model.save_pretrained(folder, max_shard_size="5GB")
    AutoTokenizer.from_pretrained(ROOT / "ptd" / "quickstart" / "backbone").save_pretrained(folder)
    (folder / "complete").touch()


def save_rows(file: Path, rows: int, words: int) -> None:
    draw = random.Random(0)
    vocabulary = (ROOT / "ptd" / "quickstart" / "domains.py").read_text(encoding="utf-8").split()
    with file.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            texts = [" ".join(draw.choices(vocabulary, k=count)) for count in (words // 2, words // 2)]
            out.write(json.dumps({"prompt": texts[0], "completion": texts[1]}) + "\n")


def run(command: list[str]) -> str:
    """Run ``ptd`` and return its standard output. Raises `RuntimeError` with its last lines of errors if it fails."""
    began = start(["-m", "ptd.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, errors = began.communicate()
    if began.returncode:
        said = "\n".join((errors or out).strip().splitlines()[-8:])
        raise RuntimeError(f"ptd {command[0]} exited with {began.returncode}: {said}")
    return out


def measure(name: str, changes: list[str], common: list[str], folder: Path, on_gpu: bool) -> dict[str, Any]:
    package = NEEDS.get(name.split(",")[0])
    if package is not None and importlib.util.find_spec(package) is None:
        raise Skip(f"{package} is not installed")
    output = folder / name.replace(" ", "-").replace(",", "")
    shutil.rmtree(output, ignore_errors=True)  # remains of a start that was stopped
    recipe = str(ROOT / "launch" / "recipes" / "7b.yaml")
    run(["train", recipe, *common, *changes, f"output_dir={output}"])
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "tokens_per_second" in record][WARM_UP:]
    result = json.loads((output / "run.json").read_text())["result"]
    measured = {
        "tokens_per_second": round(statistics.median(step["tokens_per_second"] for step in steps)),
        "step_seconds": round(statistics.median(step["step_seconds"] for step in steps), 4),
        "peak_bytes": result["peak_memory_bytes"],
        "loss": result["loss"],
    }
    device = "cuda" if on_gpu else "cpu"
    try:
        planned = run(["plan", recipe, *common, *changes, "--device", device, "--json"])
    except RuntimeError as error:
        return {**measured, "plan_failed": str(error)}
    own = next(each for each in json.loads(planned)["placements"] if each["own"])
    measured["planned_peak_bytes"] = own["peak_bytes"]
    if on_gpu:  # on a CPU the peak is that of the whole process, including Python and all libraries
        measured["planned_over_measured"] = round(own["peak_bytes"] / result["peak_memory_bytes"], 3)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=PLACEMENTS, default=list(PLACEMENTS))
    parser.add_argument("--quick", action="store_true", help="a tiny shape and few steps, to test the script")
    add_arguments(parser)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.quick:
        raise SystemExit("Llama-2-7B's shape needs a GPU; give --quick to test the script with a tiny shape")
    steps, length = (5, 64) if args.quick else (args.steps, 512)
    shape = "tiny" if args.quick else "Llama-2-7B"
    rows = Rows(
        args.output, ("placement",), program="placements",
        settings={"shape": shape, "micro_batch": f"8 rows of {length} tokens", "steps": steps},
        replace=args.replace, minutes=args.minutes,
    )  # fmt: skip
    with rows.work_folder() as folder:
        for placement in args.only:
            if rows.has(placement=placement):
                continue
            with rows.row(placement=placement) as row:
                save_backbone(folder / "backbone", TINY if args.quick else LLAMA_2_7B)
                free_memory()
                save_rows(folder / "rows.jsonl", rows=8 * (steps + 1), words=2 * length)
                common = [
                    f"backbone.path={folder / 'backbone'}",
                    f"data.train={folder / 'rows.jsonl'}",
                    "data.eval=null",
                    f"data.max_length={length}",
                    f"train.max_steps={steps}",
                    "train.logging_steps=1",
                    "train.eval_steps=null",
                    "train.save_steps=null",
                ]
                row |= measure(placement, PLACEMENTS[placement], common, folder, on_gpu)
                print(placement, json.dumps(row), flush=True)
    rows.close()


if __name__ == "__main__":
    main()
