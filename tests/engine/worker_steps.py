"""Run on ranks by test_steps.py: measure many cases of the engine in one process group; the results are JSON.

    torchrun --nproc-per-node N worker_steps.py BACKBONE_FOLDER RESULTS.json

Nothing is asserted here. A case's numbers are the worst over all ranks.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache

from ptd.checkpoint import Saver
from ptd.checkpoint.run_state import load_tensors, state_tensors
from ptd.config import BackboneConfig, TrainConfig, parse_config
from ptd.config.deepspeed import apply_deepspeed
from ptd.data import Batches
from ptd.distributed.network_meter import NetworkMeter, metered_deepspeed
from ptd.distributed.ranks import Ranks
from ptd.engine.loop import Loop
from ptd.engine.loss_scale import LossScale
from ptd.engine.member import Failed, Member
from ptd.engine.prompt_step import PromptStep, Trained, build_optimizer
from ptd.engine.setup import Prepared, prepare
from ptd.methods.prefix import PrefixEncoder
from ptd.readouts import Ask, Run
from ptd.readouts.language_model import LanguageModel
from ptd.types import IGNORE_INDEX, Batch, DataReport, Examples, Reporter, UserError

P, EMBEDDING = 5, 12
STEPS = 3
MAX_GRAD_NORM = 0.05  # far below the norms of these cases, so that clipping acts in every step
# A large epsilon keeps AdamW's update a smooth function of the gradient. With the usual 1e-8, an entry that rounds to
# the other side of zero moves by the whole learning rate, and no tolerance could distinguish that from an error.
OPTIMIZER = {"learning_rate": 0.05, "betas": (0.9, 0.99), "epsilon": 1e-3, "weight_decay": 0.1}


# ---- data: rows of very different length and supervision, so that a mean of means is far from the mean


def make_examples(rows: int, seed: int) -> Examples:
    draw = np.random.default_rng(seed)
    lengths = draw.permutation(np.geomspace(3, 60, rows).round().astype(np.int64))
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    tokens = draw.integers(3, 259, offsets[-1]).astype(np.int32)
    supervised = np.zeros(offsets[-1], dtype=bool)
    for begin, end in itertools.pairwise(offsets):
        supervised[draw.integers(begin + 1, end) : end] = True
    return Examples.of_text(tokens, supervised, offsets, DataReport(rows, int(offsets[-1]), int(supervised.sum())))


EXAMPLES = make_examples(rows=10, seed=3)


def make_batches(ranks: Ranks, accumulation: int, packing: bool) -> Batches:
    """Return batches of ten rows in which some slots have no row.

    The steps have four rows and at the end two, or eight and at the end two, or all ten rows in sixteen slots.
    """
    return Batches(
        EXAMPLES,
        rank=ranks.rank,
        world_size=ranks.world_size,
        per_device_batch_size=max(1, 4 // (ranks.world_size * accumulation)),
        gradient_accumulation_steps=accumulation,
        packing=packing,
        seed=1,
    )


# ---- the reference: one process, fp64, plain autograd, transformers' own attention and cache, no engine


class Reference:
    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).requires_grad_(False)

    def row_loss(self, encoder: PrefixEncoder, flat: Tensor, row: int) -> tuple[Tensor, int]:
        """Return the sum of a row's cross-entropies, and their number."""
        cache, state = DynamicCache(), encoder.state(flat)
        for layer, (key, value) in enumerate(zip(state.keys, state.values, strict=True)):
            cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], layer)
        ids, labels = (torch.from_numpy(part.astype(np.int64)) for part in EXAMPLES[row])
        positions = torch.arange(P, P + len(ids))[None]
        logits = self.model(input_ids=ids[None], position_ids=positions, past_key_values=cache).logits[0]
        losses = cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX)
        return losses.sum(), int((labels != IGNORE_INDEX).sum())

    def train(self, encoder: PrefixEncoder, rows_of_steps: list[list[int]]) -> dict[str, Any]:
        """Run optimizer steps on the mean loss over all supervised tokens of each step."""
        encoder = copy.deepcopy(encoder).double()
        optimizer = torch.optim.AdamW(
            encoder.parameters(),
            lr=OPTIMIZER["learning_rate"],
            betas=OPTIMIZER["betas"],
            eps=OPTIMIZER["epsilon"],
            weight_decay=OPTIMIZER["weight_decay"],
        )
        losses, norms, gradients = [], [], []
        for rows in rows_of_steps:
            optimizer.zero_grad()
            sums, counts = zip(*(self.row_loss(encoder, encoder(), row) for row in rows), strict=True)
            loss = torch.stack(sums).sum() / sum(counts)
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(encoder.parameters(), MAX_GRAD_NORM)))
            losses.append(float(loss.detach()))
            gradients.append({name: parameter.grad.clone() for name, parameter in encoder.named_parameters()})
            optimizer.step()
        parameters = {name: parameter.detach() for name, parameter in encoder.named_parameters()}
        return {"losses": losses, "norms": norms, "gradients": gradients, "parameters": parameters}

    def mean_of_means(self, encoder: PrefixEncoder, rows: list[int]) -> float:
        """Return the relative error of the gradient of the mean of row means, against that of the mean over tokens."""
        encoder = copy.deepcopy(encoder).double()
        flat = encoder()
        pairs = [self.row_loss(encoder, flat, row) for row in rows]
        right = sum(total for total, _ in pairs) / sum(count for _, count in pairs)
        wrong = sum(total / count for total, count in pairs) / len(pairs)
        parameters = list(encoder.parameters())
        right_grad = torch.autograd.grad(right, parameters, retain_graph=True)
        wrong_grad = torch.autograd.grad(wrong, parameters)
        return relative(wrong_grad[0], right_grad[0])


