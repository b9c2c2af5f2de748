"""Run on two ranks by test_optimizers.py: every optimizer on an encoder whose wide layer the ranks share.

    torchrun --nproc-per-node 2 worker_optimizers.py RESULTS.json

Nothing is asserted here. Names are collected over both ranks.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ptd.checkpoint import Saver
from ptd.checkpoint.run_state import load_tensors, state_tensors
from ptd.distributed.ranks import Ranks
from ptd.engine.lion import Lion
from ptd.engine.optimizers import OPTIMIZERS
from ptd.engine.own_part import own_part
from ptd.engine.prompt_step import Trained, build_optimizer
from ptd.methods.prefix import PrefixEncoder
from ptd.readouts.language_model import LanguageModel
from ptd.types import LayerShape, UserError

SETTINGS: dict[str, Any] = {"betas": (0.9, 0.97), "weight_decay": 0.3}
RATE, STEPS = 0.02, 4
HIDDEN = 512  # the last layer has 512 × 64 numbers, and a rank holds half of each row


def make(ranks: Ranks, name: str) -> tuple[Trained, Any]:
    torch.manual_seed(3)
    encoder = PrefixEncoder([LayerShape(2, 8, 8)] * 2, 5, embedding_size=12, encoder_hidden_size=HIDDEN)
    trained = Trained(ranks.distribute(encoder), LanguageModel())
    return trained, build_optimizer(trained, name, learning_rate=RATE, epsilon=1e-8, **SETTINGS)


def gradient(parameter: Tensor, step: int) -> Tensor:
    """Return the gradient of a step, the same on all ranks, split as the parameter is."""
    draw = torch.Generator().manual_seed(100 * step + parameter.numel())
    whole = torch.randn(parameter.shape, generator=draw) * torch.logspace(-3, 0, parameter.shape[-1])
    if isinstance(parameter, DTensor):
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    return whole


def take(trained: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        for parameter in trained.parameters():
            parameter.grad = gradient(parameter, step)
        optimizer.step()


def alone(name: str, values: Tensor, rate: float, gradients: list[Tensor]) -> Tensor:
    """Return what another implementation of the optimizer makes of one rank's part."""
    parameter = nn.Parameter(values.clone().contiguous())
    given: dict[str, Any] = {"lr": rate, **SETTINGS}
    optimizer = {
        "adamw": lambda: torch.optim.AdamW([parameter], eps=1e-8, foreach=True, **given),
        "adamw_8bit": lambda: bitsandbytes.optim.AdamW8bit([parameter], eps=1e-8, min_8bit_size=SMALLEST, **given),
        "lion": lambda: Lion([parameter], **given),
    }[name]()
    for each in gradients:
        parameter.grad = each.clone().contiguous()
        optimizer.step()
    return parameter.detach()


SMALLEST = 4096


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in one.items() if not own_part(tensor).equal(own_part(other[name]))]


def gather(found: list[str]) -> list[str]:
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return sorted({name for each in everywhere for name in each}, key=lambda name: (name.split(".")[:2], name))


def case(ranks: Ranks, name: str) -> dict[str, Any]:
    global SMALLEST
    trained, optimizer = make(ranks, name)
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    start = {key: own_part(parameter).clone() for key, parameter in trained.encoder.named_parameters()}
    take(trained, optimizer, range(STEPS))
    wrong, split = [], []
    for key, parameter in trained.encoder.named_parameters():
        if isinstance(parameter, DTensor) and not all(each.is_replicate() for each in parameter.placements):
            split.append(key)
        SMALLEST = 1 if parameter.numel() >= 4096 else 1 << 30  # as for the whole parameter
        gradients = [own_part(gradient(parameter, step)) for step in range(STEPS)]
        if not own_part(parameter).equal(alone(name, start[key], rates[parameter], gradients)):
            wrong.append(key)

    folder = [tempfile.mkdtemp() if ranks.is_main else ""]
    dist.broadcast_object_list(folder, src=0)
    saver = Saver(Path(folder[0]), ranks, keep=1)
    saver.save(STEPS, state_tensors(trained, optimizer), {})
    saver.wait()
    kept = Path(folder[0]) / f"step-{STEPS:06d}"
    again, other = make(ranks, name)
    load_tensors(kept, state_tensors(again, other))
    loaded = different(state_tensors(trained, optimizer), state_tensors(again, other))
    for each in ((trained, optimizer), (again, other)):
        take(*each, range(STEPS, 2 * STEPS))
    later = different(state_tensors(trained, optimizer), state_tensors(again, other))

    refused = []
    own_node, its_optimizer = make(Ranks(ranks.rank, 2, 1, ranks.device), name)  # each rank is a node: nothing is split
    try:
        load_tensors(kept, state_tensors(own_node, its_optimizer))
    except UserError as error:
        refused = [f"rank {ranks.rank}: {error}"]
    return {
        "split": split,
        "tensors": len(state_tensors(trained, optimizer)),
        "different from the part alone": gather(wrong),
        "different after loading": gather(loaded),
        "different after more steps": gather(later),
        "refusals on another number of ranks": gather(refused),
    }


def main(results_file: str) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.start(needs_group=True)
    results = {name: case(ranks, name) for name in OPTIMIZERS}
    if ranks.is_main:
        Path(results_file).write_text(json.dumps(results, indent=1), encoding="utf-8")
    ranks.barrier()
    ranks.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
