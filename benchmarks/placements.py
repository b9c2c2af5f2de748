"""A backbone tuned in every placement that one GPU allows: tokens a second, peak memory, and what the plan had said.

    python benchmarks/placements.py [--steps 20] [--output benchmarks/results/placements.json]    # Llama-2-7B's shape
    python benchmarks/placements.py --quick                                                       # a tiny one, on a CPU

Random weights of that shape are written to a temporary folder (13.5 GB) with the quickstart's tokenizer and rows that
fill ``data.max_length``. Each placement is a run of launch/recipes/7b.yaml in a process of its own, started as a user
would, through ``ptd train``; the figures are those of its metrics.jsonl and run.json. Tokens a second: the median step,
without the first three.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from ptd.bench.machine import evidence

ROOT = Path(__file__).parents[1]
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
WARM_UP = 3


def save_backbone(folder: Path, shape: dict[str, int]) -> None:
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


def save_rows(file: Path, rows: int, words: int) -> None:
    draw = random.Random(0)
    vocabulary = (ROOT / "ptd" / "quickstart" / "domains.py").read_text(encoding="utf-8").split()
    with file.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            texts = [" ".join(draw.choices(vocabulary, k=count)) for count in (words // 2, words // 2)]
            out.write(json.dumps({"prompt": texts[0], "completion": texts[1]}) + "\n")


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "ptd.cli", *command], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
    return done


def measure(name: str, changes: list[str], common: list[str], folder: Path, on_gpu: bool) -> dict[str, Any]:
    output = folder / name.replace(" ", "-").replace(",", "")
    recipe = str(ROOT / "launch" / "recipes" / "7b.yaml")
    trained = run(["train", recipe, *common, *changes, f"output_dir={output}"])
    if trained.returncode:
        return {"failed": trained.stderr.strip().splitlines()[-1:]}
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
    planned = run(["plan", recipe, *common, *changes, "--device", device, "--json"])
    if not planned.returncode:
        own = next(each for each in json.loads(planned.stdout)["placements"] if each["own"])
        measured["planned_peak_bytes"] = own["peak_bytes"]
        if on_gpu:  # on a CPU the peak is that of the process, with Python and all libraries in it
            measured["planned_over_measured"] = round(own["peak_bytes"] / result["peak_memory_bytes"], 3)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=PLACEMENTS, default=list(PLACEMENTS))
    parser.add_argument("--quick", action="store_true", help="a tiny shape, few steps: does the script work?")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.quick:
        raise SystemExit("Llama-2-7B's shape needs a GPU; --quick tries the script with a tiny one")
    steps, length = (5, 64) if args.quick else (args.steps, 512)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_backbone(folder / "backbone", TINY if args.quick else LLAMA_2_7B)
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
        results = {}
        for placement in args.only:
            results[placement] = measure(placement, PLACEMENTS[placement], common, folder, on_gpu)
            print(placement, json.dumps(results[placement]), flush=True)
    report = {
        "shape": "tiny" if args.quick else "Llama-2-7B",
        "micro_batch": f"8 rows of {length} tokens",
        "steps": steps,
        "results": results,
        **evidence(),
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