# ---- comparing


def relative(measured: Tensor, expected: Tensor) -> float:
    return float((measured.double() - expected.double()).norm() / expected.double().norm())


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def worst_of_ranks(value: float) -> float:
    values = gather(value)
    return max(math.inf if math.isnan(one) else one for one in values)


def gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def fingerprint(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + whole(tensors[name]).numpy().tobytes())
    return digest.hexdigest()


# ---- parts


def make_encoder(prepared: Prepared, kind: str, *, hidden: int = 16) -> PrefixEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        wide = (
            {} if kind in ("direct", "frozen_first") else {"embedding_size": EMBEDDING, "encoder_hidden_size": hidden}
        )
        encoder = PrefixEncoder(prepared.shape.layers, P, **wide)
        if kind == "frozen_first":
            encoder.freeze_first_token()
        return encoder


def make_step(encoder: PrefixEncoder, ranks: Ranks, loss_scale: LossScale | None = None) -> PromptStep:
    trained = Trained(ranks.distribute(copy.deepcopy(encoder)), LanguageModel())
    optimizer = build_optimizer(trained, **OPTIMIZER)
    return PromptStep(trained, optimizer, ranks, NetworkMeter(ranks), MAX_GRAD_NORM, loss_scale)


class Notes(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def make_loop(
    prepared: Prepared,
    step: PromptStep,
    batches: Batches,
    ranks: Ranks,
    on_record: Callable[[dict[str, Any]], None],
    *,
    run: Run | None = None,
    reporter: Reporter | None = None,
) -> Loop:
    config = TrainConfig(learning_rate=OPTIMIZER["learning_rate"], lr_scheduler_type="constant", logging_steps=1)
    member = Member(config, step, batches, on_record=on_record)
    return Loop(prepared if run is None else replace(prepared, run=run), ranks, reporter or Reporter(), [member])


# ---- cases


def training_case(
    prepared: Prepared,
    reference: dict[str, Any],
    encoder: PrefixEncoder,
    ranks: Ranks,
    accumulation: int,
    packing: bool,
) -> dict[str, Any]:
    """Run three steps of the engine and compare them with the reference."""
    step = make_step(encoder, ranks)
    gradients: list[dict[str, Tensor]] = []

    def keep_gradients(*_: Any) -> None:
        gradients.append({name: whole(parameter.grad) for name, parameter in step.encoder.named_parameters()})

    step.optimizer.register_step_pre_hook(keep_gradients)
    records: list[dict[str, Any]] = []
    batches = make_batches(ranks, accumulation, packing)
    make_loop(prepared, step, batches, ranks, records.append).run(0, [STEPS])

    errors = {
        f"step {index + 1}: {name}": relative(gradients[index][name], expected)
        for index in range(STEPS)
        for name, expected in reference["gradients"][index].items()
    }
    worst = max(errors, key=lambda name: errors[name])
    start = dict(encoder.named_parameters())
    parameters = {name: whole(parameter) for name, parameter in step.encoder.named_parameters()}
    fillers = sum(not batch.supervised_tokens for index in range(STEPS) for batch in batches.step(index))
    return {
        "gradient_error": worst_of_ranks(errors[worst]),
        "worst_gradient": worst,
        "parameter_error": worst_of_ranks(
            max(relative(parameters[name], expected) for name, expected in reference["parameters"].items())
        ),
        "change_error": worst_of_ranks(
            max(
                relative(parameters[name] - start[name].detach(), expected - start[name].detach())
                for name, expected in reference["parameters"].items()
            )
        ),
        "loss_error": worst_of_ranks(relative_list([r["loss"] for r in records], reference["losses"])),
        "norm_error": worst_of_ranks(relative_list([r["grad_norm"] for r in records], reference["norms"])),
        "smallest_norm": min(reference["norms"]),
        "clipped_norms": [float(torch.stack([g.norm() for g in step_.values()]).norm()) for step_ in gradients],
        "ranks_equal": len(set(gather(fingerprint(parameters)))) == 1,
        "fillers": sum(gather(fillers)),
        "supervised": [record["supervised_tokens"] for record in records],
        "tokens": [record["tokens"] for record in records],
        "expected_tokens": [int(EXAMPLES.lengths(np.array(batches.rows(index))).sum()) for index in range(STEPS)],
        "expected_supervised": [batches.supervised_tokens(index) for index in range(STEPS)],
    }


def relative_list(measured: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(measured, expected, strict=True))


def sharding_case(prepared: Prepared, batches: Batches, ranks: Ranks, hidden: int) -> dict[str, Any]:
    """Return the bytes of the wide layer's weight, and each rank's bytes of it and of AdamW's state after a step."""
    step = make_step(make_encoder(prepared, "mlp", hidden=hidden), ranks)
    make_loop(prepared, step, batches, ranks, lambda record: None).run(0, [1])
    weight = step.encoder.transform[2].weight
    held = {"weight": weight, **step.optimizer.state[weight]}
    local = {
        name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage().nbytes()
        for name, tensor in held.items()
    }
    return {"full": weight.numel() * weight.element_size(), "local": gather(local)}


def network_case(
    prepared: Prepared, batches: Batches, ranks: Ranks, encoder: PrefixEncoder, placement: str
) -> dict[str, Any]:
    """Return the bytes of a step according to the meter, and the numbers of collectives by the meter and by torch."""
    step = make_step(encoder, ranks)
    counted: list[tuple[str, str, int]] = []
    add = step.meter.add

    def counting_add(source: str, kind: str, size: int, members: list[int], root: int = 0) -> None:
        counted.append((source, kind, size))
        add(source, kind, size, members, root)

    step.meter.add = counting_add
    records: list[dict[str, Any]] = []
    torchs_count = CommDebugMode()
    with ExitStack() as stack:

        def keep(record: dict[str, Any]) -> None:
            records.append(record)
            if len(records) == 3:  # ZeRO-3 first traces the order of the layers, and compares it across all ranks
                counted.clear()
                stack.enter_context(torchs_count)

        if placement == "zero3":
            stack.enter_context(metered_deepspeed(step.meter))
        make_loop(prepared, step, batches, ranks, keep).run(0, [4])
    kinds: dict[str, int] = {}
    for _, kind, _ in counted:
        kinds[kind] = kinds.get(kind, 0) + 1
    return {
        "bytes": {key: records[3][key] for key in records[3] if key.startswith("network")},
        "counted": kinds,
        "torch": {str(operation): count for operation, count in torchs_count.get_comm_counts().items()},
        "collectives": [list(entry) for entry in counted if entry[0] == "prompt"],
    }


def sum_over_nodes_case(ranks: Ranks, nodes: Ranks) -> dict[str, Any]:
    """Sum a gradient of every rank node by node and in one call; not all sizes are divisible by two ranks."""
    draw = torch.Generator().manual_seed(ranks.rank)
    results: dict[str, Any] = {"errors": [], "ranks_equal": [], "collectives": []}
    for numel in (7, 4096, 4097):
        own = torch.randn(numel, generator=draw)
        with CommDebugMode() as counts:
            by_nodes = nodes.all_reduce(own.clone())
        results["errors"].append(relative(by_nodes, ranks.all_reduce(own)))
        results["ranks_equal"].append(len(set(gather(fingerprint({"sum": by_nodes})))) == 1)
        results["collectives"].append(counts.get_total_counts())
    return results


def shard_groups_case(nodes: Ranks) -> dict[str, Any]:
    """Return, by rank, the ranks that share a copy of the backbone; the last two settings repeat earlier groups."""
    asked = [("world", None), ("node", None), ("node", 1), ("node", 4), ("node", 2)]
    backbones = [BackboneConfig(path="any", sharding=sharding, sharding_group_size=size) for sharding, size in asked]
    groups = [nodes.shard_group(backbone) for backbone in backbones]
    refusal = ""
    try:
        nodes.shard_group(BackboneConfig(path="any", sharding="node", sharding_group_size=3))
    except UserError as error:
        refusal = str(error)
    members = [None if group is None else dist.get_process_group_ranks(group) for group in groups]
    return {"members": gather(members), "made_once": groups[4] is groups[1], "refusal": refusal}


@contextmanager
def poisoned(prepared: Prepared, when: Callable[[], bool], kind: str) -> Iterator[Run]:
    """Yield the model's ``run``; if ``when()`` is true, its loss is NaN or inf, or only its gradient is not finite."""

    def run(batch: Batch, ask: Ask) -> Tensor:
        output = prepared.run(batch, ask)
        if when():
            if kind == "gradient":
                output.register_hook(lambda gradient: gradient * math.inf)
            else:
                output = output * (math.nan if kind == "nan" else -math.inf)
        return output

    yield run


def skipping_case(
    prepared: Prepared, ranks: Ranks, encoder: PrefixEncoder, kind: str, loss_scale: LossScale | None = None
) -> dict[str, Any]:
    """Run five steps; step 3 is poisoned in the first of the last rank's two micro-batches."""
    step = make_step(encoder, ranks, loss_scale)
    calls = 0

    def when() -> bool:
        nonlocal calls
        calls += 1
        return ranks.rank == ranks.world_size - 1 and calls == 2 * 2 + 1

    def everything() -> dict[str, Tensor]:
        return {name: whole(tensor) for name, tensor in state_tensors(step.trained, step.optimizer).items()}

    records, states, notes = [], [fingerprint(everything())], Notes()

    def on_record(record: dict[str, Any]) -> None:
        records.append(record)
        states.append(fingerprint(everything()))

    with poisoned(prepared, when, kind) as run:
        batches = make_batches(ranks, accumulation=2, packing=True)
        make_loop(prepared, step, batches, ranks, on_record, run=run, reporter=notes).run(0, [5])
    return {
        "changed": [before != after for before, after in itertools.pairwise(states)],
        "skipped": gather([record["skipped_steps"] for record in records]),
        "finite": all(bool(torch.isfinite(tensor).all()) for tensor in everything().values()),
        "ranks_equal": len(set(map(tuple, gather(states)))) == 1,
        "notes": notes.lines,
        "states": states,
        "loss_scale": gather([record.get("loss_scale") for record in records]),
        "optimizer_steps": float(next(iter(step.optimizer.state.values()))["step"]),
    }


def giving_up_case(prepared: Prepared, ranks: Ranks, encoder: PrefixEncoder, bad_steps: range) -> dict[str, Any]:
    """Make rank 0's loss NaN in ``bad_steps`` (step indices); return what the ranks raise and the number of records."""
    step = make_step(encoder, ranks)
    calls = 0

    def when() -> bool:
        nonlocal calls
        calls += 1
        return ranks.rank == 0 and calls - 1 in bad_steps

    records: list[dict[str, Any]] = []
    with poisoned(prepared, when, "nan") as run:
        loop = make_loop(prepared, step, make_batches(ranks, 1, True), ranks, records.append, run=run)
        (ended,) = loop.run(0, [14])
    raised = ended.reason if isinstance(ended, Failed) else ""
    return {"raised": gather(raised), "records": len(records)}


def checkpoint_case(prepared: Prepared, batches: Batches, writers: Ranks, readers: Ranks) -> dict[str, Any]:
    """Write tensors with one arrangement of ranks, read them with another; return those that are not bit-identical."""
    encoder = make_encoder(prepared, "mlp")
    step = make_step(encoder, writers)
    make_loop(prepared, step, batches, writers, lambda record: None).run(0, [2])
    folder = [tempfile.mkdtemp() if writers.is_main else ""]
    dist.broadcast_object_list(folder, src=0)
    written = state_tensors(step.trained, step.optimizer)
    saver = Saver(Path(folder[0]), writers, keep=1)
    saver.save(2, written, {"rows": 1})
    saver.wait()
    kept = Path(folder[0]) / "step-000002"
    other = make_step(make_encoder(prepared, "mlp"), readers)
    read = state_tensors(other.trained, other.optimizer)
    load_tensors(kept, read)
    same = {name: torch.equal(whole(read[name]), whole(written[name])) for name in written}
    return {"tensors": len(written), "different": [name for name, equal in same.items() if not equal]}


# ---- all cases


def sharded(folder: str, ranks: Ranks, sharding: str) -> Prepared:
    raw = {
        "backbone": {"path": folder, "dtype": "float32", "sharding": sharding},
        "method": {"name": "prefix"},
        "data": {},
        # A threshold of 0, because by default DeepSpeed would shard no weight of a backbone as small as this one.
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    }
    config, zero3 = apply_deepspeed(parse_config(raw))
    assert zero3 is not None
    return prepare(config.backbone, ranks, zero3)


def main(folder: str, results_file: str) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.start(needs_group=True)
    backbone = parse_config(
        {"backbone": {"path": folder, "dtype": "float32"}, "method": {"name": "prefix"}, "data": {}}
    ).backbone
    prepared = {
        "replicated": prepare(backbone, ranks),
        "zero3": sharded(folder, ranks, "world"),
    }
    plain = prepared["replicated"]
    results: dict[str, Any] = {}

    variants: dict[str, tuple[PrefixEncoder, Ranks]] = {
        "direct": (make_encoder(plain, "direct"), ranks),
        "mlp": (make_encoder(plain, "mlp"), ranks),
    }
    extra: dict[str, tuple[PrefixEncoder, Ranks]] = {
        "frozen_first": (make_encoder(plain, "frozen_first"), ranks),
        "uneven_mlp": (make_encoder(plain, "mlp", hidden=6), ranks),
        "narrow_mlp": (make_encoder(plain, "mlp", hidden=3), ranks),
    }
    if ranks.world_size == 4:  # two nodes of two ranks: the encoder is split within a node and replicated across nodes
        extra["two_nodes_mlp"] = (make_encoder(plain, "mlp"), Ranks(ranks.rank, 4, 2, ranks.device))

    # The ranks divide the references among themselves and then exchange them.
    needed = [*itertools.product(variants, (1, 4)), *((name, 1) for name in extra)]
    own = Reference(folder)
    computed: dict[tuple[str, int], Any] = {}
    for name, accumulation in needed[ranks.rank :: ranks.world_size]:
        batches = make_batches(ranks, accumulation, True)
        encoder = {**variants, **extra}[name][0]
        computed[name, accumulation] = own.train(encoder, [batches.rows(index) for index in range(STEPS)])
    references = {key: value for part in gather(computed) for key, value in part.items()}
    results["backbone_parameters"] = sum(parameter.numel() for parameter in own.model.parameters())
    results["mean_of_means"] = own.mean_of_means(variants["direct"][0], make_batches(ranks, 1, True).rows(0))

    for (name, (encoder, _)), placement, accumulation, packing in itertools.product(
        variants.items(), prepared, (1, 4), (True, False)
    ):
        case = f"training/{placement}/accumulation{accumulation}/{name}/{'packed' if packing else 'padded'}"
        results[case] = training_case(
            prepared[placement], references[name, accumulation], encoder, ranks, accumulation, packing
        )
    for name, (encoder, arrangement) in extra.items():
        try:
            results[f"training/{name}"] = training_case(plain, references[name, 1], encoder, arrangement, 1, True)
        except RuntimeError as error:  # shapes mismatch on every rank alike, so no rank waits for another
            results[f"training/{name}"] = {"error": str(error)}

    batches = make_batches(ranks, 1, True)
    results["sharding"] = sharding_case(plain, batches, ranks, hidden=64)
    for placement in prepared:
        encoders = {"direct": variants["direct"][0]}
        encoders |= {f"mlp{hidden}": make_encoder(plain, "mlp", hidden=hidden) for hidden in (8, 64, 512)}
        for name, encoder in encoders.items():
            case = f"network/{placement}/{name}"
            results[case] = network_case(prepared[placement], batches, ranks, encoder, placement)
    for name, kind in (("direct", "nan"), ("direct", "inf"), ("mlp", "nan"), ("mlp", "gradient")):
        results[f"skipping/{name}/{kind}"] = skipping_case(plain, ranks, variants[name][0], kind)
    results["skipping/mlp/scaled"] = skipping_case(plain, ranks, variants["mlp"][0], "gradient", LossScale())
    results["giving_up/ten"] = giving_up_case(plain, ranks, variants["direct"][0], range(2, 12))
    results["giving_up/nine"] = giving_up_case(plain, ranks, variants["direct"][0], range(2, 11))
    if ranks.world_size == 4:
        nodes = extra["two_nodes_mlp"][1]
        for name in ("direct", "mlp8", "mlp512"):
            hidden = 0 if name == "direct" else int(name[3:])
            encoder = make_encoder(plain, name, hidden=hidden)
            results[f"nodes/{name}"] = network_case(plain, batches, nodes, encoder, "replicated")
        direct = variants["direct"][0]
        results["nodes/world"] = network_case(prepared["zero3"], batches, nodes, direct, "zero3")
        results["nodes/node"] = network_case(sharded(folder, nodes, "node"), batches, nodes, direct, "zero3")
        results["nodes/sums"] = sum_over_nodes_case(ranks, nodes)
        results["nodes/shard_groups"] = shard_groups_case(nodes)
        results["checkpoint/nodes_to_flat"] = checkpoint_case(plain, batches, nodes, ranks)
        results["checkpoint/flat_to_nodes"] = checkpoint_case(plain, batches, ranks, nodes)
    if ranks.is_main:
        Path(results_file).write_text(json.dumps(results, indent=1))
    ranks.barrier()
    ranks.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
