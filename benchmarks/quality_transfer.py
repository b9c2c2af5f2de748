"""Measure whether a learning rate transfers: short ptd runs on several backbones or settings, rates a factor 3 apart.

    python benchmarks/quality_transfer.py --data DATA --output F --plot \\
        --condition "30 tokens" MODEL method.name=prefix method.num_virtual_tokens=30 \\
        --condition "100 tokens" MODEL method.name=prefix method.num_virtual_tokens=100
    python benchmarks/quality_transfer.py --twin MODEL TWIN    # the same function, keys and values of another scale

A condition is a name, a backbone's folder and keys of a run file. Conditions may be added to a file later. Each
condition runs with seven learning rates, its own default (``train.learning_rate``) in the middle, on E2E with the rows
of ``quality.py``, and with as many steps unless ``--steps`` says otherwise. A row (condition, learning rate, seed) is
written as soon as it is measured (`rows`); the rate 0 is the frozen backbone. The program prints, and writes to
OUTPUT.md, each condition's best rate, the loss at its default rate, and the gap between the two losses. ``--plot`` adds
OUTPUT.png, the held-out loss over the rate.
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
from quality_jobs import STEPS, Cell, Job
from quality_ptd import run_config
from quality_tasks import material, write_material
from rows import Rows, add_arguments

FACTOR, RATES = 3.0, 7
NAMES = ("condition", "setting", "learning_rate", "seed")
SOURCES = tuple(f"benchmarks/quality_{name}.py" for name in ("cells", "jobs", "ptd", "tasks"))
ALONE = 0.0
"""The learning rate in the row of a frozen backbone."""


@dataclass(frozen=True)
class Condition:
    """A backbone and the settings of its runs, with which the learning rates are tried."""

    name: str
    backbone: str
    overrides: tuple[str, ...]

    @property
    def setting(self) -> str:
        """The backbone and the settings, without the names of folders."""
        return " ".join([f"[{described(self.backbone)}]", *self.overrides])


def rates_around(default: float, count: int = RATES) -> list[float]:
    """Return ``count`` rates, a factor `FACTOR` apart, with ``default`` in the middle, lowest first."""
    return [float(f"{default * FACTOR ** (index - count // 2):.6g}") for index in range(count)]


def job_of(condition: Condition, rate: float | None, seed: int, data: Path, folder: str, steps: int) -> Job:
    """Return the run of a condition at ``rate``; None: its own default, `ALONE`: the frozen backbone."""
    method = "frozen" if rate == ALONE else "condition"
    cell = Cell("ptd", method, "e2e", "default", seed, None)
    last = () if rate is None or rate == ALONE else (f"train.learning_rate={rate!r}",)
    overrides = () if rate == ALONE else (*condition.overrides, *last)
    return Job(cell, condition.backbone, str(data), folder, steps, overrides, texts=False)


def default_rate(condition: Condition, data: Path, folder: str) -> float:
    """Return a condition's ``train.learning_rate``. Raises SystemExit if it is not a number."""
    found = run_config(job_of(condition, None, 0, data, folder, 1), Path(folder) / "out").train.learning_rate
    if not isinstance(found, float):
        raise SystemExit(f"{condition.name}: its default learning rate is not a number; add train.learning_rate=NUMBER")
    return found


