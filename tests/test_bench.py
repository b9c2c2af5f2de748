"""``ptd bench``: the FLOP formula against torch's counter, the equal work of both sides, the report, and refusals."""

from __future__ import annotations

import importlib
import json
import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from families import save_backbone
from torch.utils.flop_counter import FlopCounterMode

from ptd.bench import Comparison, _check, bench
from ptd.bench.flops import padded_load
from ptd.bench.machine import evidence, matmul_rate
from ptd.bench.memory import PeakMemory
from ptd.bench.peft_side import PeftSide
from ptd.bench.players import Here, Player
from ptd.bench.ptd_side import PtdSide
from ptd.bench.report import parse_sweep, plot_curve
from ptd.bench.sides import length_grouped
from ptd.cli import main
from ptd.config import parse_config
from ptd.engine.phases import PHASES
from ptd.types import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by PEFT
aten = torch.ops.aten
PREFIX: dict[str, Any] = {"name": "prefix", "num_virtual_tokens": 16}
ROWS = np.arange(4)


def attention_flops(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def attention_backward_flops(
    dout: Any, q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **options: Any
) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


# The formulas that torch uses for its other attention kernels (sdpa_flop_count and sdpa_backward_flop_count).
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write rows of 16, 32 and 48 one-byte tokens including EOS; torch's CPU kernel pads keys to a multiple of 16."""
    drawn = random.Random(0)
    rows = []
    for index in range(24):
        length, prompt = 16 * (1 + index % 3), drawn.randint(4, 10)
        rows.append({"prompt": "a" * prompt, "completion": "b" * (length - prompt - 1)})
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_of(path: Path, rows: Path, tuning: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """Return a run file with 4 rows per step, as a mapping."""
    raw: dict[str, Any] = {
        "backbone": {"path": str(path), "dtype": "float32"},
        "method": tuning,
        "data": {"train": str(rows), "max_length": 64},
        "train": {"per_device_train_batch_size": 4, "learning_rate": 1e-3},
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return raw


def both(raw: dict[str, Any]) -> tuple[PtdSide, PeftSide]:
    """Return both sides of a run, in this process; raise `UserError` if they cannot be compared."""
    config = parse_config(raw)
    ptd = PtdSide(config, compared=True)
    obstacle = ptd.facts().obstacle
    if obstacle is not None:
        raise UserError(obstacle)
    return ptd, PeftSide(config, ptd.hand_over(), "as-run")


def counted(step: Any) -> dict[str, int]:
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        step()
    return {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}


def by_formula(side: PtdSide) -> int:
    assert side.formula is not None
    return sum(side.formula.flops(side._load(batch)) for batch in side.batches.of(ROWS))


@pytest.mark.parametrize(
    ("method", "sections"),
    [
        (PREFIX, {}),
        (PREFIX, {"data": {"packing": False}}),
        (PREFIX, {"backbone": {"gradient_checkpointing": True}}),
        ({"name": "prompt", "num_virtual_tokens": 16}, {"data": {"packing": False}}),
    ],
    ids=["packed", "padded", "checkpointed", "soft"],
)
def test_flops_are_those_torch_counts(backbone_dir, rows_file, method, sections) -> None:
    """The counts are exactly equal, including attention, because lengths are multiples of 16."""
    side = PtdSide(parse_config(run_of(backbone_dir, rows_file, method, **sections)))
    assert by_formula(side) == sum(counted(lambda: side.check(ROWS)).values())


@pytest.mark.parametrize(
    ("family", "method", "kind"),
    [
        ("gpt2", PREFIX, "causal_lm"),
        ("gpt_neox", {"name": "prompt", "num_virtual_tokens": 5}, "causal_lm"),
        ("bert", {"name": "p_tuning_v2", "num_virtual_tokens": 5}, "classification"),
        ("t5", PREFIX, "seq2seq_lm"),
        ("bart", {"name": "prompt", "num_virtual_tokens": 5}, "seq2seq_lm"),
    ],
)
def test_flops_of_linear_layers_in_every_kind_of_model(tmp_path, rows_file, family, method, kind) -> None:
    rows = rows_file
    if kind == "classification":
        rows = tmp_path / "labelled.jsonl"
        text = [{"text": "ab" * (2 + index % 5), "label": "yn"[index % 2]} for index in range(8)]
        rows.write_text("".join(json.dumps(row) + "\n" for row in text))
    raw = run_of(save_backbone(tmp_path / family, family), rows, method, task={"kind": kind})
    side = PtdSide(parse_config(raw))
    assert side.formula is not None, side.uncounted
    loads = [side._load(batch) for batch in side.batches.of(ROWS)]
    expected = sum(cost * load.rows[name] for load in loads for name, cost in side.formula.linear.items())
    found = counted(lambda: side.check(ROWS))
    assert sum(count for name, count in found.items() if name in ("aten.mm", "aten.addmm")) == expected > 0


def test_experts_are_not_counted(tmp_path, rows_file) -> None:
    side = PtdSide(parse_config(run_of(save_backbone(tmp_path / "moe", "mixtral"), rows_file, PREFIX)))
    assert side.formula is None
    assert "mixtures of experts" in str(side.uncounted)
    assert side.take(ROWS).flops is None


@pytest.mark.parametrize(
    "method",
    [
        PREFIX,
        {"name": "prompt", "num_virtual_tokens": 5},
        # The embedding of PEFT's MLP is as wide as the keys: 2 heads of size 8.
        {**PREFIX, "prefix_projection": True, "embedding_size": 16, "encoder_hidden_size": 24},
        {"name": "p_tuning", "num_virtual_tokens": 5, "encoder_hidden_size": 24},
    ],
    ids=["prefix", "prompt", "prefix MLP", "LSTM"],
)
def test_both_sides_do_the_same_work(tmp_path, backbone_dir, rows_file, method) -> None:
    ptd, peft = both(run_of(backbone_dir, rows_file, method, train={"gradient_accumulation_steps": 2}))
    lane = Comparison("as-run", "random", ptd.rows, {"ptd": Here(ptd), "peft": Here(peft)})
    rows = lane.schedule(0)
    assert len(rows) == 8
    assert max(_check(lane, "float32")["loss"], _check(lane, "float32")["gradient"]) < 1e-5
    assert peft.formula is not None
    batches = peft._batches(rows)
    assert len(batches) == 2
    found = counted(lambda: peft._forward_backward(batches))
    if "encoder_hidden_size" not in method:  # the re-parameterisation is not counted
        assert sum(found.values()) == sum(peft.formula.flops(peft._load(batch)) for batch in batches)

    mine, theirs = ptd.take(rows), peft.take(rows)
    assert (mine.tokens, mine.supervised_tokens) == (theirs.tokens, theirs.supervised_tokens)
    assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert mine.positions == mine.tokens < theirs.positions
    # ptd takes its step in the backbone's units, so the sides' parameters differ from here on; both losses decrease.
    loss, gradient = ptd.check(rows)
    assert loss < mine.loss
    assert peft.check(rows, gradient)["loss"] < theirs.loss

    with torch.no_grad():
        peft.parameters[0].mul_(1.5)
    with pytest.raises(UserError, match="do not compute the same"):
        _check(lane, "float32")


def test_peft_at_its_best_takes_the_fastest_batch(tmp_path, backbone_dir, rows_file) -> None:
    _, peft = both(run_of(backbone_dir, rows_file, PREFIX))
    found = peft.fit(16)
    assert list(found["tried"]["sdpa"]) == [4, 8, 16]
    assert peft.micro_rows == found["rows"] == max(found["tried"]["sdpa"], key=found["tried"]["sdpa"].get)


def test_a_report_of_both_sides(tmp_path, backbone_dir, rows_file, capsys, monkeypatch) -> None:
    """The command runs each side in its own process, prints tables, and writes JSON and a plot into the folder."""
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(run_of(backbone_dir, rows_file, PREFIX)), encoding="utf-8")
    arguments = ["--against", "peft", "--peft", "compiled", "--repeats", "2", "--warmup", "1"]
    arguments += ["-o", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["ptd", "bench", str(run), "train.seed=3", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "ptd / PEFT, median of pairs" in shown
    assert "PEFT, compiled" in shown
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert found["command"].startswith("ptd bench")
    assert {"commit", "date", "hardware", "versions", "machine", "threads", "config", "network"} <= set(found)
    assert "peft" in found["versions"]
    assert found["config"]["train"]["seed"] == 3
    assert found["machine"]["dtype"] == found["dtype"] == "float32"
    (lane,) = found["lanes"]
    assert lane["rows_per_step"] == 4
    assert lane["same_work"]["loss"] <= lane["same_work"]["loss_tolerance"] == 1e-5
    assert lane["same_work"]["gradient"] <= 1e-5
    assert lane["ratio"]["quartiles"][0] <= lane["ratio"]["median"] <= lane["ratio"]["quartiles"][1]
    mine, theirs = lane["sides"]["ptd"], lane["sides"]["peft"]
    assert theirs["settings"]["environment"]
    assert theirs["settings"]["compiled"]
    assert mine["tokens_per_step"] == theirs["tokens_per_step"]
    assert mine["padding_share"] == 0
    for side in (mine, theirs):
        assert set(side["phase_seconds"]) == set(PHASES)
        assert sum(side["phase_seconds"].values()) == pytest.approx(side["step_seconds"], rel=0.02)
        assert side["flops_per_second"] > 0
        assert side["share_of_matmul_rate"] == side["flops_per_second"] / found["machine"]["flops_per_second"]
        assert side["peak_memory_bytes"] > 0
        assert len(side["all_step_seconds"]) == 2
    curve = tmp_path / "curve.png"
    plot_curve("virtual tokens", [(16, found), (32, found)], curve)
    assert curve.is_file()
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    *_, line = importlib.import_module("throughput").rows_of_table({"tiny": found})
    assert line.startswith("| tiny | compiled | ")
    assert f"**{lane['ratio']['median']:.2f} ×**" in line


@pytest.mark.parametrize(
    ("method", "sections", "said"),
    [
        ({"name": "head"}, {"task": {"kind": "classification"}}, "task.kind classification has another head"),
        ({**PREFIX, "freeze_first_token": True}, {}, "PEFT builds the prompt encoder of method prefix differently"),
        ({**PREFIX, "prefix_projection": True}, {}, "set method.embedding_size"),
        ({"name": "p_tuning"}, {"data": {"prompt_template": "{v:2}{prompt}{v:2}"}}, "PEFT puts them only before"),
        (PREFIX, {"backbone": {"gradient_checkpointing": True}}, "PEFT refuses this run"),
        (PREFIX, {"backbone": {"sharding": "world"}}, "shards its backbone"),
    ],
)
def test_what_peft_cannot_do_is_refused(tmp_path, backbone_dir, rows_file, method, sections, said) -> None:
    rows = rows_file
    if "task" in sections:
        rows = tmp_path / "labelled.jsonl"
        rows.write_text("".join(json.dumps({"text": "ab", "label": label}) + "\n" for label in "xy"))
    with pytest.raises(UserError, match=said):
        both(run_of(backbone_dir, rows, method, **sections))


def test_what_cannot_be_timed_is_refused(tmp_path, backbone_dir, rows_file, monkeypatch, capsys) -> None:
    config = parse_config(run_of(backbone_dir, rows_file, PREFIX))
    with pytest.raises(UserError, match="cannot be compared with 'nemo'"):
        bench(config, against="nemo")
    monkeypatch.setattr(sys, "argv", ["ptd", "bench", "run.yaml", "--peft", "best"])
    with pytest.raises(SystemExit):
        main()
    assert "--peft best: has no effect without --against peft" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one of several that a launcher started"):
        bench(config, against="peft")
    monkeypatch.delenv("WORLD_SIZE")
    rows = tmp_path / "labelled.jsonl"
    rows.write_text("".join(json.dumps({"text": "ab", "label": label}) + "\n" for label in "xy"))
    cloze = {"kind": "classification", "patterns": ["{text} {mask}"], "verbalizer": {"x": ["a"], "y": ["b"]}}
    raw = run_of(backbone_dir, rows, {"name": "hard_prompt"}, task=cloze, data={"eval": str(rows)})
    with pytest.raises(UserError, match="trains nothing, so there is no step"):
        PtdSide(parse_config(raw))
    unstable = PtdSide(parse_config(run_of(backbone_dir, rows_file, PREFIX)))
    with torch.no_grad():
        next(iter(unstable.step.encoder.parameters())).fill_(float("nan"))
    with pytest.raises(UserError, match=r"skipped.*lower train.learning_rate"):
        unstable.take(ROWS)


@pytest.mark.parametrize("given", ["num_virtual_tokens=8", "method.name=prefix", "train.seed=", "train.seed"])
def test_a_sweep_is_a_key_and_numbers(given: str) -> None:
    with pytest.raises(UserError, match="--sweep"):
        parse_sweep(given)
    assert parse_sweep("method.num_virtual_tokens=8, 32") == ("method.num_virtual_tokens", ["8", "32"])


def test_rows_of_like_length_stay_together() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 103)
    rows = length_grouped(lengths, 8, seed=1)
    steps = [rows(step) for step in range(24)]  # two epochs of twelve complete steps
    assert all(len(step) == 8 for step in steps)
    for epoch in (steps[:12], steps[12:]):
        assert len(set(np.concatenate(epoch).tolist())) == 96
        assert lengths[epoch[0]].min() == max(lengths[step].min() for step in epoch), "the longest are the first"
    ordered = sorted(steps[:12], key=lambda step: int(lengths[step].min()))
    for shorter, longer in pairwise(ordered):
        assert lengths[shorter].max() <= lengths[longer].min()
    assert any((one != other).any() for one, other in zip(steps[:12], steps[12:], strict=True))


def test_peak_memory_is_that_of_a_step() -> None:
    memory = PeakMemory(torch.device("cpu"))
    block = torch.ones(80 << 20)  # 320 MiB, which the allocator never caches, whatever its settings
    with_it = memory.peak()
    assert with_it >= block.nbytes
    del block
    memory.reset()
    assert memory.peak() < with_it - (64 << 20)


def test_a_figure_says_where_it_is_from() -> None:
    found = evidence("peft", "no-such-package")
    assert found["hardware"]
    assert "no-such-package" not in found["versions"]
    small = matmul_rate(torch.float32, torch.device("cpu"), size=64)
    assert small["flops_per_second"] > 0
    assert small["size"] == 64


def test_a_side_that_dies_is_reported() -> None:
    player = Player("PEFT's side")
    player._process.kill()
    with pytest.raises(UserError, match=r"PEFT's side exited while it ran 'check' \(killed"):
        player.ask("check", ROWS)
    player.close()


def test_padding_counts_for_peft() -> None:
    load = padded_load(2, 10, 3, prefix=True)
    assert load.rows == {"positions": 20}
    assert load.own_pairs == {"decoder": 2 * 10 * 13}
    assert padded_load(2, 10, 3, prefix=False).own_pairs == {"decoder": 2 * 13 * 13}
