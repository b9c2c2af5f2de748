"""``ptd plan``: estimate a run's memory and cost in each placement from its configuration, without weights or data."""

from __future__ import annotations

import importlib.util
import logging
import re
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ptd.backbone import architecture_of, fusion_of, load_tokenizer
from ptd.backbone.fake_model import blank_model
from ptd.config import RunConfig
from ptd.config.deepspeed import apply_deepspeed
from ptd.distributed.ranks import Ranks
from ptd.engine.forward import Forward
from ptd.engine.optimizers import OPTIMIZERS
from ptd.engine.prompt_step import Trained
from ptd.engine.setup import Prepared
from ptd.inject import CACHE, Attachment, check_supported
from ptd.methods import method
from ptd.planner.placement import FRAGMENTATION, GIB, GPU_CONTEXT_BYTES, ITEMS, Estimate, Machine, Placement, estimate
from ptd.planner.step_trace import Capability, Trace, split_encoder, trace_step, without_data
from ptd.planner.worst_case_batch import rows_of, sample_batch
from ptd.planner.zero3_gathers import Limits
from ptd.runs.build import build_step, build_trained, facts_of
from ptd.tasks import Task, make_task
from ptd.tasks.labels import with_assumed_labels
from ptd.types import Reporter, UserError
from ptd.values import decimal_size, memory_size

GPU: Capability = (9, 0)
"""The compute capability (Hopper) for which a planned GPU chooses its attention kernels."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Plan:
    """Estimates of the run's own placement, of all placements (lowest cost per token first), and of the best one."""

    own: Estimate
    estimates: list[Estimate]
    best: Estimate | None
    reason: str
    trace: Trace
    machine: Machine
    rows: int
    accumulation: int
    assumptions: list[str]
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with bytes and FLOPs as whole numbers."""
        return {
            "placement": self.own.placement.name,
            "best": None if self.best is None else self.best.placement.name,
            "reason": self.reason,
            "ranks_per_node": self.machine.ranks_per_node,
            "nodes": self.machine.nodes,
            "memory_bytes_per_rank": self.machine.memory,
            "usable_bytes_per_rank": self.machine.usable,
            "micro_batch_rows": self.rows,
            "micro_batch_tokens": self.trace.tokens,
            "micro_batches_per_step": self.accumulation,
            "backbone_parameters": self.parameters,
            "trained_parameters": self.trace.trained_numel,
            "prompt_numbers": self.trace.prompt_numel,
            "flops_per_token": self.trace.flops // max(1, self.trace.tokens),
            "placements": [_plain(each, own=each is self.own) for each in self.estimates],
            "assumptions": self.assumptions,
        }


def _plain(each: Estimate, *, own: bool) -> dict[str, Any]:
    return {
        "name": each.placement.name,
        "own": own,
        "quantization": each.placement.quantization,
        "sharding": each.placement.sharding,
        "group_size": each.placement.group_size,
        "offload": each.placement.offload,
        "peak_bytes": each.peak,
        "items": each.items,
        "host_bytes": each.host_bytes,
        "fits": each.fits,
        "largest_micro_batch_rows": each.largest_rows,
        "bytes_sent_inside_node_per_rank_and_step": each.sent_inside,
        "bytes_sent_between_nodes_per_node_and_step": each.sent_between,
        "estimated_seconds_per_token": each.seconds_per_token,
    }


def plan(
    config: RunConfig,
    *,
    gpus: int = 1,
    nodes: int = 1,
    memory: str = "80GiB",
    device: str = "cuda",
    supervised: float = 1.0,
    alternatives: bool = True,
    reporter: Reporter | None = None,
) -> Plan:
    """Trace one step of ``config`` and estimate placements of its weights on ``nodes`` nodes of ``gpus`` ranks each.

    ``memory``: memory of each GPU (on CPUs, of each rank), such as ``80GiB``. ``supervised``: share of a text's tokens
    that carry loss. Without ``alternatives``, only the run's own placement is estimated. Raises `UserError`.
    """
    reporter = reporter or Reporter()
    config, zero3 = apply_deepspeed(config)
    machine = Machine(gpus, nodes, parse_size(memory, "--gpu-memory"), is_gpu=device == "cuda")
    capability = GPU if machine.is_gpu else None
    own = _own_placement(config, machine)
    candidates = _candidates(own, machine) if alternatives else [own]
    limits, rows, accumulation = Limits.read(zero3), rows_of(config), config.train.gradient_accumulation_steps
    traces: dict[str, Trace] = {}
    for placement in [own, *candidates]:
        if placement.quantization not in traces:
            reporter.note(f"tracing a step with quantization: {placement.quantization}")
            traces[placement.quantization] = trace_run(
                config, placement.quantization, capability=capability, local_ranks=gpus, supervised=supervised
            )

    def judged(placement: Placement) -> Estimate:
        return estimate(
            traces[placement.quantization], placement, machine, rows=rows, accumulation=accumulation, limits=limits
        )

    of_run = judged(own)
    estimates = sorted(
        [of_run, *(judged(placement) for placement in candidates if placement != own)],
        key=lambda each: each.seconds_per_token,
    )
    best, reason = recommend(estimates, config)
    trace = traces[own.quantization]
    # bitsandbytes packs several weights into one byte, so the parameters are counted in the trace without quantisation.
    whole = traces.get("none") or trace
    parameters = sum(weight.numel for weight in whole.weights)
    assumed = _assumptions(config, machine, limits, supervised)
    return Plan(of_run, estimates, best, reason, trace, machine, rows, accumulation, assumed, parameters)


class Blank(NamedTuple):
    """A run's backbone and trained modules without data, and the task that they are for."""

    task: Task
    prepared: Prepared
    trained: Trained