def twin(source: Path, target: Path, factor: int = 8) -> None:
    """Write a model that computes the same as the model in ``source``, with keys and values ``factor`` times as large.

    In every attention layer, ``k_proj`` and ``v_proj`` are multiplied by ``factor``, and ``q_proj`` and ``o_proj`` are
    divided by it, biases included (except the bias of ``o_proj``, which is added after the division). A power of two
    changes only exponents, so nothing is rounded. Keys and values that are trained, such as a prefix, then have another
    scale. Raises ValueError for another factor, a model without these four projections, a model that normalises queries
    or keys, and weights that scaling back does not restore.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if factor < 1 or factor & (factor - 1):
        raise ValueError(f"the factor {factor} is not a power of two, so weights would be rounded; give 2, 4, 8, …")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    layers = [module for module in model.modules() if hasattr(module, "k_proj") and hasattr(module, "q_proj")]
    if not layers or any(not hasattr(layer, name) for layer in layers for name in ("v_proj", "o_proj")):
        raise ValueError(f"{model.config.model_type} has no attention with q_proj, k_proj, v_proj and o_proj")
    if any(hasattr(layer, name) for layer in layers for name in ("q_norm", "k_norm")):
        raise ValueError(f"{model.config.model_type} normalises its queries or keys, which undoes the scaling")
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
    """Return condition -> learning rate -> held-out losses of its seeds, with the rates in ascending order."""
    found: dict[str, dict[float, list[float]]] = {}
    for record in records:
        if record["outcome"] == "measured":
            found.setdefault(record["condition"], {}).setdefault(record["learning_rate"], []).append(record["loss"])
    return {name: dict(sorted(rates.items())) for name, rates in found.items()}


def verdict(rates: dict[float, list[float]], default: float) -> dict[str, Any]:
    """Return the result of a condition: ``best_rate``, its mean ``best_loss``, ``at_edge`` (whether the best rate is
    the lowest or the highest that was tried), ``default_rate``, its mean ``default_loss``, ``gap`` (by how much
    the default's loss exceeds the best, relative to the best) and ``alone``, the loss of the frozen backbone. What was
    not measured is None. A loss that is not finite counts as infinite."""
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
    """Return a Markdown table with one line per condition."""
    heads = ["condition", "best rate", "best loss", "default", "default loss", "gap", "frozen backbone", "seeds"]
    lines = []
    for name, rates in curves(records).items():
        found = verdict(rates, defaults[name])
        if found["best_rate"] is None:
            continue
        edge = " (edge of the grid)" if found["at_edge"] else ""
        cells = [name, f"{found['best_rate']:.2g}{edge}", f"{found['best_loss']:.4f}", f"{found['default_rate']:.2g}"]
        cells.append("–" if found["default_loss"] is None else f"{found['default_loss']:.4f}")
        cells.append("–" if found["gap"] is None else f"{100 * found['gap']:.1f} %")
        cells.append("–" if found["alone"] is None else f"{found['alone']:.4f}")
        lines.append([*cells, str(max(len(losses) for rate, losses in rates.items() if rate != ALONE))])
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *lines])


def draw(file: Path, records: Sequence[dict[str, Any]], defaults: dict[str, float]) -> None:
    """Draw the held-out loss over the rate, one curve per condition: mean, lowest and highest over seeds. A star marks
    the best rate, a ring the default. Losses far above the frozen backbone's, or not finite, are left out."""
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
    title = "star: best; ring: default; dashed: frozen backbone"
    axes.set(xlabel="learning rate", ylabel="held-out loss, nats (test)", title=title)
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def conditions_of(given: Sequence[Sequence[str]]) -> list[Condition]:
    """Return the conditions of ``--condition NAME FOLDER KEY=VALUE …``; raises SystemExit if incomplete or repeated."""
    found = []
    for each in given:
        if len(each) < 3 or not any(word.startswith("method.name=") for word in each[2:]):
            raise SystemExit(
                f"--condition {' '.join(each)}: incomplete; give NAME FOLDER method.name=METHOD [KEY=VALUE …]"
            )
        found.append(Condition(each[0], str(Path(each[1]).resolve()), tuple(each[2:])))
    if len({each.name for each in found}) < len(found):
        raise SystemExit(
            "--condition: two conditions have the same NAME, which identifies their rows; give different names"
        )
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--condition", nargs="+", action="append", default=[], metavar="WORD", help="NAME FOLDER KEY=VALUE …"
    )
    parser.add_argument("--twin", nargs=2, type=Path, metavar=("MODEL", "TWIN"), help="write a twin of MODEL")
    parser.add_argument("--data", type=Path, help="folder of e2e_dev.csv")
    parser.add_argument("--seeds", type=int, default=1, help="training runs per learning rate")
    parser.add_argument("--rates", type=int, default=RATES, help="learning rates per condition")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="optimizer steps per run (default: those of quality.py)"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads per run; runs go one after the other")
    parser.add_argument("--quick", action="store_true", help="only a test: 3 steps, few rows")
    parser.add_argument("--plot", action="store_true", help="also draw OUTPUT.png")
    add_arguments(parser)
    args = parser.parse_args()
    if args.twin is None and (args.data is None or not args.condition):
        parser.error("give --data and at least one --condition, or --twin")
    if args.twin is not None and args.twin[1].exists():
        parser.error(f"--twin: {args.twin[1]} already exists; give another folder, or remove it")
    return args


def main() -> None:
    args = parse()
    if args.twin is not None:
        twin(*args.twin)
        return
    conditions = conditions_of(args.condition)
    args.data = args.data.resolve()
    args.output = None if args.output is None else args.output.resolve()
    steps = QUICK["steps"] if args.quick else args.steps
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
