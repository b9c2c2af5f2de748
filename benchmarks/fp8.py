"""Compare fp8 weights with bfloat16: the prompt's gradient, a run's final loss and, on a GPU, the products' speed.

    python benchmarks/fp8.py [--steps 250] [--seeds 0 1 2] [--tokens 8192] [--output benchmarks/results/fp8.json]
    python benchmarks/fp8.py --quick                                      # two steps, to test the script

The quickstart's recipe runs on its backbone, in one process: for each seed, one run with bfloat16 weights and one with
fp8 weights. For the first seed's prompts after one step and at the end, the gradient over 32 training rows in bfloat16
is compared with that in fp8, fp8 with E5M2 gradients, int8, nf4 and float32. On a GPU, it also times forward and dgrad
of Llama-3-8B's linear layers in bfloat16, fp8, and fp8 under torch.compile (which fuses the rounding), and the parts of
fp8's time.
Without a GPU, fp8 numbers are multiplied in float32, which rounds as a GPU does but says nothing about speed. OUTPUT
has a row for each layer's speed, each run's loss and each form's gradient (rows.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ptd_kernels.fp8_linear import product
from rows import Rows, Skip, add_arguments, free_memory
from torch import Tensor, nn

from ptd.backbone import fp8
from ptd.commands.train import train
from ptd.config import load_config
from ptd.data import Batches, load_rows
from ptd.distributed.ranks import Ranks
from ptd.quickstart import BACKBONE
from ptd.quickstart.run import RECIPE
from ptd.quickstart.task import write_task
from ptd.runs.tuned import load_tuned

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
"""The linear layers of Llama-3-8B: input width, output width, number per decoder layer."""


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
    """Return the gradient of the loss over the first `ROWS` rows at the adapter's prompt; flat, fp64."""
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


def adapter_of(folder: Path, data: tuple[Path, Path], seed: int, steps: int, name: str) -> tuple[Path, float]:
    """Return the output folder and the held-out loss of the run with these weights; reuse one that has finished."""
    output = folder / f"{name}-{seed}-{steps}"
    if not (output / "finished.json").exists():
        shutil.rmtree(output, ignore_errors=True)
        result = run(data, output, seed=seed, steps=steps, quantization="fp8" if name == "fp8" else "none")
        (output / "finished.json").write_text(json.dumps({"loss": result["eval_loss"]}), encoding="utf-8")
    return output, json.loads((output / "finished.json").read_text(encoding="utf-8"))["loss"]


def losses(rows: Rows, folder: Path, data: tuple[Path, Path], seeds: list[int], steps: int) -> None:
    """Add a row with the final held-out loss of each seed's run, in bfloat16 and with fp8."""
    for seed in seeds:
        for name in ("bfloat16", "fp8"):
            which = {"what": "held-out loss", "of": f"{name}, seed {seed}"}
            if not rows.has(**which):
                with rows.row(**which) as row:
                    _, row["loss"] = adapter_of(folder, data, seed, steps, name)


def gradients(rows: Rows, folder: Path, data: tuple[Path, Path], seed: int, counts: tuple[int, ...]) -> None:
    """Add rows for the gradient at the prompts after ``counts`` steps, in every form: its cosine with that of bfloat16,
    and the ratio of their lengths."""
    for steps in counts:
        want = None
        for name, form in FORMS.items():
            which = {"what": "gradient", "of": f"{name}, after {steps} step{'s' * (steps > 1)}"}
            if rows.has(**which):
                continue
            with rows.row(**which) as row:
                if form[1] in ("int8", "nf4") and importlib.util.find_spec("bitsandbytes") is None:
                    raise Skip("bitsandbytes is not installed")
                adapter, _ = adapter_of(folder, data, seed, steps, "bfloat16")
                if want is None:
                    want = prompt_gradient(adapter, data[0], *REFERENCE)
                product.GRADIENT = torch.float8_e5m2 if "E5M2" in name else fp8.E4M3
                try:
                    got = prompt_gradient(adapter, data[0], *form)
                finally:
                    product.GRADIENT = product.E4M3
                row["cosine"] = float(torch.cosine_similarity(got, want, dim=0))
                row["length"] = float(got.norm() / want.norm())


