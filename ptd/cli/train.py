"""``ptd train``."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

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
from ptd.errors import Preempted

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
    """Train as RUN.yaml says. The same command typed again continues a run that was interrupted.

    On several GPUs or nodes start it by ptd launch, or by any launcher that sets RANK and WORLD_SIZE.
    """
    from ptd.engine.preemption import StopRequest

    request = StopRequest.listen()  # before the imports that take long

    from ptd.config import load_config

    config = load_config(run, overrides)
    hush()
    from ptd.train import train as run_training

    try:
        result = run_training(
            config, overwrite=overwrite, retry=retry, reporter=reporter_unless(quiet), request=request
        )
    except Preempted:
        request.ignore_more()
        raise
    if is_main():
        print_json({"output_dir": str(config.output_dir), **result})
        done(quiet, left_by(config.output_dir), _uses(config))


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
