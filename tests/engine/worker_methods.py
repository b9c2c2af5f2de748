"""Run on ranks by test_methods_on_ranks.py: measure runs of many methods in one process group.

    torchrun --nproc-per-node N worker_methods.py CASES.json RESULTS.json

A case has a name and the content of a RUN.yaml. Nothing is asserted here; its numbers are the worst over all ranks.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import ptd.commands.train
import ptd.runs.training
from ptd.backbone import TextConditioner
from ptd.config import RunConfig, parse_config
from ptd.data import load_rows
from ptd.data.batches import padded_batch
from ptd.distributed.ranks import Ranks
from ptd.engine.evaluation import HeldOut, evaluate_held_out, scores_of
from ptd.engine.loop import Loop
from ptd.engine.prompt_step import Trained
from ptd.engine.setup import Prepared, prepare
from ptd.methods import TaskFacts, method
from ptd.tasks import Task
from ptd.types import Batch, Examples, Reporter

ALONE = Ranks(0, 1, 1, torch.device("cpu"))
"""A process that runs alone, even if it has joined a process group."""


@dataclass
class WatchedLoop(Loop):
    """The engine's loop; it also records the parameters before each optimizer step and the gradients of the step."""

    parameters: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        loops.append(self)
        (self.only,) = self.members
        self.only.step.optimizer.register_step_pre_hook(self._keep)
        self.only.on_record = lambda record: self.losses.append(record["loss"]) if "loss" in record else None
        self.only.on_eval = lambda number, metrics: self.metrics.update(metrics)

    def _keep(self, *_: Any) -> None:
        named = dict(self.only.step.trained.named_parameters())
        self.parameters.append({name: whole(parameter) for name, parameter in named.items()})
        self.gradients.append({name: whole(parameter.grad) for name, parameter in named.items()})


loops: list[WatchedLoop] = []


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@dataclass
class Measured:
    """The results of a run on all ranks, as each rank has them."""

    config: RunConfig
    loop: WatchedLoop
    trained: dict[str, Tensor]
    answers: list[Any]
    scores: list[Tensor]
    fillers: int
    split: int
    sharded: bool


def run(raw: dict[str, Any], ranks: Ranks) -> Measured:
    """Train on all ranks; rank 0 computes the answers of the last evaluation and broadcasts them."""
    loops.clear()
    config = parse_config(raw)
    ptd.commands.train.train(config)
    (loop,) = loops
    task, held_out = loop.only.held_out.task, loop.only.held_out
    loop.prepared.attachment.set(loop.only.step.state())
    found: list[Any] = [[], []]
    if not task.generates:
        scores = scores_of(held_out, loop.prepared, loop.only.step.readout, ranks, Reporter())
        found = [task.answers(scores, held_out.examples, held_out.rows) if ranks.is_main else [], scores]
        dist.broadcast_object_list(found, src=0)
    return Measured(
        config,
        loop,
        {name: whole(parameter) for name, parameter in loop.only.step.trained.named_parameters()},
        *found,
        fillers=sum(not batch.rows for index in range(len(loop.losses)) for batch in loop.only.batches.step(index)),
        split=sum(isinstance(parameter, DTensor) for parameter in loop.only.step.trained.parameters()),
        sharded=all(parameter.ds_tensor.numel() < parameter.ds_numel for parameter in big(loop.prepared)),
    )


def big(prepared: Prepared) -> list[Any]:
    """Return the parameters with more than one number, which two ranks can share."""
    return [parameter for parameter in prepared.model.parameters() if getattr(parameter, "ds_numel", 2) > 1]


class Reference:
    """One process: the whole backbone, all rows of a step in one padded batch, autograd through everything."""

    def __init__(self, config: RunConfig, task: Task, readout: torch.nn.Module) -> None:
        self.prepared = prepare(config.backbone, ALONE, output=task.output)
        conditioner = TextConditioner(self.prepared.attachment, None)
        facts = TaskFacts(config.task.kind, task.labels, task.cloze, task.output == "body", task.virtual_tokens)
        encoder = method(config.method_name).build(
            config.method_config(), self.prepared.shape, conditioner, facts, seed=config.train.seed
        )
        self.trained = Trained(encoder, readout)

    def use(self, parameters: dict[str, Tensor]) -> None:
        """Load these values and attach the resulting prompt to the backbone, with its autograd graph."""
        missing, unexpected = self.trained.load_state_dict(parameters, strict=False)
        assert not unexpected
        assert not {name for name, _ in self.trained.named_parameters()} & set(missing)
        self.prepared.attachment.set(self.trained.encoder.state(self.trained.encoder()))

    def step(self, parameters: dict[str, Tensor], batch: Batch) -> tuple[float, dict[str, Tensor]]:
        """Return the loss, as the mean over all predictions in the batch, and its gradients."""
        self.use(parameters)
        self.trained.zero_grad()
        reading = self.trained.readout(self.prepared.run, batch)
        loss = reading.loss / reading.weight
        loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in self.trained.named_parameters()}
        return float(loss.detach()), gradients


