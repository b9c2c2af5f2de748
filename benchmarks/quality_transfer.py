"""Whether a learning rate carries over: short runs of ptd over backbones or settings, and over rates a factor 3 apart.

    python benchmarks/quality_transfer.py --data DATA --output F --plot \\
        --condition "30 tokens" MODEL method.name=prefix method.num_virtual_tokens=30 \\
        --condition "100 tokens" MODEL method.name=prefix method.num_virtual_tokens=100
    python benchmarks/quality_transfer.py --twin MODEL TWIN    # the same function with other sizes of keys and values

A condition is a name, a backbone's folder and keys of a run file; others may be added to a file later. Each runs with
seven learning rates, its own default (``train.learning_rate``) in the middle, on E2E with the steps and rows of
``quality.py``; a row (condition, learning rate, seed) is written as soon as it is found (`rows`), the rate 0 being the
backbone alone. Printed, and written as OUTPUT.md: for each condition the best rate, the loss at its default, and the
gap between the two; with ``--plot`` also OUTPUT.png, the held-out loss over the rate.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality import QUICK, described, digest_of, run_job, typed
from quality_cells import STEPS, Cell, Job
from quality_ptd import run_config
from quality_tasks import material, write_material
from rows import Rows, add_arguments

FACTOR, RATES = 3.0, 7
NAMES = ("condition", "setting", "learning_rate", "seed")
SOURCES = tuple(f"benchmarks/quality_{name}.py" for name in ("cells", "ptd", "tasks"))
ALONE = 0.0
"""The learning rate of the row of a backbone alone."""


@dataclass(frozen=True)
class Condition:
    """What the rates are tried on."""

    name: str
    backbone: str
    overrides: tuple[str, ...]

    @property
    def setting(self) -> str:
        """What the name stands for, without the machine's folders."""
        return " ".join([f"[{described(self.backbone)}]", *self.overrides])


def rates_around(default: float, count: int = RATES) -> list[float]:
    """``count`` rates, a factor `FACTOR` apart, with ``default`` in the middle, lowest first."""
    return [float(f"{default * FACTOR ** (index - count // 2):.6g}") for index in range(count)]


def job_of(condition: Condition, rate: float | None, seed: int, data: Path, folder: str, steps: int) -> Job:
    """The run of a condition; ``rate`` None: its own default, `ALONE`: the backbone alone."""
    method = "frozen" if rate == ALONE else "condition"
    cell = Cell("ptd", method, "e2e", "default", seed, None)
    last = () if rate is None or rate == ALONE else (f"train.learning_rate={rate!r}",)
    overrides = () if rate == ALONE else (*condition.overrides, *last)
    return Job(cell, condition.backbone, str(data), folder, steps, overrides, texts=False)


def default_rate(condition: Condition, data: Path, folder: str) -> float:
    """What ``train.learning_rate`` is for a condition; SystemExit if it is no number."""
    found = run_config(job_of(condition, None, 0, data, folder, 1), Path(folder) / "out").train.learning_rate
    if not isinstance(found, float):
        raise SystemExit(f"{condition.name}: its default learning rate is no number; give train.learning_rate=NUMBER")
    return found


