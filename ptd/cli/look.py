"""``ptd doctor``, ``plan``, ``bench`` and ``report``: check, estimate and measure a run, and report on past runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ptd.cli import completion
from ptd.cli.common import (
    Overrides,
    Quiet,
    RunFile,
    at_home,
    done,
    hush,
    is_main,
    print_json,
    reporter_unless,
)
from ptd.errors import UserError
from ptd.files import check_writable

if TYPE_CHECKING:
    from ptd.config import RunConfig


def doctor(
    run: Annotated[
        Path | None,
        typer.Argument(
            help="Run file (YAML); the run is checked as well as the machine.",
            metavar="RUN.yaml",
            autocompletion=completion.run_files,
            callback=at_home,
        ),
    ] = None,
    overrides: Overrides = None,
    dtype: Annotated[
        str,
        typer.Option(help="Dtype of the backbone: float32, bfloat16, float16; auto: bfloat16 on a GPU, else float32."),
    ] = "auto",
    head_dim: Annotated[int, typer.Option(min=1, max=256, help="Size of an attention head.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Check whether runs can work on this machine. Show which attention backend serves which batches, and why.

    The exit code is 1 if a check fails.
    """
    hush()
    from ptd.commands.doctor import check_machine, check_run, examine

    found = examine(dtype=dtype, head_dim=head_dim)
    checks = [*check_machine(), *(check_run(run, overrides or []) if run is not None else ())]
    if as_json:
        print_json({**found, "checks": [vars(check) for check in checks]})
    else:
        from ptd.console import print_checks

        print_checks(checks, found["attention"])
    if any(check.status == "failed" for check in checks):
        raise typer.Exit(1)


def plan(
    run: RunFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs (ranks) per node.")] = 1,
    gpu_memory: Annotated[str, typer.Option(help="Memory of one GPU (of one rank with --device cpu).")] = "80GiB",
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="Type of device that the run would use.")] = "cuda",
    supervised: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a text's tokens that the loss covers; 1: all of them.")
    ] = 1.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables; sizes in bytes.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Estimate what a run needs and where it fits. This needs no weights and no GPUs, only the backbone's config."""
    from ptd.config import load_config

    config = load_config(run, overrides)
    hush()
    from ptd.commands.plan import plan as make_plan
    from ptd.console import print_plan

    found = make_plan(
        config,
        gpus=gpus,
        nodes=nodes,
        memory=gpu_memory,
        device=device,
        supervised=supervised,
        reporter=reporter_unless(quiet),
    ).to_dict()
    print_json(found) if as_json else print_plan(found)
    done(quiet or device == "cpu", {}, _starts(found, config, run, overrides or []))


def _starts(found: dict[str, Any], config: RunConfig, run: Path, overrides: list[str]) -> list[str]:
    """Return the command that starts the run on the planned GPUs, with the best placement if its own does not fit.

    Returns an empty list if no placement fits.
    """
    placements = {each["name"]: each for each in found["placements"]}
    own, best = placements[found["placement"]], placements.get(found["best"])
    if best is None:
        return []
    changes: list[str] = []
    if not own["fits"]:
        changes = [
            f"backbone.{key}={best[key]}" for key in ("quantization", "sharding", "offload") if best[key] != own[key]
        ]
        changes += ["backbone.offload_folder=FOLDER"] if best["offload"] == "nvme" else []
        changes += ["deepspeed=null"] if config.deepspeed is not None else []
    words = shlex.join([str(run), *overrides, *changes])
    nodes, ranks = found["nodes"], found["ranks_per_node"]
    if nodes > 1:
        return [f"ptd launch slurm {words} --nodes {nodes} --gpus-per-node {ranks}"]
    return [f"ptd train {words}" if ranks == 1 else f"ptd launch local {words} --gpus-per-node {ranks}"]


def bench(
    run: RunFile,
    overrides: Overrides = None,
    against: Annotated[str | None, typer.Option(help="Library to compare with: peft.")] = None,
    peft: Annotated[
        Literal["as-run", "best", "compiled"] | None,
        typer.Option(
            help="Measure PEFT only as its users run it (random batches), at its best, or at its best with compiled "
            "layers. Default: the first two; with backbone.compile all three."
        ),
    ] = None,
    sweeps: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep", metavar="SECTION.KEY=V1,V2,...", help="Also measure the run at each of these values; repeatable."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps per side.")] = 15,
    warmup: Annotated[int, typer.Option(min=0, help="Untimed steps per side before the timed ones.")] = 3,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for bench.json and the plots.", callback=at_home)
    ] = Path("bench"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    quiet: Quiet = False,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Measure a run's speed and where its time goes. With --against peft, ptd and PEFT alternate step by step."""
    from ptd.config import load_config

    if peft is not None and against is None:
        raise UserError(f"--peft {peft}: has no effect without --against peft; add --against peft, or remove --peft")
    config = load_config(run, overrides)
    if is_main():
        check_writable(output, "--output")
    hush()
    from ptd.bench import bench as run_bench
    from ptd.bench import bench_sweep
    from ptd.bench.report import parse_sweep, write_bench_report
    from ptd.console import print_bench

    options: dict[str, Any] = {
        "against": against,
        "settings": None if peft is None else (peft,),
        "repeats": repeats,
        "warmup": warmup,
        "reporter": reporter_unless(quiet),
    }
    wanted = [parse_sweep(given) for given in sweeps or []]
    report = run_bench(config, **options)
    curves = [
        bench_sweep(
            key,
            values,
            lambda value, key=key: load_config(run, [*(overrides or []), f"{key}={value}"]),  # type: ignore[misc]
            **options,
        )
        for key, values in wanted
    ]
    if not is_main():
        return
    if as_json:
        print_json({**report, **({"sweeps": curves} if curves else {})})
    else:
        print_bench(report)
        for curve in curves:
            for point in curve["points"]:
                print_bench(point["report"], f"{curve['key']}={point['value']}")
    done(quiet, dict.fromkeys(write_bench_report(output, report, curves), ""), [])


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Output folders of runs, finished or not.", metavar="OUT...", callback=at_home),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="HTML file to write; default: report.html in the run's folder, or here for several runs.",
            callback=at_home,
        ),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Also write each plot as a PNG file into this folder.", callback=at_home)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with the numbers, instead of the paths.")
    ] = False,
) -> None:
    """Write a report on one run or on several. It has curves, speed, samples and settings.

    The report is a single HTML file that opens without a network.
    """
    from ptd.report import report as write_report

    found = write_report(runs, output, pngs=png)
    if as_json:
        print_json(found)
        return
    print("\n".join([found["report"], *found["png"]]))
