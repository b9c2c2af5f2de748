"""What a training run writes to its output folder and reads from it: adapters, checkpoints, records, the result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptd.checkpoint import Adapter, Saver, backbone_reference, save_adapter
from ptd.checkpoint.files import writing
from ptd.checkpoint.run_state import (
    DELETED,
    checkpoints,
    clean,
    latest_complete,
    load_tensors,
    read_facts,
    step_of,
)
from ptd.config import RunConfig, TrainConfig
from ptd.distributed.ranks import Ranks
from ptd.engine.guard import Divergence, Guard
from ptd.engine.member import Astray, Dropped, Enough, Failed, OwnEnd, Stopped
from ptd.engine.own_part import own_part
from ptd.engine.preemption import StopRequest
from ptd.engine.prompt_step import PromptStep
from ptd.engine.setup import Prepared
from ptd.errors import Diverged
from ptd.runs.folder import clear
from ptd.runs.metrics_log import METRICS, Records, read_records
from ptd.runs.run_json import Journal
from ptd.tasks import LOWER_IS_BETTER, Task
from ptd.trackers import Tracked, start_trackers
from ptd.types import DataReport, Preempted, Reporter, UserError
from ptd.versions import versions

PEFT_TASKS: dict[str, str | None] = {
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "masked_lm": "FEATURE_EXTRACTION",
    "body": "FEATURE_EXTRACTION",
}
"""The backbone's output -> PEFT's name of the task type."""


MOST_RETRIES, RETRY_FACTOR = 3, 1 / 3
"""Maximum number of retries with ``train.on_divergence: retry``, and the factor of the learning rate of each retry."""


@dataclass
class Artifacts:
    """What this run writes to its output folder and reads from it."""

    config: RunConfig
    journal: Journal
    prepared: Prepared
    task: Task
    step: PromptStep
    ranks: Ranks
    settings: TrainConfig
    data_digest: str
    learned_from: DataReport | None = None
    best: dict[str, Any] = field(default_factory=dict)
    latest: dict[str, Any] = field(default_factory=dict)
    """The metrics of the last evaluation."""
    kept: int | None = None
    """The step after which the adapter was last written."""
    reporter: Reporter = field(default_factory=Reporter)
    guard: Guard | None = None
    waited: int = 0
    """Number of consecutive evaluations that were no better than the best one."""
    ended: dict[str, Any] = field(default_factory=dict)
    """How the training ended while other runs of the same process went on; empty: it has not."""
    total: int | None = None
    """Number of steps of the whole run."""
    diverged: dict[str, Any] = field(default_factory=dict)
    retries: list[dict[str, Any]] = field(default_factory=list)
    """``diverged`` and ``retries`` have the form of run.json; empty: no divergence, no retry."""
    saver: Saver = field(init=False)
    _start: dict[str, Tensor] = field(default_factory=dict, init=False)
    """The initial values, on the CPU, for a retry that has to begin at the start."""

    def __post_init__(self) -> None:
        self.folder = self.journal.folder
        records = self.folder.path / METRICS
        self.saver = Saver(self.folder.checkpoints, self.ranks, keep=self.settings.save_total_limit, records=records)

    def resume(self) -> int:
        """Load the checkpoint, if one exists; return the step to continue after.

        Raises `UserError` if the backbone or the training data differ from those of the checkpoint.
        """
        if self.settings.on_divergence == "retry":
            self._start = {name: own_part(value).to("cpu", copy=True) for name, value in self._values().items()}
        if self.folder.checkpoint is None:
            return 0
        facts = self.folder.facts()
        for key, value in self._origin().items():
            if facts.get(key) != value:
                raise UserError(
                    f"output_dir: the run in {self.folder.path} was trained with another {key} ({facts.get(key)} "
                    f"there, {value} here) under the same name; restore the old one, or give --overwrite to start again"
                )
        load_tensors(self.folder.checkpoint, self.step.tensors())
        self.best, self.ended = facts["best"], facts.get("ended", {})
        self.diverged, self.retries = facts.get("diverged", {}), facts.get("retries", [])
        self._take_up(facts)
        return int(facts["step"])

    def _take_up(self, facts: dict[str, Any]) -> None:
        """Restore what is counted over the steps from the facts of a checkpoint."""
        self.waited = facts.get("waited", 0)
        if self.guard is not None and "guard" in facts:
            self.guard.load(facts["guard"])
            if self.guard.said and self.settings.on_divergence != "warn":  # an earlier start only warned
                self.guard.rearm()

    def begin(self, start: int, reporter: Reporter) -> Records | None:
        """Prepare the folder for a run that continues after ``start``; return the records' writer (rank 0) or None."""
        records: list[Records] = []

        def begin() -> None:
            with writing(self.folder.path):
                if self.folder.checkpoint is None:
                    clear(self.folder)
                self.journal.training(
                    trained_parameters=self.step.trained.count(), **self._origin(), **self._happened()
                )
                clean(self.folder.checkpoints)
                due, trackers = self.evaluation_due, self._trackers(start)
                records.append(Records(self.folder.path, start, evaluation_due=due, trackers=trackers))

        self.ranks.on_main(begin)
        return records[0] if records else None

    def _trackers(self, start: int) -> list[Any]:
        """Start the trackers of ``train.report_to`` for the steps after ``start`` (rank 0)."""
        began, name, again = self.journal.content["started"], self.settings.run_name, len(self.retries)
        run = Tracked.of(self.folder.path, began, name, self.config.to_dict(), start, again)
        return list(start_trackers(self.settings.report_to, run, self.reporter.note))

    def _happened(self) -> dict[str, Any]:
        """Return what run.json and the checkpoints record about divergence."""
        said = {"diverged": self.diverged, "retries": self.retries}
        return {name: value for name, value in said.items() if value}

    @property
    def evaluation_due(self) -> bool:
        """Whether the checkpoint was written before the evaluation that belongs to its step."""
        return bool(self.folder.facts().get("evaluation_due"))

    def leave_off(self, stopped: Stopped | None) -> None:
        """Save the state where the run ``stopped``; None: there is no state to save."""
        if stopped is not None:
            self.save_state(stopped.step, evaluation_due=stopped.evaluation_due)
        self.saver.wait()

    def has_ended(self, end: OwnEnd) -> None:
        """Record that this run has ended while others of the same process go on, so that a resume knows it."""
        self.ended = {"how": type(end).__name__, "step": end.step}
        if isinstance(end, Failed):
            self.ended["reason"] = end.reason
        if isinstance(end, Astray):
            self.ended["verdict"] = vars(end.verdict)
        if not isinstance(end, Enough):  # the loop saves the state of a run that stops early
            self.save_state(end.step)

    def end_before(self) -> OwnEnd | None:
        """Return how the run had ended before the step from which the others continue."""
        if not self.ended:
            return None
        how, step = self.ended["how"], self.ended["step"]
        if how == "Failed":
            return Failed(step, self.ended["reason"])
        if how == "Astray":
            return Astray(step, Divergence(**self.ended["verdict"]))
        return Dropped(step) if how == "Dropped" else Enough(step)

    def standing(self) -> float:
        """Return how good the last evaluation was, by ``train.metric_for_best_model``; lower is better."""
        value = self.latest.get(self.settings.best_metric, math.nan)
        sign = 1 if self.settings.best_metric in LOWER_IS_BETTER else -1
        return sign * value if math.isfinite(value) else math.inf

    def save_state(self, number: int, *, evaluation_due: bool = False) -> None:
        """Start to write a checkpoint from which to continue after step ``number``. All ranks call this together.

        The checkpoint is on disk when ``saver.wait()`` has returned.
        """
        rows = self.settings.per_device_train_batch_size * self.settings.gradient_accumulation_steps
        also = {"evaluation_due": True} if evaluation_due else {}
        facts = {
            "rows_per_step": rows * self.ranks.world_size,
            "best": self.best,
            "units": self.step.trained.units,
            "waited": self.waited,
            "total": self.total,
            **({"ended": self.ended} if self.ended else {}),
            **also,
            **self._happened(),
            **self._origin(),
        }
        if self.guard is not None:
            facts["guard"] = self.guard.state()
        retries = self.guard is not None and self.settings.on_divergence == "retry"
        self.saver.save(number, self.step.tensors(), facts, hold=self.guard.good if self.guard and retries else None)

    def move_on(self, request: StopRequest) -> None:
        """Poll the checkpoint that is being written. If it failed, request a stop, after which all ranks raise why."""
        self.saver.poll()
        if self.saver.failed:
            request.make()

    def keep_best(self, number: int, metrics: dict[str, Any]) -> None:
        """Write the adapter to ``best`` if this evaluation is the best so far by ``train.metric_for_best_model``."""
        self.latest, name = metrics, self.settings.best_metric
        sign = -1 if name in LOWER_IS_BETTER else 1
        self.waited += 1
        if math.isfinite(metrics[name]) and (not self.best or sign * metrics[name] > sign * self.best[name]):
            self.waited = 0
            self.best = {**metrics, "step": number}
            self.keep_adapter("best", self.best)

    @property
    def enough(self) -> bool:
        """Whether ``train.early_stopping_patience`` is exhausted."""
        patience = self.settings.early_stopping_patience
        return patience is not None and self.waited >= patience

    # ---- divergence

    @property
    def rate_factor(self) -> float:
        """The factor of the learning rate after all retries so far."""
        return RETRY_FACTOR ** len(self.retries)

    @property
    def may_retry(self) -> bool:
        return self.settings.on_divergence == "retry" and len(self.retries) < MOST_RETRIES

    def has_diverged(self, verdict: Divergence) -> bool:
        """Report and record the divergence; return whether the loop has to stop. All ranks call this together."""
        if self.may_retry:  # `go_back` reports it
            return True
        rate = self.settings.learning_rate * self.rate_factor
        self.diverged = {
            "step": verdict.step,
            "loss": verdict.loss,
            ("frozen_loss" if verdict.alone else "first_loss"): verdict.baseline,
            "reason": verdict.reason,
            "learning_rate": rate,
        }
        self.journal.tell(diverged=self.diverged)
        if self.settings.on_divergence == "warn":
            self.reporter.note(
                f"step {verdict.step}: the run diverges: {verdict.reason}; {self._lower()}. {self._left(verdict)}"
                "The run continues; train.on_divergence: stop ends such a run, and retry makes it go back by itself"
            )
            return False
        return True

    def _lower(self) -> str:
        rate = self.settings.learning_rate * self.rate_factor
        return f"lower train.learning_rate (now {rate:.1e}), for example to a third: {rate * RETRY_FACTOR:.1e}"

    def _left(self, verdict: Divergence) -> str:
        """Return a note on the adapter and checkpoint from before the divergence (only rank 0 prints it)."""
        better = bool(self.best) and self.best["loss"] < verdict.baseline
        said = f"best/ holds the adapter of step {self.best['step']}. " if better else ""
        found = [step for path in checkpoints(self.folder.checkpoints) if 0 < (step := step_of(path)) <= verdict.good]
        return said + (f"The checkpoint of step {found[0]} is the last good one. " if found else "")

    def last_words(self, ended: Astray) -> str:
        """Return the message with which a diverged run ends."""
        tried = f", after {len(self.retries)} retries with lower learning rates" if self.retries else ""
        return (
            f"the run diverged in step {ended.verdict.step}{tried}, and ended after step {ended.step}: "
            f"{ended.verdict.reason}; {self._lower()}, and start again with --overwrite or another output_dir. "
            f"{self._left(ended.verdict)}adapter/ holds the adapter at the end of the run"
        )

    def go_back(self, ended: Astray, records: Records | None) -> tuple[int, bool]:
        """Restore the last good state, with a lower learning rate. All ranks call this together.

        Return the step to continue after, and whether the evaluation of that step is due.
        """
        self.saver.wait()
        found = self.ranks.on_main(lambda: self.last_good(ended.verdict.good))
        facts: dict[str, Any] = {}
        if found is not None:
            load_tensors(found, self.step.tensors())
            facts = read_facts(found)
        else:
            self._begin_again()
        start, due = int(facts.get("step", 0)), bool(facts.get("evaluation_due"))
        if self.guard is not None:
            self.guard.restart()
        self._take_up(facts)
        rate = self.settings.learning_rate * self.rate_factor * RETRY_FACTOR
        self.retries = [*self.retries, {"at_step": ended.verdict.step, "from_step": start, "learning_rate": rate}]
        place = f"the checkpoint of step {start}" if start else "the start"
        self.reporter.note(
            f"step {ended.verdict.step}: the run diverges: {ended.verdict.reason}; going back to {place} with "
            f"train.learning_rate {rate:.1e} (retry {len(self.retries)} of {MOST_RETRIES})"
        )
        self.journal.tell(**self._happened())
        if records is not None:
            records.go_back(start, self._trackers(start), evaluation_due=due)
        self.save_state(start, evaluation_due=due)  # records the lower learning rate in case of an interruption
        self.keep_trained(start)
        return start, due

    def last_good(self, step: int) -> Path | None:
        """Return the newest complete checkpoint up to ``step``, and remove the later ones (rank 0)."""
        root = self.folder.checkpoints
        with writing(root):
            for path in checkpoints(root):
                if step_of(path) > step:
                    path.rename(root / f"{DELETED}{path.name}")
            if root.is_dir():
                clean(root)
        return latest_complete(root)[0]

    def _begin_again(self) -> None:
        self.step.optimizer.state.clear()  # the optimizer makes its initial state again
        for name, value in self._values().items():
            own_part(value).copy_(self._start[name])

    def _values(self) -> dict[str, Tensor]:
        """Return what a step changes, by name, without the optimizer's state."""
        return {**self.step.trained.state_dict(), **self.step.loss_scale.tensors()}

    def keep_trained(self, number: int) -> None:
        """Write the adapter after step ``number``, before anything that may fail."""
        self.keep_adapter("adapter", {})
        self.kept = number

    @contextmanager
    def telling(self, reporter: Reporter) -> Iterator[None]:
        """Add to an error of the ``with`` block where the last written adapter is."""
        try:
            yield
        except (Preempted, Diverged):
            raise
        except Exception as error:
            if self.kept is not None:
                where = f"the adapter after step {self.kept} is in {self.folder.path / 'adapter'}"
                if isinstance(error, UserError):
                    error.args = (f"{error}. The trained parameters are saved: {where}",)
                else:
                    reporter.note(f"the run failed; the trained parameters are saved: {where}")
            raise

    def keep_adapter(self, name: str, metrics: dict[str, Any]) -> None:
        """Write the current adapter and the ``metrics`` of its evaluation to ``name``. All ranks call this together."""
        with torch.no_grad():
            flat = self.step.flat()

        def write() -> None:
            with writing(self.folder.path / name):
                save_adapter(self.folder.path / name, self._adapter(flat, metrics))

        self.ranks.on_main(write)

    def _adapter(self, flat: torch.Tensor, metrics: dict[str, Any]) -> Adapter:
        resolved, encoder = self.config.to_dict(), self.step.encoder
        learned = {} if self.learned_from is None else dict(vars(self.learned_from))
        learned.pop("notes", None)  # the notes quote rows, and an adapter may be passed on to others
        return Adapter(
            flat,
            encoder.layout,
            peft_type=encoder.peft_type,
            backbone=backbone_reference(self.config.backbone.path),
            revision=self.config.backbone.revision,
            task_type=PEFT_TASKS[self.task.output],
            head={name: parameter.detach() for name, parameter in self.step.readout.named_parameters()},
            facts={
                "fingerprint": self.prepared.fingerprint,
                "backbone_config": resolved["backbone"],
                "method": resolved["method"],
                "task": self.task.facts(),
                "data": {key: value for key, value in resolved["data"].items() if key != "cache"},
                "training": {**learned, "evaluation": metrics},
                "versions": versions(),
            },
        )

    def keep_result(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write the adapter with its last evaluation; return ``result`` with the values of the records added."""
        result["best"] = self.best or None
        evaluation: dict[str, Any] = {}
        if self.ranks.is_main:
            for record in read_records(self.folder.path):
                shown = [key for key in record if key == "loss" or key.startswith(("eval_", "frozen_"))]
                result |= {key: record[key] for key in shown}
                measured = {key[5:]: value for key, value in record.items() if key.startswith("eval_")}
                evaluation = {**measured, "step": record["step"]} if measured else evaluation
        if self.diverged:
            result["diverged_at"] = self.diverged["step"]
        if self.retries:
            result["learning_rate"] = self.retries[-1]["learning_rate"]
        if is_worse(result):
            result["worse_than_frozen"] = True
        self.keep_adapter("adapter", evaluation)
        self.kept = result["steps"]
        return result

    def finish(self, result: dict[str, Any], status: str) -> None:
        """Wait for the last checkpoint, then write the result to run.json."""
        self.saver.wait()
        if self.ranks.is_main:
            self.journal.content["result"] = result
            self.journal.end(status, step=result["steps"])

    def _origin(self) -> dict[str, str]:
        return {"backbone_fingerprint": self.prepared.fingerprint, "train_data_digest": self.data_digest}


def is_worse(result: dict[str, Any]) -> bool:
    """Return whether the held-out loss of a result is null, or above that of the backbone without a prompt."""
    alone, tuned = result.get("frozen_loss"), result.get("eval_loss", 0.0)
    return alone is not None and (tuned is None or tuned > alone)