def twin(source: Path, target: Path, factor: int = 8) -> None:
    """Write a model that computes the same as that of ``source``, with keys and values ``factor`` times as large.

    In every attention layer ``k_proj`` and ``v_proj`` are multiplied and ``q_proj`` and ``o_proj`` divided by
    ``factor``, biases alike (but that of ``o_proj``, which is added behind it). A power of two changes only exponents,
    so nothing is rounded; what is trained at the keys and values, such as a prefix, meets another scale. Raises
    ValueError for another factor, a model without these four projections, one that normalises queries or keys, and
    weights that do not come back.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if factor < 1 or factor & (factor - 1):
        raise ValueError(f"the factor {factor} is no power of two, so weights would be rounded")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    layers = [module for module in model.modules() if hasattr(module, "k_proj") and hasattr(module, "q_proj")]
    if not layers or any(not hasattr(layer, name) for layer in layers for name in ("v_proj", "o_proj")):
        raise ValueError(f"{model.config.model_type} has no attention of q_proj, k_proj, v_proj and o_proj")
    if any(hasattr(layer, name) for layer in layers for name in ("q_norm", "k_norm")):
        raise ValueError(f"{model.config.model_type} normalises its queries or keys, which takes their size back")
    with torch.no_grad():
        for layer in layers:
            scales = {"q_proj": 1 / factor, "k_proj": factor, "v_proj": factor, "o_proj": 1 / factor}
            for name, scale in scales.items():
                projection = getattr(layer, name)
                changed = [projection.weight]
                if projection.bias is not None and name != "o_proj":
                    changed.append(projection.bias)
                for parameter in changed:
                    scaled = parameter * scale
                    if not torch.equal(scaled / scale, parameter):
                        raise ValueError(f"weights of {name} leave the range of {parameter.dtype} when scaled")
                    parameter.copy_(scaled)
    model.save_pretrained(target)
    for file in source.iterdir():
        if file.is_file() and not (target / file.name).exists() and file.suffix != ".safetensors":
            shutil.copy(file, target / file.name)


def curves(records: Iterable[dict[str, Any]]) -> dict[str, dict[float, list[float]]]:
    """Condition -> learning rate -> held-out losses of its seeds, the rates in order."""
    found: dict[str, dict[float, list[float]]] = {}
    for record in records:
        if record["outcome"] == "measured":
            found.setdefault(record["condition"], {}).setdefault(record["learning_rate"], []).append(record["loss"])
    return {name: dict(sorted(rates.items())) for name, rates in found.items()}


def verdict(rates: dict[float, list[float]], default: float) -> dict[str, Any]:
    """Of a condition: ``best_rate``, its mean ``best_loss``, ``at_edge`` (no lower, or no higher, rate was tried),
    ``default_rate`` and its mean ``default_loss``, ``gap`` (how much more than the best loss that is, relatively) and
    ``alone``, the backbone's own loss; None for what was not measured. A loss that is not finite counts as infinite."""
    means = {rate: _mean(losses) for rate, losses in rates.items() if rate != ALONE}
    best = min(means, key=lambda rate: means[rate]) if means else None
    at_default = next((means[rate] for rate in means if math.isclose(rate, default, rel_tol=1e-3)), None)
    found = {
        "best_rate": best,
        "best_loss": None if best is None else means[best],
        "at_edge": best is not None and best in (min(means), max(means)),
        "default_rate": default,
        "default_loss": at_default,
        "gap": None,
        "alone": _mean(rates[ALONE]) if ALONE in rates else None,
    }
    if at_default is not None and best is not None:
        found["gap"] = at_default / means[best] - 1
    return found


def _mean(losses: Sequence[float]) -> float:
    return statistics.fmean(losses) if all(map(math.isfinite, losses)) else math.inf


def table(records: Sequence[dict[str, Any]], defaults: dict[str, float]) -> str:
    """A line for each condition as Markdown."""
    heads = ["condition", "best rate", "its loss", "default", "its loss", "gap", "backbone alone", "seeds"]
    lines = []
    for name, rates in curves(records).items():
        found = verdict(rates, defaults[name])
        if found["best_rate"] is None:
            continue
        edge = " (the edge)" if found["at_edge"] else ""
        cells = [name, f"{found['best_rate']:.2g}{edge}", f"{found['best_loss']:.4f}", f"{found['default_rate']:.2g}"]
        cells.append("–" if found["default_loss"] is None else f"{found['default_loss']:.4f}")
        cells.append("–" if found["gap"] is None else f"{100 * found['gap']:.1f} %")
        cells.append("–" if found["alone"] is None else f"{found['alone']:.4f}")
        lines.append([*cells, str(max(len(losses) for rate, losses in rates.items() if rate != ALONE))])
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *lines])