def compare(measured: Measured) -> dict[str, Any]:
    """Compare every step and the evaluation with the reference."""
    loop, config = measured.loop, measured.config
    reference = Reference(config, loop.only.held_out.task, loop.only.step.readout)
    if loop.only.step.encoder.units is not None:  # the units are measured on the rows
        reference.trained.encoder.units.load_state_dict(loop.only.step.encoder.units.state_dict())
    examples: Examples = loop.only.batches.examples
    errors: dict[str, float] = {}
    loss_errors, mean_of_means = [], []
    for index, (parameters, gradients) in enumerate(zip(loop.parameters, loop.gradients, strict=True)):
        rows = torch.tensor(loop.only.batches.rows(index)).numpy()
        loss, expected = reference.step(parameters, padded_batch(examples, rows, loop.only.batches.pad_token_id))
        assert expected.keys() == gradients.keys()
        total = norm_of(list(expected.values()))
        for name, gradient in gradients.items():
            # A gradient that is zero up to rounding has no meaningful relative error. The bias of `Spans` has such a
            # gradient: no start becomes likelier when the logits of all starts rise by the same amount.
            own = float(expected[name].norm())
            error = float((gradient - expected[name]).norm())
            errors[f"step {index + 1}: {name}"] = error / (own if own > 1e-5 * total else total)
        loss_errors.append(abs(loop.losses[index] - loss) / abs(loss))
        alone = [
            reference.step(parameters, padded_batch(examples, rows[place : place + 1], loop.only.batches.pad_token_id))[
                1
            ]
            for place in range(len(rows))
        ]
        wrong = {name: sum(one[name] for one in alone) / len(alone) for name in expected}
        mean_of_means.append(norm_of([wrong[name] - expected[name] for name in expected]) / total)
    worst = max(errors, key=lambda name: errors[name])

    rows = load_rows(config.data.eval, config.data.eval_split, what="data.eval")
    with torch.no_grad():
        reference.use(measured.trained)
    old = loop.only.held_out
    held_out = HeldOut(old.task, old.examples, rows, len(rows), False, old.pad_token_id)
    arguments = (held_out, reference.prepared, reference.trained.readout, ALONE, Reporter())
    metrics = evaluate_held_out(*arguments)
    scores = [] if old.task.generates else scores_of(*arguments)
    return {
        "gradient_error": errors[worst],
        "worst_gradient": worst,
        "loss_error": max(loss_errors),
        "mean_of_means": max(mean_of_means),
        "metrics": loop.metrics,
        "expected_metrics": metrics,
        "score_error": max(
            (float((one - other).norm() / other.norm()) for one, other in zip(measured.scores, scores, strict=True)),
            default=0.0,
        ),
        "answers": labels_of(measured.answers),
        "expected_answers": []
        if old.task.generates
        else labels_of(old.task.answers(scores, old.examples, held_out.rows)),
    }


def labels_of(answers: list[dict[str, Any]]) -> list[Any]:
    """Return the answers without their probabilities."""
    return [answer[key] for answer in answers for key in ("label", "tags", "answer") if key in answer]


def norm_of(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


def gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def main(cases_file: str, results_file: str) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.start(needs_group=True)
    Ranks.stop = lambda self: None  # type: ignore[method-assign]  # one group for all runs
    ptd.runs.training.Loop = WatchedLoop  # type: ignore[misc]
    ptd.commands.train.leave_report = lambda folder: None  # every run would draw the same report
    cases = json.loads(Path(cases_file).read_text())
    measured = {name: run(raw, ranks) for name, raw in cases.items()}
    # A reference needs one process, so the ranks divide the references among themselves.
    own = {name: compare(measured[name]) for name in list(cases)[ranks.rank :: ranks.world_size]}
    results = {name: case for part in gather(own) for name, case in part.items()}
    for name, one in measured.items():
        states = gather([[tensor.tolist() for tensor in step.values()] for step in one.loop.gradients])
        results[name] |= {
            "ranks_equal": all(state == states[0] for state in states)
            and len(set(map(str, gather(one.loop.metrics)))) == 1,
            "fillers": sum(gather(one.fillers)),
            "split": min(gather(one.split)),
            "sharded": all(gather(one.sharded)),
        }
    if ranks.is_main:
        Path(results_file).write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
