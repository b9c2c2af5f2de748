"""Run by test_zero3.py on four ranks as two nodes: measure sharded backbones against whole ones.

    torchrun --nproc-per-node 4 worker_zero3.py CASES.json RESULTS.json

A case has a name, the ``backbone`` section of a RUN.yaml and further settings. Nothing is asserted here; the numbers of
a case are the worst over all ranks.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ptd.backbone import load_model
from ptd.config import BackboneConfig, parse_config
from ptd.config.deepspeed import apply_deepspeed
from ptd.distributed.ranks import Ranks
from ptd.distributed.zero3 import Shards
from ptd.engine.setup import Prepared, prepare
from ptd.methods.prefix import PrefixEncoder
from ptd.types import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from loading_memory import peaks

ALONE = Ranks(0, 1, 1, torch.device("cpu"))
RANKS_A_NODE = 2
TOKENS = 24


def settings_of(case: dict[str, Any]) -> tuple[Any, Any]:
    raw = {
        "backbone": case["backbone"],
        "method": {"name": "prefix"},
        "data": {},
        # A threshold of 0, because by default DeepSpeed would shard no weight of backbones as small as these.
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0, **case.get("zero", {})}},
    }
    if case["backbone"].get("sharding", "none") != "none" or case.get("zero"):
        raw["deepspeed"]["zero_optimization"]["stage"] = 3
    else:
        del raw["deepspeed"]
    return apply_deepspeed(parse_config(raw))


def passes(prepared: Prepared, ids: Tensor) -> dict[str, Any]:
    """Run two training passes with a pass without gradients between them; return the results of the second."""
    torch.manual_seed(1)
    encoder = PrefixEncoder(prepared.shape.layers, 5)
    model, results = prepared.model, {}
    inputs = {"input_ids": ids, **({"use_cache": False} if "use_cache" in model.forward.__code__.co_varnames else {})}
    for number in range(2):
        encoder.zero_grad()
        prepared.attachment.set(encoder.state(encoder()))
        output = model(**inputs)[0].float()
        loss = output.square().mean()
        loss.backward()
        results = {"loss": float(loss.detach()), "gradient": encoder.embedding.grad.clone(), "output": output.detach()}
        if not number:
            with torch.no_grad():
                model(**inputs)
    return results


def layer_runs(prepared: Prepared, ids: Tensor) -> dict[str, Any]:
    """Return the tokens in each call of the last layer's MLP, in a training pass and then in generation, and the text.

    As in training, the first pass computes the gradient of the prompt.
    """
    encoder = PrefixEncoder(prepared.shape.layers, 5)
    prepared.attachment.set(encoder.state(encoder()))
    runs: list[int] = []
    layer = [module for name, module in prepared.model.named_modules() if name.endswith(".mlp")][-1]
    hook = layer.register_forward_pre_hook(lambda module, args: runs.append(args[0].shape[1]))
    prepared.model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    trained = len(runs)
    text = prepared.model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    hook.remove()
    return {"trained": runs[:trained], "generated": runs[trained:], "text": text[:, TOKENS:].tolist()}


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return every parameter as it is used, by its first name; sharded parameters are gathered one at a time."""
    from deepspeed.runtime.zero import GatheredParameters

    found = {}
    for name, parameter in model.named_parameters():
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    return found


def relative(measured: Tensor, expected: Tensor) -> float:
    return float((measured.double() - expected.double()).norm() / expected.double().norm())


def worst(value: float) -> float:
    return max(gather(value))


def gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def measure_loading(config: BackboneConfig, zero3: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    shards = Shards(zero3, ranks.shard_group(config))
    with peaks() as peak:
        with shards.receiving():
            model = load_model(config, device=ranks.device, sharded=True)
        shards.run(model)
    sizes = [(p.ds_tensor.numel(), p.ds_numel, p.ds_tensor.element_size()) for p in model.parameters()]
    return {
        "peak": worst(peak[0]),
        "shard": worst(sum(own * width for own, _, width in sizes)),
        "largest": max(whole * width for _, whole, width in sizes),
        "whole": sum(whole * width for _, whole, width in sizes),
    }


def measure(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    config, zero3 = settings_of(case)
    output = case.get("output", "causal_lm")
    if case.get("only_load"):
        return measure_loading(config.backbone, zero3, ranks)
    try:
        parted = prepare(config.backbone, ranks, zero3, output=output)
    except UserError as error:
        return {"refused": str(error)}
    plain = {key: value for key, value in case["backbone"].items() if not key.startswith(("sharding", "offload"))}
    whole = prepare(
        parse_config({"backbone": plain, "method": {"name": "prefix"}, "data": {}}).backbone, ALONE, output=output
    )
    ids = torch.randint(5, 200, (2, TOKENS), generator=torch.Generator().manual_seed(ranks.rank))
    results: dict[str, Any] = {"fingerprints": [parted.fingerprint, whole.fingerprint]}
    if zero3 is not None:
        parameters = list(parted.model.parameters())
        weights, expected = weights_of(parted.model), weights_of(whole.model)
        results["shards"] = sorted({len(dist.get_process_group_ranks(p.ds_process_group)) for p in parameters})
        results["whole"] = sum(gather(sum(p.ds_tensor.numel() >= p.ds_numel > 4 for p in parameters)))
        results["names"] = weights.keys() == expected.keys()
        results["different"] = sorted(
            {name for part in gather([n for n in expected if not same(weights[n], expected[n])]) for name in part}
        )
    if "checkpointing" in case:  # before any other pass: the first pass is the one to measure
        torch.manual_seed(2)
        results["runs"] = gather(layer_runs(parted, ids))
        torch.manual_seed(2)
        results["runs_whole"] = gather(layer_runs(whole, ids))
    measured, expected_pass = passes(parted, ids), passes(whole, ids)
    results["loss_error"] = worst(abs(measured["loss"] - expected_pass["loss"]) / abs(expected_pass["loss"]))
    results["output_error"] = worst(relative(measured["output"], expected_pass["output"]))
    results["gradient_error"] = worst(relative(measured["gradient"], expected_pass["gradient"]))
    results["gradient_norm"] = float(measured["gradient"].norm())
    return results


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def main(cases_file: str, results_file: str) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(RANKS_A_NODE)
    ranks = Ranks.start(needs_group=True)
    cases = json.loads(Path(cases_file).read_text())
    results = {}
    for name, case in cases.items():
        results[name] = measure(case, ranks)
    if ranks.is_main:
        Path(results_file).write_text(json.dumps(results, indent=1))
    ranks.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