def draw(file: Path, records: Sequence[dict[str, Any]], defaults: dict[str, float]) -> None:
    """The held-out loss over the rate, a curve a condition: means, least and most; a star at the best, a ring at the
    default. Losses far above the backbone alone, and those that are not finite, are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 5.0), dpi=130)
    alone, lowest, highest = [], [], []
    for number, (name, rates) in enumerate(curves(records).items()):
        colour, found = f"C{number}", verdict(rates, defaults[name])
        if found["best_rate"] is None or not math.isfinite(found["best_loss"]):
            continue
        means = {rate: _mean(losses) for rate, losses in rates.items() if rate != ALONE}
        means = {rate: mean for rate, mean in means.items() if math.isfinite(mean)}
        errors = [
            [means[rate] - min(rates[rate]) for rate in means],
            [max(rates[rate]) - means[rate] for rate in means],
        ]
        axes.errorbar(
            list(means), list(means.values()), yerr=errors, color=colour, marker=".", capsize=2, linewidth=1.3,
            label=f"{name}: best {found['best_rate']:.2g}",
        )  # fmt: skip
        axes.plot(found["best_rate"], found["best_loss"], marker="*", markersize=13, color=colour, linestyle="none")
        if found["default_loss"] is not None and math.isfinite(found["default_loss"]):
            ring = {"marker": "o", "markersize": 11, "fillstyle": "none", "linestyle": "none"}
            axes.plot(found["default_rate"], found["default_loss"], color=colour, **ring)
        if found["alone"] is not None:
            axes.axhline(found["alone"], color=colour, linestyle="--", linewidth=0.9)
            alone.append(found["alone"])
        lowest.append(found["best_loss"])
        highest.append(max(means.values()))
    if alone and max(highest) > 1.3 * max(alone):
        top = 1.3 * max(alone)
        axes.set_ylim(min(lowest) - 0.05 * (top - min(lowest)), top)
    axes.set_xscale("log")
    title = "star: best; ring: default; dashed: the backbone alone"
    axes.set(xlabel="learning rate", ylabel="held-out loss, nats (test)", title=title)
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def conditions_of(given: Sequence[Sequence[str]]) -> list[Condition]:
    """Of ``--condition NAME FOLDER KEY=VALUE …``; SystemExit for one that says too little, or a name given twice."""
    found = []
    for each in given:
        if len(each) < 3 or not any(word.startswith("method.name=") for word in each[2:]):
            raise SystemExit(f"--condition {' '.join(each)}: give NAME FOLDER method.name=METHOD [KEY=VALUE …]")
        found.append(Condition(each[0], str(Path(each[1]).resolve()), tuple(each[2:])))
    if len({each.name for each in found}) < len(found):
        raise SystemExit("--condition: a name is given twice; rows are known by it")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--condition", nargs="+", action="append", default=[], metavar="WORD", help="NAME FOLDER KEY=…")
    parser.add_argument("--twin", nargs=2, type=Path, metavar=("MODEL", "TWIN"), help="write a model's twin")
    parser.add_argument("--data", type=Path, help="folder of e2e_dev.csv")
    parser.add_argument("--seeds", type=int, default=1, help="training runs of each rate")
    parser.add_argument("--rates", type=int, default=RATES, help="learning rates of each condition")
    parser.add_argument("--threads", type=int, default=2, help="of a run's process; runs go one after the other")
    parser.add_argument("--quick", action="store_true", help="3 steps, few rows: does it work?")
    parser.add_argument("--plot", action="store_true", help="also draw OUTPUT.png")
    add_arguments(parser)
    args = parser.parse_args()
    if args.twin is None and (args.data is None or not args.condition):
        parser.error("give --data and at least one --condition, or --twin")
    if args.twin is not None and args.twin[1].exists():
        parser.error(f"--twin: {args.twin[1]} is there already; name another folder, or remove it")
    return args


def main() -> None:
    args = parse()
    if args.twin is not None:
        twin(*args.twin)
        return
    conditions = conditions_of(args.condition)
    args.data = args.data.resolve()
    args.output = None if args.output is None else args.output.resolve()
    steps = QUICK["steps"] if args.quick else STEPS
    settings = {
        "steps": steps,
        "rates": args.rates,
        "quick": args.quick,
        "threads": args.threads,
        "data": digest_of(args.data),
    }
    rows = Rows(
        args.output, NAMES, program="quality_transfer", sources=SOURCES, settings=settings,
        about={"command": typed([args.data, args.output, *(Path(each.backbone) for each in conditions)])},
        replace=args.replace, minutes=args.minutes,
    )  # fmt: skip
    defaults = {}
    with rows.work_folder() as folder:
        data = folder / "e2e"
        if not data.exists():
            sizes = {key: QUICK[key] for key in ("test_rows", "test_mrs")} if args.quick else {}
            write_material(material("e2e", args.data, **sizes), data)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            defaults = {each.name: default_rate(each, data, name) for each in conditions}
        wanted = [
            (condition, rate, seed)
            for seed in range(args.seeds)
            for condition in conditions
            for rate in [*([ALONE] if seed == 0 else []), *rates_around(defaults[condition.name], args.rates)]
        ]
        for condition, rate, seed in wanted:
            names = {"condition": condition.name, "setting": condition.setting, "learning_rate": rate, "seed": seed}
            if rows.has(**names):
                continue
            with rows.row(**names) as row, tempfile.TemporaryDirectory(dir=folder) as place:
                found = run_job(job_of(condition, rate, seed, data, place, steps), args.threads)
                row |= {key: value for key, value in found.items() if key not in names}
                print(f"{condition.name}, {rate:.3g}, seed {seed}: loss {row['loss']:.4f}", flush=True)
    rows.close()
    here = {(each.name, each.setting) for each in conditions}
    records = [record for record in rows.records if (record["condition"], record["setting"]) in here]
    page = table(records, defaults)
    print(page)
    if args.output is not None:
        args.output.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
        if args.plot:
            draw(args.output.with_suffix(".png"), records, defaults)


if __name__ == "__main__":
    main()