def summary(rows: Rows, seeds: list[int]) -> dict[str, Any]:
    """Return the speed-up over bfloat16 in a layer, and how fp8's held-out losses differ, from the measured rows."""
    found = {(row["what"], row["of"]): row for row in rows.records if row["outcome"] == "measured"}
    summed: dict[str, Any] = {}
    if all(("speed", name) in found for name in LAYER):
        kinds = [kind for kind in found["speed", "down"] if kind not in ("what", "of", "outcome")]
        layer = {kind: sum(LAYER[name][2] * found["speed", name][kind] for name in LAYER) for kind in kinds}
        summed["milliseconds of a layer"] = layer
        summed["times faster"] = {kind: layer["bfloat16"] / layer[kind] for kind in ("fp8", "fp8, compiled")}
    pairs = [[found.get(("held-out loss", f"{name}, seed {seed}")) for name in ("bfloat16", "fp8")] for seed in seeds]
    both = [(plain["loss"], own["loss"]) for plain, own in pairs if plain and own]
    if both:
        summed["mean_difference"] = statistics.mean(own - plain for plain, own in both)
        if len(both) > 1:
            summed["spread_over_seeds_in_bfloat16"] = statistics.stdev(plain for plain, _ in both)
    return summed


def milliseconds(work: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(work, warmup=50, rep=200, return_mode="median"))


def forward_and_dgrad(layer: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(layer(x), x, gradient)


def layer_speed(name: str, tokens: int) -> dict[str, float]:
    """Return the milliseconds of one of Llama-3-8B's linear layers, and of the parts of its fp8 product."""
    width, out, _ = LAYER[name]
    plain = nn.Linear(width, out, bias=False, dtype=torch.bfloat16, device="cuda").requires_grad_(False)
    own = fp8.Fp8Linear(plain.weight, None)
    fused = torch.compile(fp8.Fp8Linear(plain.weight, None))
    x = torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    gradient = torch.randn(tokens, out, dtype=torch.bfloat16, device="cuda")
    rounded, scale = fp8.to_fp8(x.detach())
    back, back_scale = fp8.to_fp8(gradient)
    return {
        "bfloat16": milliseconds(forward_and_dgrad(plain, x, gradient)),
        "fp8": milliseconds(forward_and_dgrad(own, x, gradient)),
        "fp8, compiled": milliseconds(forward_and_dgrad(fused, x, gradient)),
        "rounding the input": milliseconds(lambda: fp8.to_fp8(x.detach())),
        "product": milliseconds(lambda: torch.ops.ptd.fp8_linear(rounded, scale, own.weight, own.scale)),
        "product, fast accumulation": milliseconds(
            lambda: torch._scaled_mm(
                rounded, own.weight.t(), scale_a=scale, scale_b=own.scale[None], out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        ),
        "product for the gradient, turning included": milliseconds(
            lambda: torch.ops.ptd.fp8_linear_input(back, back_scale, own.weight)
        ),
        "turning the weight": milliseconds(lambda: own.weight.t().contiguous()),
    }  # fmt: skip


def speed(rows: Rows, tokens: int) -> None:
    for name in LAYER:
        if not rows.has(what="speed", of=name):
            with rows.row(what="speed", of=name) as row:
                if not torch.cuda.is_available():
                    raise Skip("speed needs a GPU: a CPU rounds as a GPU does, but says nothing about speed")
                row |= layer_speed(name, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--quick", action="store_true", help="two steps of one seed, to test the script")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.seeds = 2, [0]
    warnings.filterwarnings("ignore", message="MatMul8bitLt")
    settings = {name: getattr(arguments, name) for name in ("steps", "seeds", "tokens")}
    rows = Rows(
        arguments.output, ("what", "of"), program="fp8", packages=("bitsandbytes", "triton"), settings=settings,
        replace=arguments.replace, minutes=arguments.minutes,
    )  # fmt: skip
    speed(rows, arguments.tokens)
    with rows.work_folder() as folder:
        data = write_task(folder)
        free_memory()
        gradients(rows, folder, data, arguments.seeds[0], (1,))
        losses(rows, folder, data, arguments.seeds, arguments.steps)
        gradients(rows, folder, data, arguments.seeds[0], (arguments.steps,))
    rows.evidence["summary"] = summary(rows, arguments.seeds)
    rows.add()
    print(json.dumps(rows.evidence["summary"], indent=2))
    rows.close()


if __name__ == "__main__":
    main()