def trace_run(
    config: RunConfig, quantization: str = "none", *, capability: Capability, local_ranks: int, supervised: float = 1.0
) -> Trace:
    """Trace one step of one micro-batch of the run, with the backbone in this ``quantization``. Raises `UserError`."""
    changed = {"quantization": quantization}
    if config.backbone.attention not in ("auto", "merge", "reference", CACHE):
        changed["attention"] = "merge"
    config = config.model_copy(update={"backbone": config.backbone.model_copy(update=changed)})
    OPTIMIZERS[config.train.optimizer].check(None)  # before the trace: it makes bitsandbytes' tables, with data
    with without_data(capability) as seen:
        device_type = "cpu" if capability is None else "cuda"
        task, prepared, trained = build_blank(config, device_type)
        split_encoder(trained.encoder, local_ranks)
        step = build_step(config, trained, Ranks(0, 1, 1, torch.device("cpu")), prepared.model.dtype)
        packed = config.data.packing and prepared.attachment.packable
        batch = sample_batch(config, task, trained.readout, rows_of(config), packed=packed, supervised=supervised)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trace_step(
                prepared, step, batch, seen, vocab_size=prepared.shape.vocab_size, on_gpu=capability is not None
            )


def build_blank(config: RunConfig, device_type: str) -> Blank:
    """Build what the run trains, and its backbone, without data, as they run on ``cuda`` or ``cpu``.

    All tensors are on the CPU. Call it inside `without_data`. Raises `UserError`.
    """
    config = config.model_copy(update={"task": with_assumed_labels(config.task)})
    task: Task = make_task(config.task, config.data, architecture_of(config.backbone))
    no_rows: Any = None  # the labels are given, so fitting reads no rows
    task = task.fit(no_rows, "the plan")
    chosen, facts = method(config.method_name), facts_of(config, task)
    chosen.check(config.method_config(), facts)
    tokenizer = _tokenizer(config, needed=facts.cloze)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from initialisers that read the values that they have set
        model = blank_model(config.backbone, task.output, device_type=device_type, check=check_supported)
        attachment = Attachment(model, backend=config.backbone.attention)
        prepared = Prepared(model, attachment, Forward(attachment, torch.device("cpu")), "")
        return Blank(task, prepared, build_trained(config, prepared, task, tokenizer))


def _tokenizer(config: RunConfig, *, needed: bool) -> Any:
    """Return the backbone's tokenizer, or None if it is missing and not ``needed``: most runs need only the config."""
    try:
        return load_tokenizer(config.backbone)
    except UserError:
        if needed:
            raise
        return None


def _own_placement(config: RunConfig, machine: Machine) -> Placement:
    backbone = config.backbone
    size = backbone.ranks_per_copy(machine.world_size, machine.ranks_per_node)
    return Placement(backbone.quantization, backbone.sharding, backbone.offload, size)


