"""``ptd train``."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptd.cli.common import (
    Overrides,
    Overwrite,
    Quiet,
    Retry,
    RunFile,
    done,
    hush,
    is_main,
    left_by,
    print_json,
    reporter_unless,
)
from ptd.errors import Diverged, Preempted, UserError

if TYPE_CHECKING:
    from ptd.config import RunConfig


def train(
    run: RunFile,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    retry: Retry = False,
    quiet: Quiet = False,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Train as RUN.yaml says. The same command given again continues an interrupted run.

    On several GPUs or nodes, start it with ptd launch or with any launcher that sets RANK and WORLD_SIZE.
    """
    from ptd.engine.preemption import StopRequest

    request = StopRequest.listen()  # before the slow imports, during which a signal may arrive

    from ptd.config import runs_of_file

    runs = runs_of_file(run, overrides)
    config = runs[0].config
    hush()
    from ptd.commands.train import train as run_training
    from ptd.commands.train import train_members

    given: dict[str, Any] = {"overwrite": overwrite, "reporter": reporter_unless(quiet), "request": request}
    try:
        if runs[0].name:
            if retry:
                raise UserError("--retry: has no effect on a run file with members; remove it")
            found = train_members(runs, **given)
        else:
            result = run_training(config, retry=retry, **given)
    except (Preempted, Diverged):
        request.ignore_more()
        raise
    if is_main() and runs[0].name:
        root = config.output_dir.parent
        print_json({"output_dir": str(root), "members": found})
        done(
            quiet,
            {root / name: "everything that ptd train writes" for name in found},
            [f"ptd generate {' '.join(f'--adapter {name}={root / name}' for name in found)} --data ROWS.jsonl"],
            found=[line for name, each in found.items() for line in _of_member(name, each)],
        )
    elif is_main():
        print_json({"output_dir": str(config.output_dir), **result})
        then = _instead(config, result) if result.get("worse_than_frozen") else _uses(config)
        done(quiet, left_by(config.output_dir), then, found=_found(result))


def _of_member(name: str, member: dict[str, Any]) -> list[str]:
    said = _found(member["result"]) if member["status"] == "finished" else [str(member["status"])]
    return [f"{name}: {line}" for line in said]


def _found(result: dict[str, Any]) -> list[str]:
    """Return lines on the result: the held-out loss next to that of the frozen backbone, divergence, an early stop."""
    alone, tuned = result.get("frozen_loss"), result.get("eval_loss")
    said = []
    if alone is not None:
        shown = "not finite" if tuned is None or not math.isfinite(tuned) else f"{tuned:.4f}"
        worse = ", worse than the frozen backbone" if result.get("worse_than_frozen") else ""
        said.append(f"held-out loss: frozen backbone {alone:.4f} → tuned {shown}{worse}")
    if "diverged_at" in result:
        said.append(f"diverged in step {result['diverged_at']:,}: train.learning_rate is too high")
    if "stopped_early" in result:
        said.append(f"stopped early after step {result['stopped_early']:,}: train.early_stopping_patience was reached")
    return said


def _instead(config: RunConfig, result: dict[str, Any]) -> list[str]:
    """Return what to do if the tuned backbone is worse than the frozen one."""
    rate = result.get("learning_rate", config.train.learning_rate)  # a retry lowers the rate that was given
    lower = f"lower train.learning_rate (now {rate:.1e}), for example to a third"
    if "diverged_at" not in result:
        lower += ", if the loss rose; train for more steps, or at a higher rate, if the loss was still falling"
    return [f"ptd report {shlex.quote(str(config.output_dir))}", lower]


def _uses(config: RunConfig) -> list[str]:
    out, rows = shlex.quote(str(config.output_dir)), shlex.quote(config.data.eval or "rows.jsonl")
    from ptd.config import WRITING

    if config.task.kind in WRITING:
        first = [f"ptd generate --adapter {out} 'your prompt'", f"ptd eval --adapter {out} --data {rows} --generate"]
    else:
        first = [f"ptd predict --adapter {out} --data {rows}"]
    from ptd.methods import method

    of_prompt = [f"ptd inspect {out} --data {rows}", f"ptd export {out} peft_adapter"]
    return [*first, *(of_prompt if method(config.method_name).has_prompt else [])]
