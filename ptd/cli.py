"""The command line. What its exit codes mean: `ptd.exit_codes`."""

from __future__ import annotations

import json
import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ptd import cli_launch
from ptd.exit_codes import INTERRUPTED
from ptd.types import Preempted, RankError, UserError

app = typer.Typer(
    name="ptd",
    help="Tune a prefix, not a model: prompt- and prefix-tuning of frozen language models.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_launch.app, name="launch")

Adapter = Annotated[
    str | None, typer.Option("--adapter", "-a", help="Adapter folder (ptd's or PEFT's), or a run's output folder.")
]
Backbone = Annotated[
    str | None, typer.Option("--backbone", "-b", help="Backbone folder or hub id; default: the one the adapter names.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="A key of the sections backbone or data, e.g. backbone.sharding=world or data.max_length=64; repeatable. "
        "Default: as in training, the backbone whole on every rank.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences that run together.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
NumBeams = Annotated[int, typer.Option(min=1, help="Beams; 1: no beam search.")]


def _version(show: bool) -> None:
    if show:
        print(f"ptd {version('ptd')}")
        raise typer.Exit


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    run: Annotated[Path, typer.Argument(help="The run file (YAML).", metavar="RUN.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, e.g. train.learning_rate=3e-3.", metavar="[KEY=VALUE]...")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run that is in output_dir already.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Continue a run also if it failed again and again.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Train as RUN.yaml says. The same command typed again continues a run that was interrupted.

    On several GPUs or nodes start it by ptd launch, or by any launcher that sets RANK and WORLD_SIZE.
    """
    from ptd.engine.preemption import StopRequest

    request = StopRequest.listen()  # before the imports that take long

    from ptd.config import load_config
    from ptd.console import make_reporter

    config = load_config(run, overrides)
    _quiet()
    from ptd.train import train as run_training

    try:
        result = run_training(config, overwrite=overwrite, retry=retry, reporter=make_reporter(), request=request)
    except Preempted:
        request.ignore_more()
        raise
    if _is_main():
        _print_json({"output_dir": str(config.output_dir), **result})
        print(f"adapter: {config.output_dir / 'adapter'}", file=sys.stderr)
        generates = config.task.kind in ("causal_lm", "seq2seq_lm")
        use = "generate --adapter {} 'your prompt'" if generates else "predict --adapter {} --data rows.jsonl"
        print("next: ptd " + use.format(config.output_dir), file=sys.stderr)


@app.command("eval")
def evaluate(
    data: Annotated[str, typer.Option("--data", "-d", help="Rows to evaluate on: file, dataset folder or hub name.")],
    adapter: Adapter = None,
    backbone: Backbone = None,
    changes: Changes = None,
    generate: Annotated[bool, typer.Option("--generate", help="Also generate: BLEU, ROUGE-L and exact match.")] = False,
    max_new_tokens: MaxNewTokens = 128,
    num_beams: NumBeams = 1,
    batch_size: BatchSize = 16,
) -> None:
    """Print loss and the task's metrics (perplexity for text) and, with --generate, text metrics as one JSON object.

    Without --adapter the plain backbone is evaluated.
    """
    from ptd.config import parse_settings

    settings = parse_settings(changes or [])
    _quiet()
    from ptd.console import make_reporter
    from ptd.evaluate import evaluate as run_evaluation
    from ptd.generate import Decoding

    decoding = Decoding(max_new_tokens=max_new_tokens, num_beams=num_beams) if generate else None
    result = run_evaluation(
        data,
        adapter=adapter,
        backbone=backbone,
        settings=settings,
        decoding=decoding,
        batch_size=batch_size,
        reporter=make_reporter() if _is_main() else None,
    )
    if _is_main():
        _print_json(result)


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; default: one a line from stdin.")] = None,
    adapter: Adapter = None,
    backbone: Backbone = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Text file with one prompt a line.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy; above: sample.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus of the sampled tokens.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k likeliest tokens; 0: all.")] = 0,
    num_beams: NumBeams = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch_size: BatchSize = 16,
    changes: Changes = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line: prompt and completion.")] = False,
) -> None:
    """Continue prompts with the tuned backbone; prints one completion a line."""
    from ptd.config import parse_settings
    from ptd.generate import Decoding
    from ptd.generate import generate as run_generation

    settings = parse_settings(changes or [])
    prompts = _prompts(prompts, file) if _is_main() else []
    _quiet()
    from ptd.console import make_reporter

    texts = run_generation(
        prompts,
        adapter=adapter,
        backbone=backbone,
        settings=settings,
        decoding=Decoding(max_new_tokens, temperature, top_p, top_k, num_beams, seed),
        batch_size=batch_size,
        reporter=make_reporter() if _is_main() else None,
    )
    for prompt, text in zip(prompts, texts, strict=True):
        print(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False) if as_json else text)


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    from ptd.generate import read_prompts

    if given and file is not None:
        raise UserError("give prompts as arguments or with --file, not both")
    if given:
        return given
    if file is not None:
        return read_prompts(file)
    if sys.stdin.isatty():
        raise UserError("no prompt: give it as an argument, with --file, or on stdin")
    prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise UserError("no prompt on stdin; write one a line")
    return prompts


@app.command()
def predict(
    data: Annotated[str, typer.Option("--data", "-d", help="Rows to label: file, dataset folder or hub name.")],
    adapter: Annotated[str, typer.Option("--adapter", "-a", help="Adapter folder, or a run's output folder.")],
    backbone: Backbone = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSONL file to write; default: stdout.")] = None,
    changes: Changes = None,
    batch_size: BatchSize = 16,
) -> None:
    """Label rows: each row comes back as a JSON line with its label and probabilities, its tags, or its answer."""
    from ptd.config import parse_settings

    settings = parse_settings(changes or [])
    _quiet()
    from ptd.console import make_reporter
    from ptd.predict import predict as run_prediction

    found = run_prediction(
        data,
        adapter=adapter,
        backbone=backbone,
        settings=settings,
        batch_size=batch_size,
        reporter=make_reporter() if _is_main() else None,
    )
    lines = [json.dumps(row, ensure_ascii=False, default=str) for row in found]
    if not _is_main():
        return
    if output is None:
        print("\n".join(lines))
    else:
        output.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        print(f"{len(lines)} rows: {output}", file=sys.stderr)


@app.command("inspect")
def inspect_(
    adapter: Annotated[str, typer.Argument(help="Adapter folder (ptd's or PEFT's), or a run's output folder.")],
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="Rows to see its effect on: file, dataset folder or hub name."),
    ] = None,
    backbone: Backbone = None,
    changes: Changes = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to use at most, evenly spaced over the data.")] = 64,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; default: inspect in the adapter's folder.")
    ] = None,
    batch_size: BatchSize = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """What a prompt does: attention on it by layer and head, its norms and ranks, the loss without each of its tokens.

    Writes inspect.json, figures and index.html, which holds everything and opens without a network.
    """
    from ptd.config import parse_settings

    settings = parse_settings(changes or [])
    _quiet()
    from ptd.console import make_reporter, print_inspection
    from ptd.inspection import ADDS, output_folder, write
    from ptd.inspection import inspect as run_inspection
    from ptd.inspection.tables import headline, sections

    reporter = make_reporter() if _is_main() else None
    found = run_inspection(
        adapter, data=data, backbone=backbone, settings=settings, rows=rows, batch_size=batch_size, reporter=reporter
    )
    if not _is_main():
        return
    folder = output or output_folder(adapter)
    write(found, folder)
    _print_json(found) if as_json else print_inspection(headline(found), found["notes"], sections(found))
    if data is None:
        print(ADDS, file=sys.stderr)
    print(f"written: {folder / 'index.html'}, its figures (PNG) and inspect.json", file=sys.stderr)


@app.command("export")
def export_(
    source: Annotated[str, typer.Argument(help="Adapter folder or run output folder.")],
    target: Annotated[Path, typer.Argument(help="New folder to write.")],
    base_model: Annotated[str | None, typer.Option(help="Backbone to name in it, e.g. a hub id.")] = None,
) -> None:
    """Write an adapter as a plain PEFT folder (peft.PeftModel.from_pretrained loads it)."""
    from ptd.export import export_adapter

    note = export_adapter(source, target, base_model=base_model)
    if note is not None:
        print(note, file=sys.stderr)
    print(target)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="Folder of a PEFT prompt adapter.")],
    target: Annotated[Path, typer.Argument(help="New folder to write.")],
    backbone: Backbone = None,
) -> None:
    """Write a PEFT prompt adapter (prefix, prompt or p-tuning) as one of ptd's, checked against its backbone."""
    _quiet()
    from ptd.export import import_adapter

    import_adapter(source, target, backbone=backbone)
    print(target)


@app.command()
def doctor(
    run: Annotated[
        Path | None, typer.Argument(help="A run file (YAML): also check what it asks for.", metavar="[RUN.yaml]")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, e.g. output_dir=out.", metavar="[KEY=VALUE]...")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the backbone: float32, bfloat16, float16; auto: as the device has.")
    ] = "auto",
    head_dim: Annotated[int, typer.Option(min=1, max=256, help="Size of an attention head.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Whether runs can work here, and which attention backend would be used for which batches, and why.

    Exit code 1 if a check failed.
    """
    from ptd.doctor import check_machine, check_run, examine

    found = examine(dtype=dtype, head_dim=head_dim)
    _quiet()
    checks = [*check_machine(), *(check_run(run, overrides or []) if run is not None else ())]
    if as_json:
        _print_json({**found, "checks": [vars(check) for check in checks]})
    else:
        from ptd.console import print_checks

        print_checks(checks, found["attention"])
    if any(check.status == "failed" for check in checks):
        raise typer.Exit(1)


@app.command()
def plan(
    run: Annotated[Path, typer.Argument(help="The run file (YAML).", metavar="RUN.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, e.g. backbone.sharding=node.", metavar="[KEY=VALUE]...")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs (ranks) of one node.")] = 1,
    gpu_memory: Annotated[str, typer.Option(help="Memory of one GPU (of one rank with --device cpu).")] = "80GiB",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="What the run would run on.")] = "cuda",
    supervised: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a text's tokens that carry loss; 1: all of them.")
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables; sizes in bytes.")] = False,
) -> None:
    """What a run needs and where it fits, before any weights or GPUs are there: only the backbone's config is read."""
    from ptd.config import load_config

    config = load_config(run, overrides)
    _quiet()
    from ptd.console import make_reporter, print_plan
    from ptd.plan import plan as make_plan

    found = make_plan(
        config,
        gpus=gpus,
        nodes=nodes,
        memory=gpu_memory,
        device=device,
        supervised=supervised,
        reporter=make_reporter(),
    ).to_dict()
    _print_json(found) if as_json else print_plan(found)


@app.command()
def bench(
    run: Annotated[Path, typer.Argument(help="The run file (YAML).", metavar="RUN.yaml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it, e.g. train.per_device_train_batch_size=16.", metavar="[KEY=VALUE]..."),
    ] = None,
    against: Annotated[str | None, typer.Option(help="What to take turns with: peft.")] = None,
    peft: Annotated[
        Literal["as-run", "best", "both"] | None,
        typer.Option(help="PEFT as its users run it (random batches), in its best working setting; default: both."),
    ] = None,
    sweeps: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="SECTION.KEY=V1,V2,...", help="Also the curve over these values; repeatable."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each side.")] = 15,
    warmup: Annotated[int, typer.Option(min=0, help="Steps of each side before that.")] = 3,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for bench.json and the plots.")] = Path(
        "bench"
    ),
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """How fast a run trains and where its time goes, alone or against PEFT on the same rows, step by step in turns."""
    from ptd.config import load_config

    if peft is not None and against is None:
        raise UserError(f"--peft {peft}: has no effect without --against peft; add that, or leave it out")
    config = load_config(run, overrides)
    _quiet()
    from ptd.bench import bench as run_bench
    from ptd.bench import sweep
    from ptd.bench.report import parse_sweep, write
    from ptd.console import make_reporter, print_bench

    options: dict[str, Any] = {
        "against": against,
        "settings": ("as-run", "best") if peft in (None, "both") else (peft,),
        "repeats": repeats,
        "warmup": warmup,
        "reporter": make_reporter(),
    }
    wanted = [parse_sweep(given) for given in sweeps or []]
    report = run_bench(config, **options)
    curves = [
        sweep(key, values, lambda value, key=key: load_config(run, [*(overrides or []), f"{key}={value}"]), **options)  # type: ignore[misc]
        for key, values in wanted
    ]
    if not _is_main():
        return
    print_bench(report)
    for curve in curves:
        for point in curve["points"]:
            print_bench(point["report"], f"{curve['key']}={point['value']}")
    for path in write(output, report, curves):
        print(path, file=sys.stderr)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for data, adapter and curve.")] = Path(
        "quickstart"
    ),
    ranks: Annotated[int, typer.Option(min=1, help="Processes to train with.")] = 2,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier quickstart in the folder.")] = False,
) -> None:
    """The whole story in minutes: tune the shipped tiny backbone on two ranks with ZeRO-3, before and after."""
    _quiet()
    from ptd.console import make_reporter
    from ptd.quickstart.run import run_quickstart

    run_quickstart(output, ranks=ranks, overwrite=overwrite, reporter=make_reporter())


def _quiet() -> None:
    """Keep libraries from talking over ours: their progress bars and advice on every rank."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for a package that is not needed
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))


def main() -> None:
    """Entry point of the ``ptd`` command."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        if _is_main() or isinstance(error, RankError):
            print(f"ptd: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Preempted as stopped:
        if _is_main():
            print(f"ptd: {stopped}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: Python's shutdown takes each rank another while, and the first that is gone makes a launcher kill
        # the others, whose code would then be that of a kill.
        os._exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
