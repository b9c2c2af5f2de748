"""fp8 weights against bfloat16: the prompt's gradient, what a run ends with and, on a GPU, how fast the products are.

    python benchmarks/fp8.py [--steps 250] [--seeds 0 1 2] [--tokens 8192] [--output benchmarks/results/fp8.json]

The quickstart's recipe on its backbone, in one process: a run of each seed with the weights in bfloat16 and one with
fp8, and of the first seed's prompts, after one step and at the end, the gradient over 32 training rows, beside those of
fp8 with E5M2 gradients, int8, nf4 and float32. On a GPU also forward and dgrad of the linear layers of Llama-3-8B:
bfloat16, fp8, fp8 under torch.compile (which fuses the rounding), and what fp8's time is made of. Without a GPU fp8
numbers are multiplied in float32, which rounds as a GPU does and says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptd.backbone import fp8
from ptd.bench.machine import evidence
from ptd.config import load_config
from ptd.data import Batches, load_rows
from ptd.engine.ranks import Ranks
from ptd.generate import load_tuned
from ptd.quickstart import BACKBONE
from ptd.quickstart.run import RECIPE
from ptd.quickstart.task import write_task
from ptd.train import train

ROWS = 32
REFERENCE = ("bfloat16", "none")
FORMS: dict[str, tuple[str, str]] = {
    "fp8": ("bfloat16", "fp8"),
    "fp8, gradients in E5M2": ("bfloat16", "fp8"),
    "int8": ("bfloat16", "int8"),
    "nf4": ("bfloat16", "nf4"),
    "float32": ("float32", "none"),
}
LAYER = {"q, o": (4096, 4096, 2), "k, v": (4096, 1024, 2), "gate, up": (4096, 14336, 2), "down": (14336, 4096, 1)}
"""Of Llama-3-8B: in, out, how many a layer has."""


def run(data: tuple[Path, Path], output: Path, *, seed: int, steps: int, quantization: str) -> dict[str, Any]:
    rows, held_out = data
    overrides = [
        f"backbone.path={BACKBONE}",
        "backbone.dtype=bfloat16",
        f"backbone.quantization={quantization}",
        f"data.train={rows}",
        f"data.eval={held_out}",
        f"train.max_steps={steps}",
        f"train.seed={seed}",
        f"train.eval_steps={steps}",
        "train.samples=0",
        "deepspeed=null",
        f"output_dir={output}",
    ]
    return train(load_config(RECIPE, overrides))


def prompt_gradient(adapter: Path, rows_file: Path, dtype: str, quantization: str) -> Tensor:
    """Of the loss over the first rows, at the adapter's prompt; flat, fp64."""
    ranks = Ranks.start()
    settings = {"backbone": {"dtype": dtype, "quantization": quantization}}
    tuned = load_tuned(str(adapter), None, ranks, settings=settings)
    assert tuned.adapter is not None
    prompt = tuned.adapter.flat.to(ranks.device).requires_grad_()
    tuned.prepared.attachment.set(tuned.adapter.layout.state(prompt))
    examples = tuned.task.tokenize(load_rows(str(rows_file), "train", what="rows"), tuned.tokenizer, what="rows")
    (batch,) = Batches(examples, rank=0, world_size=1, per_device_batch_size=ROWS).step(0)
    tuned.readout(tuned.prepared.run, batch).loss.backward()
    assert prompt.grad is not None
    return prompt.grad.double().cpu().flatten()


def gradients(adapter: Path, rows_file: Path) -> dict[str, dict[str, float]]:
    want = prompt_gradient(adapter, rows_file, *REFERENCE)
    found = {}
    for name, form in FORMS.items():
        fp8.GRADIENT = torch.float8_e5m2 if "E5M2" in name else fp8.E4M3
        got = prompt_gradient(adapter, rows_file, *form)
        cosine = torch.cosine_similarity(got, want, dim=0)
        found[name] = {"cosine": float(cosine), "length": float(got.norm() / want.norm())}
    fp8.GRADIENT = fp8.E4M3
    return found