def _candidates(own: Placement, machine: Machine) -> list[Placement]:
    """Return the placements worth estimating on this machine."""
    found = [Placement()]
    local, world = machine.ranks_per_node, machine.world_size
    if importlib.util.find_spec("bitsandbytes") is not None:
        found += [Placement("int8"), Placement("nf4")]
        found += [Placement("nf4", "node", group_size=local)] if local > 1 else []
    if local > 1:
        found.append(Placement(sharding="node", group_size=local))
    if machine.nodes > 1:
        found.append(Placement(sharding="world", group_size=world))
    if machine.is_gpu:
        found.append(Placement(sharding="node", offload="cpu", group_size=local))
        if machine.nodes > 1:
            found.append(Placement(sharding="world", offload="cpu", group_size=world))
    same = {(each.quantization, each.group_size, each.offload) for each in [own]}
    return [each for each in found if (each.quantization, each.group_size, each.offload) not in same]


def recommend(estimates: list[Estimate], config: RunConfig) -> tuple[Estimate | None, str]:
    """Return the placement of lowest cost per token that fits, and the reason in one sentence.

    If none fits, return the cheapest that fits with fewer rows, or None if none fits even one row.
    """
    whole = next((each for each in estimates if each.placement == Placement()), None)
    without = "" if whole is None else f"; unsharded and unquantised they need {memory_size(whole.peak)} per rank"
    fitting = [each for each in estimates if each.fits]
    if not fitting:
        hint = "" if config.backbone.gradient_checkpointing else "set backbone.gradient_checkpointing: true, or "
        smaller = [each for each in estimates if each.largest_rows >= 1]
        least = min(estimates, key=lambda each: each.peak)
        if not smaller:
            return None, (
                f"no placement fits: {least.placement.name} needs the least memory, {memory_size(least.peak)} per "
                f"rank; {hint}use more or larger GPUs, or lower data.max_length"
            )
        return smaller[0], (
            f"no placement fits {rows_of(config)} rows per micro-batch; {smaller[0].placement.name} is the cheapest "
            f"that fits fewer rows ({smaller[0].largest_rows}); {hint}lower train.per_device_train_batch_size and "
            "raise train.gradient_accumulation_steps"
        )
    best = fitting[0]
    placement = best.placement
    sent = best.sent_for_weights
    if placement.offload != "none":
        why = "the weights do not fit on the GPUs, so they are in host memory and are copied to the GPUs for each use"
    elif placement.sharding == "world" and sent["between"]:
        traffic = decimal_size(sent["between"])
        why = f"the weights fit sharded over all nodes; to gather them, a node sends {traffic} per step"
    elif placement.group_size > 1:
        why = f"the weights fit sharded over {placement.group_size} ranks, and none are sent between nodes{without}"
    elif placement.quantization != "none":
        why = f"the quantised weights fit on every rank, so only the prompt's gradient is sent{without}"
    else:
        why = "all weights fit on every rank, so only the prompt's gradient is sent and nothing is gathered or unpacked"
    return best, f"{placement.name} has the lowest cost per token of the placements that fit; {why}"


def _assumptions(config: RunConfig, machine: Machine, limits: Limits, supervised: float) -> list[str]:
    found = [
        f"every row has data.max_length = {config.data.max_length} tokens, and {supervised:.0%} of a text's tokens "
        "carry loss",
        "the FLOPs of a token include the forward pass, the backward pass and recomputation; a multiplication and an "
        "addition count as two FLOPs, and attention includes masked pairs",
    ]
    if machine.is_gpu:
        found.append(
            f"attention runs as on a GPU of compute capability {'.'.join(map(str, GPU or ()))}; "
            f"{GPU_CONTEXT_BYTES / GIB:g} GiB of its memory is reserved for the CUDA context, and "
            f"{FRAGMENTATION:.0%} of the peak for fragmentation"
        )
        found.append(str(fusion_of(config.backbone, "cuda")))
    found.append(
        f"DeepSpeed keeps gathered weights that are used again within {limits.max_reuse_distance:.0e} numbers, and "
        f"keeps weights of up to {limits.param_persistence_threshold:.0e} numbers gathered all the time"
    )
    return found


def parse_size(text: str, what: str) -> int:
    """Return the bytes of ``80GiB``, ``24 GB`` or a plain number; raises a `UserError` that names ``what``."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else None
    try:
        size = int(float(match[1]) * _UNITS[unit]) if match and unit is not None else 0
    except (KeyError, ValueError):
        size = 0
    if size < 1:
        raise UserError(f"{what}: got {text!r}; write a size such as 80GiB or 24GB")
    return size


__all__ = ["ITEMS", "Plan", "parse_size", "plan", "recommend", "trace_run"]
