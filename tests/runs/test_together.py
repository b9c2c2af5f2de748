"""Runs that are trained together over one backbone: each learns exactly what it would have learned alone."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reporting import Notes, Stopped
from safetensors.torch import load_file
from typer.testing import CliRunner

from ptd import cli
from ptd.cli import app
from ptd.commands.sweep import sweep
from ptd.commands.train import train, train_members
from ptd.config import SweepCell, load_config, parse_varied, runs_of_file, sweep_cells
from ptd.launch.program import Program
from ptd.report.heat_map import heat_map
from ptd.runs.metrics_log import read_records
from ptd.types import UserError

KINDS: dict[str, dict[str, Any]] = {
    "direct": {"name": "prefix", "num_virtual_tokens": 4},
    "mlp": {"name": "prefix", "num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 8},
    "soft": {"name": "prompt", "num_virtual_tokens": 4},
}
SAME = ("loss", "grad_norm", "lr", "eval_loss", "frozen_loss", "tokens", "supervised_tokens")


@pytest.fixture
def raw(backbone_dir: Path, rows_file: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def build(kind: str, **train: Any) -> dict[str, Any]:
        return {
            "backbone": {"path": str(backbone_dir), "dtype": "float32"},
            "method": copy.deepcopy(KINDS[kind]),
            "data": {"train": str(rows_file), "eval": str(rows_file), "max_length": 48},
            "train": {
                "max_steps": 8, "per_device_train_batch_size": 3, "learning_rate": 0.05, "warmup_steps": 2,
                "logging_steps": 1, "eval_steps": 4, "save_steps": 2, **train,
            },
            "output_dir": str(tmp_path / "sweep"),
        }  # fmt: skip

    return build


def close(one: Any, other: Any, rounding: float = 1e-6) -> bool:
    return bool(one == other if isinstance(one, int) else abs(one - other) <= rounding * max(1.0, abs(other)))


def assert_alike(together: Path, alone: Path, rounding: float = 1e-6) -> None:
    """Check losses, norms, evaluations and the adapter of a run against those of the same run alone."""
    found, want = read_records(together), read_records(alone)
    assert [record["step"] for record in found] == [record["step"] for record in want]
    for here, there in zip(found, want, strict=True):
        assert {key for key in SAME if key in here} == {key for key in SAME if key in there}
        assert all(close(here[key], there[key], rounding) for key in SAME if key in here), (here, there)
    for name in ("adapter", "best"):
        for file in sorted(path.name for path in (alone / name).glob("*.safetensors")):
            mine, theirs = (load_file(folder / name / file) for folder in (together, alone))
            assert mine.keys() == theirs.keys()
            for key, tensor in theirs.items():
                assert (mine[key] - tensor).abs().max() <= 2 * rounding * max(1.0, float(tensor.abs().max())), key


VARIED = ["train.learning_rate=5e-2,2e-2", "train.seed=0,3", "method.num_virtual_tokens=3,5"]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_runs_together_are_as_each_alone(raw: Any, kind: str, packing: bool, tmp_path: Path) -> None:
    whole = raw(kind)
    whole["data"]["packing"] = packing
    cells = sweep_cells(whole, parse_varied(VARIED), "run.yaml")
    found = sweep(cells)
    assert len(cells) == len(found["cells"]) == 8
    values = {cell["name"]: cell["value"] for cell in found["cells"]}
    assert found["best"]["name"] == min(values, key=lambda name: values[name])
    for cell in cells[1::3]:
        alone = cell.config.model_copy(update={"output_dir": tmp_path / f"alone-{cell.name}"})
        train(alone)
        assert_alike(cell.config.output_dir, alone.output_dir)


def everything(folder: Path) -> dict[str, Any]:
    """Return what a sweep has left, without what depends on time: records, adapters, how the runs ended."""
    found: dict[str, Any] = {}
    for place in sorted(folder.glob("*/run.json")):
        name = place.parent.name
        found[name] = [{key: record.get(key) for key in ("step", *SAME)} for record in read_records(place.parent)]
        found[f"{name}/adapter"] = (place.parent / "adapter" / "adapter_model.safetensors").read_bytes()
        content = json.loads(place.read_text())
        found[f"{name}/end"] = content["status"], content["result"].get("dropped_after"), content["result"]["steps"]
    return found


RATES = ["train.learning_rate=5e-2,2e-2,1e-2", "method.num_virtual_tokens=3,5"]


@pytest.fixture
def cells_in(raw: Any) -> Callable[..., list[SweepCell]]:
    def build(folder: Path, vary: list[str] = RATES, **train: Any) -> list[SweepCell]:
        return sweep_cells({**raw("direct", **train), "output_dir": str(folder)}, parse_varied(vary), "run.yaml")

    return build


@pytest.mark.parametrize("halving", [False, True], ids=["all", "halving"])
@pytest.mark.parametrize("stop", [3, 6])
def test_an_interrupted_sweep_ends_as_it_would_have(cells_in: Any, tmp_path: Path, halving: bool, stop: int) -> None:
    """All runs continue after the newest checkpoint that they have in common, bit for bit."""
    sweep(cells_in(tmp_path / "whole"), halving=halving)
    again = cells_in(tmp_path / "again")
    with pytest.raises(Stopped):
        sweep(again, halving=halving, reporter=Notes(stop))
    if stop == 6:  # as if the process had been killed between the saves of two runs
        newest = max((tmp_path / "again" / again[0].name / "checkpoints").glob("step-*"))
        shutil.rmtree(newest)
    sweep(again, halving=halving)
    assert everything(tmp_path / "again") == everything(tmp_path / "whole")


def test_the_better_half_goes_on(cells_in: Any, tmp_path: Path) -> None:
    found = sweep(cells_in(tmp_path / "out"), halving=True)
    ends = sorted(cell["dropped_after"] or 8 for cell in found["cells"])
    assert ends == [1, 1, 1, 2, 4, 8]
    last = [cell["name"] for cell in found["cells"] if cell["dropped_after"] is None]
    at = {
        name: {
            record["step"]: record["eval_loss"]
            for record in read_records(tmp_path / "out" / name)
            if "eval_loss" in record
        }
        for name in (cell["name"] for cell in found["cells"])
    }
    for rung, keep in ((1, 3), (2, 2), (4, 1)):
        losses = {name: steps[rung] for name, steps in at.items() if rung in steps}
        gone = {cell["name"] for cell in found["cells"] if cell["dropped_after"] == rung}
        assert set(sorted(losses, key=lambda name: losses[name])[keep:]) == gone
    assert len(last) == 1


def test_a_run_that_diverges_leaves_the_others_as_they_are(cells_in: Any, tmp_path: Path) -> None:
    """A run whose gradients are NaN, and one that ends early, do not change a bit of the others."""
    quiet = ["train.learning_rate=5e-2,2e-2,1e-2"]
    sweep(cells_in(tmp_path / "quiet", quiet, max_steps=12))
    vary = ["train.learning_rate=5e-2,2e-2,1e-2,1e30"]
    found = sweep(cells_in(tmp_path / "loud", vary, max_steps=12))
    status = {cell["name"]: cell["status"] for cell in found["cells"]}
    assert status.pop("learning_rate=1e+30") in ("failed", "diverged")
    assert set(status.values()) == {"finished"}
    before, after = everything(tmp_path / "quiet"), everything(tmp_path / "loud")
    for name in status:
        records = zip(before[name], after[name], strict=True)
        assert all(close(one[key], other[key]) for one, other in records for key in SAME if one[key] is not None), name


WRONG = {
    "backbone.dtype=float32,bfloat16": r"--vary backbone\.dtype: cannot differ.*share one backbone",
    "train.save_steps=1,2": "cannot differ.*continue together",
    "train.learning_rates=1,2": r"train\.learning_rates: unknown key.*learning_rate",
    "train.learning_rate": r"write it as KEY=VALUE,VALUE",
    "train.seed=1,1": "has the value 1 twice",
    "train.seed=1,[": "is not a list of YAML values",
    "train.on_divergence=stop,retry": "goes back to an earlier step",
    "method.num_virtual_tokens=3,none": "num_virtual_tokens",
}


@pytest.mark.parametrize("given", WRONG)
def test_what_cannot_vary_is_refused(cells_in: Any, tmp_path: Path, given: str) -> None:
    with pytest.raises(UserError, match=WRONG[given]):
        cells_in(tmp_path / "out", [given])


def test_a_folder_with_another_sweep_is_refused(cells_in: Any, tmp_path: Path) -> None:
    sweep(cells_in(tmp_path / "out", ["train.seed=0,1"], max_steps=1))
    with pytest.raises(UserError, match="holds a sweep over other values"):
        sweep(cells_in(tmp_path / "out", ["train.seed=0,2"], max_steps=1))
    found = sweep(cells_in(tmp_path / "out", ["train.seed=0,1"], max_steps=1))  # finished: only compared again
    assert {cell["status"] for cell in found["cells"]} == {"finished"}


LABELLED = [
    {"text": "ab" * (1 + index % 7) + ("x" if index % 2 else "y"), "label": ["yes", "no"][index % 2]}
    for index in range(16)
]
HEADS: dict[str, dict[str, Any]] = {
    "head": {"method": {"name": "head"}, "task": {"kind": "classification"}},
    "p_tuning_v2": {"method": {"name": "p_tuning_v2", "num_virtual_tokens": 3}, "task": {"kind": "classification"}},
    "cloze": {
        "method": {"name": "prompt", "num_virtual_tokens": 3},
        "task": {"kind": "classification", "patterns": ["{text} is {mask}"], "verbalizer": {"yes": ["y"], "no": ["n"]}},
    },
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_and_clozes_together_are_as_each_alone(raw: Any, kind: str, tmp_path: Path) -> None:
    rows = tmp_path / "labelled.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in LABELLED), encoding="utf-8")
    whole = {**raw("direct"), **copy.deepcopy(HEADS[kind])}
    whole["data"] = {"train": str(rows), "eval": str(rows), "max_length": 40}
    cells = sweep_cells(whole, parse_varied(["train.learning_rate=5e-2,2e-2", "train.seed=0,3"]), "run.yaml")
    sweep(cells)
    for cell in cells[1::2]:
        alone = cell.config.model_copy(update={"output_dir": tmp_path / f"alone-{cell.name}"})
        train(alone)
        assert_alike(cell.config.output_dir, alone.output_dir)


def test_the_command_prints_a_table_and_the_best_run(raw: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(raw("direct", max_steps=2)), encoding="utf-8")
    command = ["sweep", str(file), "train.eval_steps=1", "--vary", "train.learning_rate=5e-2,1e-3", "--halving"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    shown = json.loads(found.stdout)
    assert shown["ranking"][0] == shown["best"]["name"]
    assert 'table class="heat"' not in (tmp_path / "sweep" / "report.html").read_text()
    assert f"best: {shown['best']['name']} (loss" in found.stderr
    assert "dropped after step 1" in found.stderr
    assert load_file(tmp_path / "sweep" / "best" / "adapter_model.safetensors").keys() == {"prompt_embeddings"}
    nothing = CliRunner().invoke(app, ["sweep", str(file)])
    assert isinstance(nothing.exception, UserError)
    assert "--vary: is missing" in str(nothing.exception)


@pytest.mark.parametrize(("kind", "sharding"), [("direct", "none"), ("mlp", "node")])
def test_ranks_share_a_sweep(launch: Any, raw: Any, tmp_path: Path, kind: str, sharding: str) -> None:
    """On two ranks each run learns as alone, and what crosses the network is the sum of the prompts, to the byte.

    The layers of an MLP are split over the ranks, which exchange more.
    """
    file = tmp_path / "run.yaml"
    whole = raw(kind, max_steps=4, per_device_train_batch_size=2)
    whole["backbone"]["sharding"] = sharding
    file.write_text(json.dumps(whole), encoding="utf-8")
    vary = ["train.learning_rate=5e-2,2e-2", "method.num_virtual_tokens=3,5"]
    options = [word for pair in vary for word in ("--vary", pair)]
    launch(2, Path(cli.__file__).with_name("__main__.py"), "sweep", file, *options)
    whole["backbone"]["sharding"] = "none"
    whole["train"]["per_device_train_batch_size"] = 4
    cells = sweep_cells(whole, parse_varied(vary), "run.yaml")
    numbers = 0
    for cell in cells:
        alone = cell.config.model_copy(update={"output_dir": tmp_path / f"alone-{cell.name}"})
        train(alone)
        assert_alike(cell.config.output_dir, alone.output_dir, 1e-5)
        adapter = load_file(alone.output_dir / "adapter" / "adapter_model.safetensors")
        numbers += adapter["prompt_embeddings"].numel()
    for cell in cells if kind == "direct" else []:
        sent = [record["network_bytes_prompt"] for record in read_records(cell.config.output_dir) if "loss" in record]
        ring = 2 * (2 - 1)  # an all-reduce of n ranks sends 2 (n - 1) / n of its bytes from each of them
        assert set(sent) == {ring * (4 * numbers + 8 * 5 * len(cells))}


def test_members_have_rows_and_keys_of_their_own(raw: Any, rows_file: Path, tmp_path: Path) -> None:
    """``members`` of a run file: each learns from its own rows what it would learn alone."""
    half = tmp_path / "half.jsonl"
    half.write_text("".join(rows_file.read_text(encoding="utf-8").splitlines(keepends=True)[::2]), encoding="utf-8")
    whole = raw("direct")
    members = {
        "anna": {"data": {"train": str(half)}, "train": {"learning_rate": 0.02}},
        "ben": {"data": {"max_length": 40}, "train": {"max_steps": 5, "lr_scheduler_type": "cosine"}},
        "eve": None,
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({**whole, "members": members}), encoding="utf-8")
    found = CliRunner().invoke(app, ["train", str(file)])
    assert found.exit_code == 0, found.output
    assert set(json.loads(found.stdout)["members"]) == set(members)
    assert "anna: held-out loss: frozen backbone" in found.stderr
    for member in runs_of_file(file):
        alone = member.config.model_copy(update={"output_dir": tmp_path / f"alone-{member.name}"})
        train(alone)
        assert_alike(member.config.output_dir, alone.output_dir)
    assert Program.of(file).config().output_dir == tmp_path / "sweep"


MEMBERS: dict[str, tuple[Any, str]] = {
    "another backbone": (
        {"anna": {"backbone": {"path": "x"}}},
        r"members\.anna\.backbone\.path: cannot differ.*one back",
    ),
    "a folder elsewhere": ({"../anna": None}, r"members\.\.\./anna: is the name of a folder"),
    "no members": ({}, "has to map names to changed keys"),
    "no sections": ({"anna": {"data": "rows.jsonl"}}, r"members\.anna: has to hold sections with keys"),
    "an unknown key": ({"anna": {"train": {"rate": 1}}}, r"members\.anna: train\.rate: unknown key"),
    "two kinds": ({"anna": {"method": {"name": "prompt"}}, "ben": None}, "one batch cannot have prompts of two kinds"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_members_that_cannot_be_trained_together_are_refused(raw: Any, tmp_path: Path, case: str) -> None:
    given, said = MEMBERS[case]
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({**raw("direct"), "members": given}), encoding="utf-8")
    with pytest.raises(UserError, match=said):
        train_members(runs_of_file(file))
    assert not (tmp_path / "sweep" / "ben" / "adapter").exists()


def test_other_commands_say_that_a_file_has_members(raw: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({**raw("direct"), "members": {"anna": None}}), encoding="utf-8")
    with pytest.raises(UserError, match="only ptd train, under any launcher, reads several members"):
        load_config(file)


PLACES: dict[str, dict[str, dict[str, Any]]] = {
    "checkpointing": {"backbone": {"gradient_checkpointing": True}},
    "accumulation": {"train": {"gradient_accumulation_steps": 2, "max_steps": 4}},
    "nf4": {"backbone": {"quantization": "nf4"}},
    "int8": {"backbone": {"quantization": "int8"}},
}


@pytest.mark.parametrize("place", PLACES)
def test_placements_and_accumulation(raw: Any, place: str, tmp_path: Path) -> None:
    whole = raw("direct")
    for section, changes in PLACES[place].items():
        whole[section] |= changes
    cells = sweep_cells(whole, parse_varied(["train.seed=0,3", "method.num_virtual_tokens=3,5"]), "run.yaml")
    sweep(cells)
    alone = cells[3].config.model_copy(update={"output_dir": tmp_path / "alone"})
    train(alone)
    assert_alike(cells[3].config.output_dir, alone.output_dir, 2e-5 if place in ("nf4", "int8") else 1e-6)


def test_the_heat_map_shows_the_best_run_of_each_place(cells_in: Any, tmp_path: Path) -> None:
    vary = ["train.learning_rate=5e-2,1e-3", "method.num_virtual_tokens=3,5", "train.seed=0,1"]
    found = sweep(cells_in(tmp_path / "out", vary, max_steps=1))
    shown = heat_map("loss", found["cells"], lower_is_better=True)
    assert shown is not None
    assert (shown.rows, shown.columns) == (("0.05", "0.001"), ("3", "5"))
    for row, values in zip(shown.rows, shown.values, strict=True):
        for column, cell in zip(shown.columns, values, strict=True):
            place = [x for x in found["cells"] if [*map(str, x["changes"].values())][:2] == [row, column]]
            assert cell.text == f"{min(x['value'] for x in place):.4g}"
    best = [cell for values in shown.values for cell in values if cell.best]
    assert {cell.shade for cell in best} == {60}
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"<strong>{best[0].text}</strong>" in page
    assert "the best run over train.seed" in page