def final_losses(data: tuple[Path, Path], folder: Path, seeds: list[int], steps: int) -> dict[str, Any]:
    losses: dict[str, list[float]] = {"bfloat16": [], "fp8": []}
    for seed in seeds:
        for name, found in losses.items():
            quantization = "fp8" if name == "fp8" else "none"
            result = run(data, folder / f"{name}-{seed}", seed=seed, steps=steps, quantization=quantization)
            found.append(result["eval_loss"])
            print(f"seed {seed}, {name}: held-out loss {found[-1]:.4f} after {steps} steps", flush=True)
    differences = [b - a for a, b in zip(losses["bfloat16"], losses["fp8"], strict=True)]
    spread = statistics.stdev(losses["bfloat16"]) if len(seeds) > 1 else None
    summary = {"mean_difference": statistics.mean(differences), "spread_over_seeds_in_bfloat16": spread}
    return {"steps": steps, "seeds": seeds, "held_out_loss": losses, **summary}


def milliseconds(work: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(work, warmup=50, rep=200, return_mode="median"))


def forward_and_dgrad(layer: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(layer(x), x, gradient)


def speed(tokens: int) -> dict[str, Any]:
    """Milliseconds of each layer, and of one of each layer's as Llama-3-8B has them."""
    found: dict[str, dict[str, float]] = {}
    for name, (width, out, _) in LAYER.items():
        plain = nn.Linear(width, out, bias=False, dtype=torch.bfloat16, device="cuda").requires_grad_(False)
        rounded = fp8.Fp8Linear(plain.weight, None)
        fused = torch.compile(fp8.Fp8Linear(plain.weight, None))
        x = torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        gradient = torch.randn(tokens, out, dtype=torch.bfloat16, device="cuda")
        rows, row_scale = fp8.to_fp8(x.detach())
        back, back_scale = fp8.to_fp8(gradient)
        scale = rounded.scale[None]
        found[name] = {
            "bfloat16": milliseconds(forward_and_dgrad(plain, x, gradient)),
            "fp8": milliseconds(forward_and_dgrad(rounded, x, gradient)),
            "fp8, compiled": milliseconds(forward_and_dgrad(fused, x, gradient)),
            "rounding the input": milliseconds(lambda x=x: fp8.to_fp8(x.detach())),
            "product": milliseconds(
                lambda a=rows, s=row_scale, w=rounded: torch.ops.ptd.fp8_linear(a, s, w.weight, w.scale)
            ),
            "product, fast accumulation": milliseconds(
                lambda a=rows, s=row_scale, w=rounded, t=scale: torch._scaled_mm(
                    a, w.weight.t(), scale_a=s, scale_b=t, out_dtype=torch.bfloat16, use_fast_accum=True
                )
            ),
            "product for the gradient, turning included": milliseconds(
                lambda a=back, s=back_scale, w=rounded: torch.ops.ptd.fp8_linear_input(a, s, w.weight)
            ),
            "turning the weight": milliseconds(lambda w=rounded: w.weight.t().contiguous()),
        }
    layer = {kind: sum(LAYER[name][2] * found[name][kind] for name in found) for kind in found["down"]}
    faster = {kind: layer["bfloat16"] / layer[kind] for kind in ("fp8", "fp8, compiled")}
    return {"tokens": tokens, "milliseconds": found, "of a layer": layer, "times faster than bfloat16": faster}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="MatMul8bitLt")
    result: dict[str, Any] = {}
    if torch.cuda.is_available():
        result["speed"] = speed(arguments.tokens)
        print(json.dumps(result["speed"], indent=2), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_task(folder)
        seed = arguments.seeds[0]
        run(data, folder / "first", seed=seed, steps=1, quantization="none")
        result["losses"] = final_losses(data, folder, arguments.seeds, arguments.steps)
        prompts = {1: folder / "first", arguments.steps: folder / f"bfloat16-{seed}"}
        result["gradients"] = {
            f"after {steps} step{'s' * (steps > 1)}": gradients(adapter, data[0]) for steps, adapter in prompts.items()
        }
    print(json.dumps({key: result[key] for key in ("losses", "gradients")}, indent=2))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(
            json.dumps({**result, **evidence("bitsandbytes")}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
