"""benchmarks/quality.py: splits and metrics, both sides of a cell, resuming, reports, and twins."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from families import save_backbone, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptd.config import TrainConfig
from ptd.quickstart import BACKBONE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # by PEFT
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),  # by PEFT, in its own generate()
]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PLACES = ("riverside", "city centre")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a module next to benchmarks/quality.py, as the script does."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def tasks(load: Any) -> ModuleType:
    module: ModuleType = load("quality_tasks")
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the benchmark's files: 60 meaning representations of two rows, not adjacent, and 40 sentences per split."""
    folder = tmp_path_factory.mktemp("data")
    with (folder / "e2e_dev.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mr", "ref"])
        for begin in ("There is a pub called", "You find the pub"):
            for number in range(60):
                place = PLACES[number % 2]
                mr = f"name[Inn {number}], area[{place}], familyFriendly[no]"
                writer.writerow([mr, f"{begin} Inn {number} in the {place}."])
    for name in ("train", "dev"):
        lines = [f"{'good' if row % 2 else 'dull'} film {row}\t{row % 2}" for row in range(40)]
        (folder / f"sst2_{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_bleu_of_known_values(tasks: ModuleType) -> None:
    text, reference = "the cat sat on the mat", "the cat is on the mat"
    assert tasks.corpus_bleu([reference], [[reference]]) == pytest.approx(100)
    # The precisions are 5/6, 3/5, 1/4 and 0/3; exponential smoothing replaces 0/3 by 1/(2 · 3).
    assert tasks.corpus_bleu([text], [[reference]]) == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25)
    # The text is shorter than its reference: all precisions are 1, the brevity penalty is exp(1 − 6/4).
    assert tasks.corpus_bleu(["a b c d"], [["a b c d e f"]]) == pytest.approx(100 * math.exp(1 - 6 / 4))


def test_bleu_reads_all_references_which_may_differ_in_number(tasks: ModuleType) -> None:
    text, references = "a b c d e", ["a b c d", "c d e f g h"]
    # Every n-gram but "b c d e" is in a reference; of two references equally near in length the shorter one counts,
    # so there is no penalty.
    assert tasks.corpus_bleu([text], [references]) == pytest.approx(100 * (1 / 2) ** 0.25)
    # With a second text, which has one reference, 9/9, 7/7, 5/5 and 2/3 of the n-grams match.
    several = tasks.corpus_bleu([text, "v w x y"], [references, ["v w x y"]])
    assert several == pytest.approx(100 * (2 / 3) ** 0.25)
    with pytest.raises(ValueError, match="at least one reference"):
        tasks.corpus_bleu([text, text], [references, []])
    with pytest.raises(ValueError, match="at least one reference"):
        tasks.corpus_bleu([], [])


def test_slots_are_whole_words_as_they_are_written(tasks: ModuleType) -> None:
    mr = "name[The Inn], priceRange[£20-25], area[city centre], customer rating[3 out of 5], familyFriendly[yes]"
    assert [name for name, _ in tasks.slots(mr)] == ["name", "priceRange", "area", "customer rating", "familyFriendly"]
    assert tasks.slots_found(mr, "The inn, in the City-Centre for £20-25,\nis rated 3 out  of 5. yes") == (4, 4)
    assert tasks.slots_found(mr, "The Innkeeper, city centres, £20-255, 13 out of 5") == (0, 4)
    assert tasks.slots_found("name[Café (No. 1)]", "at café (no. 1)!") == (1, 1)
    assert tasks.slot_rate([(mr, "The Inn"), ("name[A], near[B]", "A near B")]) == pytest.approx(100 * 3 / 6)


def test_no_mr_is_on_two_sides(tasks: ModuleType, data: Path) -> None:
    rows = tasks.read_e2e(data / "e2e_dev.csv")
    parts = tasks.split_e2e(rows)
    train, development, test = ({row["prompt"] for row in part} for part in parts)
    assert len(train | development | test) == len(train) + len(development) + len(test)
    assert (len(train), len(development), len(test)) == (54, 2, 4)
    assert sorted(map(str, rows)) == sorted(str(row) for part in parts for row in part)
    found = tasks.material("e2e", data)
    assert {mr: len(references) for mr, references in found.mrs.items()} == dict.fromkeys(sorted(test), 2)


def test_development_and_test_rows_of_labels_differ(tasks: ModuleType, data: Path) -> None:
    found = tasks.material("sst2", data)
    held_out = tasks.read_sst2(data / "sst2_dev.tsv")
    assert len(found.development) == 8
    assert sorted(map(str, [*found.development, *found.test])) == sorted(map(str, held_out))
    assert held_out[1] == {"text": "good film 1", "label": "positive"}
    few = tasks.material("sst2", data, test_rows=4)
    assert len(few.test) == len(few.development) == 4


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save the quickstart's backbone in fp32, so that results computed in a different order differ little."""
    folder = tmp_path_factory.mktemp("backbone")
    AutoModelForCausalLM.from_pretrained(BACKBONE, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BACKBONE).save_pretrained(folder)
    return str(folder)


def job(
    load: Any, backbone: str, place: Path, data: Path, side: str, method: str, task: str, rate: float | None = 1e-2
) -> Any:
    tasks, jobs = load("quality_tasks"), load("quality_jobs")
    folder = place / task
    tasks.write_material(tasks.material(task, data, test_rows=8, test_mrs=2), folder)
    cell = jobs.Cell(side, method, task, "default", 0, rate)
    return jobs.Job(cell, backbone, str(folder), str(place), steps=2)


@pytest.mark.parametrize(("task", "method"), [("e2e", "frozen"), ("sst2", "hard_prompt")])
def test_the_backbone_alone_is_measured_alike_by_both_sides(
    load: Any, tmp_path: Path, data: Path, backbone: str, task: str, method: str
) -> None:
    """Plain transformers, and LoRA before its first step (still without effect), have ptd's loss on the same tokens."""
    import peft

    sides = load("quality_peft")
    alone = load("quality_cells").run_cell(job(load, backbone, tmp_path, data, "ptd", method, task, None))
    plain = sides.Plain(job(load, backbone, tmp_path, data, "peft", "lora r8", task))
    base = sides.load_base(backbone, task).eval()
    measured = [plain.measure(base, "test")]
    mrs = load("quality_tasks").read_mrs(tmp_path / task)
    if task == "e2e":
        texts = plain.texts(base, list(mrs), one_length=False)
        assert load("quality_tasks").text_metrics(texts, mrs).items() <= alone.items()
    tuned = peft.get_peft_model(base, sides.peft_config("lora r8", task, backbone)).eval()
    measured.append(plain.measure(tuned, "test"))
    for each in measured:
        assert set(each) == {"loss", "supervised_tokens" if task == "e2e" else "accuracy"}
        assert each == pytest.approx({name: alone[name] for name in each}, rel=1e-5)


@pytest.mark.parametrize(("task", "method"), [("e2e", "prefix"), ("sst2", "prompt")])
def test_a_cell_runs_on_both_sides(
    load: Any, tmp_path: Path, data: Path, backbone: str, task: str, method: str
) -> None:
    found = {}
    for side in ("ptd", "peft"):
        place = tmp_path / side
        place.mkdir()
        found[side] = load("quality_cells").run_cell(job(load, backbone, place, data, side, method, task))
    scores = {"bleu", "slots"} if task == "e2e" else {"accuracy", "development_accuracy"}
    wanted = {"loss", "development_loss", "seconds", "tokens_per_second", "peak_memory_bytes", *scores}
    for each in found.values():
        assert wanted <= set(each)
        assert all(math.isfinite(each[name]) for name in wanted)
        assert each["learning_rate"] == 1e-2
    for name in ("trained_parameters", "supervised_tokens"):
        assert found["ptd"].get(name) == found["peft"].get(name)
    assert found["ptd"]["adapter_bytes"] == pytest.approx(4 * found["ptd"]["trained_parameters"], rel=0.05)


@pytest.fixture
def command(load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs a benchmark as typed, in this process but for its cells, and returns its output."""

    def run(program: str, *words: object) -> str:
        module = load(program)
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / f"{program}.py"), *map(str, words)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    return run


def test_cells_are_measured_once_and_the_missing_ones_by_the_next_start(
    command: Any, tmp_path: Path, data: Path
) -> None:
    output = tmp_path / "quality.json"
    given = ("--quick", "--threads", 1, "--model", BACKBONE, "--data", data, "--output", output)
    said = command("quality", *given, "--only", "ptd prefix e2e")
    assert f"ptd prefix e2e default, seed 0: learning_rate {TrainConfig().learning_rate:g}" in said
    written = json.loads(output.read_text())
    (found,) = written["records"]
    assert str(tmp_path.parent) not in json.dumps(written)
    assert written["evidence"]["command"].startswith(
        "python benchmarks/quality.py --quick --threads 1 --model backbone "
    )
    said = command("quality", *given, "--only", "prefix e2e")
    assert "ptd prefix e2e default, seed" not in said
    assert json.loads(output.read_text())["records"] == [found]
    theirs_at = tmp_path / "quality_peft.json"
    written_by_peft = json.loads(theirs_at.read_text())
    (theirs,) = written_by_peft["records"]
    assert (theirs["side"], theirs["method"], theirs["outcome"]) == ("peft", "prefix", "measured")
    assert theirs["learning_rate"] == 1e-3
    page = output.with_suffix(".md").read_text()
    assert "| ptd | prefix | 0.05 (default) |" in page
    assert "| PEFT | prefix | 0.001 (default) |" in page
    assert "not comparable" not in page
    written["evidence"]["settings"]["steps"] = 4
    output.write_text(json.dumps(written))
    command("quality", "--report", "--output", output)
    assert "**The sides are not comparable**: they differ in steps." in output.with_suffix(".md").read_text()


def test_rows_of_peft_outlive_a_change_of_ptd(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The digest of PEFT's file covers what its figures depend on: the rows and their tokens, not the rest of ptd."""
    quality, rows = load("quality"), load("rows")
    root = tmp_path / "clone"
    for part in ("ptd", "kernels", "launch", "ds_configs", "benchmarks"):
        shutil.copytree(rows.ROOT / part, root / part, ignore=shutil.ignore_patterns("results", "__pycache__"))
    monkeypatch.setattr(rows, "ROOT", root)
    args = argparse.Namespace(output=tmp_path / "q.json", model=None, encoder=None, data=None, replace=False)
    args.minutes = None

    def begin(side: str) -> None:
        runner = quality.Runner(tmp_path, {}, args)
        try:
            runner.rows(side).add({"side": side, "method": "m", "task": "e2e", "rate": "default", "seed": 0})
        finally:
            runner.close()

    for side in ("ptd", "peft"):
        begin(side)
    (root / "ptd" / "methods" / "prefix.py").write_text("changed", encoding="utf-8")
    begin("peft")
    with pytest.raises(SystemExit, match="were measured with code"):
        begin("ptd")
    (root / "ptd" / "data" / "batches.py").write_text("changed", encoding="utf-8")
    with pytest.raises(SystemExit, match="were measured with code"):
        begin("peft")


def test_what_a_cell_needs_and_is_missing_is_said_and_looked_at_again(command: Any, tmp_path: Path, data: Path) -> None:
    output = tmp_path / "quality.json"
    for _ in range(2):
        command("quality", "--quick", "--data", data, "--output", output, "--only", "head sst2 ")
        (found,) = json.loads(output.read_text())["records"]
        assert (found["outcome"], found["method"]) == ("skipped", "head")
        assert "run python benchmarks/real_llm.py FOLDER, then give FOLDER with --model" in found["reason"]
    (tmp_path / "empty").mkdir()
    given = ("--model", BACKBONE, "--data", tmp_path / "empty", "--output", tmp_path / "other.json")
    command("quality", "--quick", *given, "--only", "frozen")
    assert "| skipped: --data has no e2e_dev.csv |" in (tmp_path / "other.md").read_text()


def record(side: str, method: str, task: str = "e2e", rate: str = "default", seed: int = 0, **rest: Any) -> Any:
    names = {"side": side, "method": method, "task": task, "rate": rate, "seed": seed}
    if "reason" in rest:
        return names | {"outcome": "failed"} | rest
    trained = {"trained_parameters": 1000, "adapter_bytes": 4000, "seconds": 10.0, "tokens_per_second": 100.0}
    rest = {"learning_rate": 1e-2, "development_loss": rest.get("loss"), **rest}
    return names | {"outcome": "measured"} | (trained if method != "frozen" else {"trained_parameters": 0}) | rest


def partial() -> list[Any]:
    """Return the rows of a benchmark that was stopped halfway."""
    alone = record("ptd", "frozen", loss=2.5, bleu=3.0, slots=40.0, learning_rate=None, adapter_bytes=0)
    rows = [alone | {"slots_of_references": 85.0}]
    rows += [record("ptd", "prefix", seed=seed, loss=loss, bleu=20.0) for seed, loss in enumerate((1.5, 1.7, 2.9))]
    rows += [record("ptd", "prefix", rate=f"grid {name}", learning_rate=rate, loss=loss, development_loss=loss)
             for name, rate, loss in (("low", 1e-2 / 3, 1.4), ("high", 3e-2, float("nan")))]  # fmt: skip
    rows += [record("peft", "prompt", reason="ValueError: no | such prompt")]
    rows += [record("peft", "lora r8", loss=1.3, learning_rate=2e-4, trained_parameters=2_000_000)]
    rows += [record("ptd", "head", task="sst2", loss=0.8, accuracy=51.0, development_accuracy=50.0)]
    return rows


def test_a_partial_file_is_reported_as_it_is(load: Any, tmp_path: Path) -> None:
    report, rows = load("quality_report"), load("rows")
    output = tmp_path / "quality.json"
    rows.write(output, partial(), {"command": "python benchmarks/quality.py", "settings": {"steps": 80}})
    report.report(output, plots=True)
    page = output.with_suffix(".md").read_text(encoding="utf-8")
    assert "| ptd | prefix | 0.01 (default) | 2.033 (1.500…2.900) | 20.0 (20.0…20.0) |" in page
    assert "1 of 3 worse than without training" in page
    assert "| ptd | prefix | 0.0033 (best of grid) | 1.400 |" in page
    assert "at the edge of the grid" in page
    assert "| PEFT | prompt | default | failed: ValueError: no / such prompt |" in page
    assert "| ptd | head | 0.01 (default) | 51.0 | 0.800 |" in page
    assert "1 of 1 worse than without training" in page  # ln 2 < 0.8
    assert "Human references for these meaning representations: slots 85.0 %." in page
    assert "losses are not comparable" not in page
    odd = [partial()[0] | {"supervised_tokens": 10}, partial()[1] | {"supervised_tokens": 12}]
    assert "**The losses are not comparable**: they are over [10, 12] tokens." in report.markdown(odd, {})
    board = report.leaderboard(report.lines_of(partial()))
    assert [(line["method"], line["kind"], line["loss"]) for line in board] == [
        ("lora r8", "default", 1.3),
        ("prefix", "best of grid", 1.4),
        ("prefix", "default", pytest.approx(2.0333, abs=1e-3)),
    ]
    with output.with_suffix(".csv").open(encoding="utf-8") as file:
        found = {(line["method"], line["kind"]): line for line in csv.DictReader(file)}
    assert found["prefix", "default"]["diverged"] == "1"
    assert found["prefix", "default"]["loss_max"] == "2.9"
    assert (tmp_path / "quality_e2e.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "quality_sst2-encoder.png").exists()


def test_an_empty_file_is_reported(load: Any, tmp_path: Path) -> None:
    report, rows = load("quality_report"), load("rows")
    output = tmp_path / "quality.json"
    rows.write(output, [], {})
    report.report(output, plots=True)
    assert "0 rows" in output.with_suffix(".md").read_text(encoding="utf-8")


def test_costs_of_several_machines_are_not_averaged(load: Any) -> None:
    """A line has the costs of the machine that measured most of its rows, and names it if there are several."""
    report = load("quality_report")
    rows = [
        record("ptd", "prefix", seed=seed, loss=1.5, seconds=seconds, hardware=machine)
        for seed, (seconds, machine) in enumerate([(10.0, "slow"), (12.0, "slow"), (1.0, "fast")])
    ]
    rows.append(record("peft", "prefix", loss=1.6, seconds=2.0, hardware="fast"))
    lines = {line["side"]: line for line in report.lines_of(rows)}
    assert lines["ptd"]["seconds"] == 11.0
    assert (lines["ptd"]["machine"], lines["peft"]["machine"]) == ("a", "b")
    assert "Times on a: slow; b: fast." in report.markdown(rows, {})
    alone = report.markdown(rows[:2], {})
    assert "Times on slow." in alone
    assert "machine" not in report.lines_of(rows[:2])[0]


def test_a_rate_is_chosen_by_development_rows_of_three(load: Any) -> None:
    chosen = load("quality_report").chosen_rate
    rates = {"grid low": 1e-3, "grid middle": 3e-3, "grid high": 9e-3}

    def rows(side: str, method: str, losses: dict[str, float]) -> list[Any]:
        return [
            record(side, method, rate=name, learning_rate=rates[name], loss=9 - loss, development_loss=loss)
            for name, loss in losses.items()
        ]

    found = rows("peft", "prompt", {"grid low": 2.0, "grid middle": 1.0})
    assert chosen(found, "peft", "prompt", "e2e") is None
    failed = [*found, record("peft", "prompt", rate="grid high", reason="RuntimeError: killed")]
    assert chosen(failed, "peft", "prompt", "e2e") == {"rate": "grid middle", "learning_rate": 3e-3, "at_edge": False}
    found += rows("peft", "prompt", {"grid high": float("nan")})
    best = {"rate": "grid middle", "learning_rate": 3e-3, "at_edge": False}
    assert chosen(found, "peft", "prompt", "e2e") == best
    # A default outside the grid is not one of its rates; a default inside it replaces the rate that was left out.
    outside = [*found, record("peft", "prompt", learning_rate=5e-5, loss=0.1)]
    assert chosen(outside, "peft", "prompt", "e2e") == best
    inside = [*found[1:], record("peft", "prompt", learning_rate=1e-3, loss=0.1)]
    assert chosen(inside, "peft", "prompt", "e2e") == {"rate": "default", "learning_rate": 1e-3, "at_edge": True}


def test_every_side_has_three_rates_a_factor_of_three_apart(load: Any) -> None:
    quality, report = load("quality"), load("quality_report")
    default = {(cell.side, cell.method, cell.task): cell for cell in quality.default_cells(1)}
    tried: dict[Any, list[float]] = {}
    for cell in quality.grid_cells(0):
        tried.setdefault((cell.side, cell.method, cell.task), []).append(cell.learning_rate)
    trained = {key for key, cell in default.items() if cell.method not in quality.UNTRAINED}
    assert set(tried) == trained
    for key, rates in tried.items():
        side, method, task = key
        if len(rates) == 2:  # the default is the third
            rate = default[key].learning_rate or quality.ptd_rates(method)["learning_rate"]
            rates = [*rates, rate]
        low, middle, high = sorted(rates)
        assert middle / low == pytest.approx(3, rel=0.05)
        assert high / middle == pytest.approx(3, rel=0.05)
        measured = [record(side, method, task, rate=f"grid {number}", learning_rate=rate, loss=1.0)
                    for number, rate in enumerate(sorted(tried[key]))]  # fmt: skip
        if len(tried[key]) == 2:
            measured.append(record(side, method, task, learning_rate=rate, loss=0.5))
        assert report.chosen_rate(measured, side, method, task) is not None


def test_cells_are_chosen_by_their_words(load: Any) -> None:
    words = {cell.words for cell in load("quality").default_cells(3)}
    assert {"ptd prefix e2e default", "peft lora r16 sst2 default", "ptd head sst2-encoder default"} <= words
    assert len(words) == len(list(load("quality").default_cells(1)))
    counts: dict[str, int] = {}
    for cell in load("quality").default_cells(None):
        counts[cell.words] = counts.get(cell.words, 0) + 1
    assert set(counts) == words
    assert (counts["ptd prefix e2e default"], counts["ptd prefix sst2 default"]) == (3, 1)
    assert (counts["ptd frozen e2e default"], counts["peft lora r8 e2e default"]) == (1, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_twin_computes_the_same(load: Any, tmp_path: Path, dtype: str) -> None:
    source = save_backbone(tmp_path / "llama", attention_bias=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    model.save_pretrained(source)
    load("quality_transfer").twin(source, tmp_path / "twin")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype="auto")
    assert other.dtype is getattr(torch, dtype)
    ids = torch.tensor([tiny_tokenizer()("the same function").input_ids])
    with torch.no_grad():
        ours, theirs = model.eval()(ids, use_cache=True), other.eval()(ids, use_cache=True)
    assert torch.equal(ours.logits, theirs.logits)
    for mine, its in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        assert torch.equal(8 * mine.keys, its.keys)
        assert torch.equal(8 * mine.values, its.values)
    assert (tmp_path / "twin" / "tokenizer.json").is_file()


def test_a_twin_that_would_differ_is_refused(load: Any, tmp_path: Path) -> None:
    twin = load("quality_transfer").twin
    llama = save_backbone(tmp_path / "llama")
    with pytest.raises(ValueError, match="is not a power of two"):
        twin(llama, tmp_path / "twin", 6)
    with pytest.raises(ValueError, match="normalises its queries or keys"):
        twin(save_backbone(tmp_path / "qwen3", "qwen3"), tmp_path / "twin")
    with pytest.raises(ValueError, match="no attention with q_proj"):
        twin(save_backbone(tmp_path / "gpt2", "gpt2"), tmp_path / "twin")
    assert not (tmp_path / "twin").exists()


def test_a_verdict_compares_the_default_with_the_best(load: Any, tmp_path: Path) -> None:
    transfer = load("quality_transfer")
    rates = transfer.rates_around(1e-2)
    assert len(rates) == 7
    assert rates[3] == 1e-2
    losses = dict(zip(rates, ([3.0], [2.0, 2.2], [1.5], [1.8], [math.nan], [9.0], [9.0]), strict=True))
    found = transfer.verdict({0.0: [2.5], **losses}, 1e-2)
    assert (found["best_rate"], found["at_edge"], found["alone"]) == (rates[2], False, 2.5)
    assert found["gap"] == pytest.approx(0.2)
    assert transfer.verdict({0.0: [2.5]}, 1e-2)["best_rate"] is None
    assert transfer.verdict({rates[0]: [3.0]}, 1e-2)["gap"] is None
    records = [
        {"condition": "one", "learning_rate": rate, "seed": seed, "outcome": "measured", "loss": loss}
        for rate, values in {0.0: [2.5], **losses}.items()
        for seed, loss in enumerate(values)
    ]
    assert "| one | 0.0033 | 1.5000 | 0.01 | 1.8000 | 20.0 % | 2.5000 | 2 |" in transfer.table(records, {"one": 1e-2})
    transfer.draw(tmp_path / "curves.png", records, {"one": 1e-2})
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_transfer_run_is_resumed_and_drawn(command: Any, tmp_path: Path, data: Path) -> None:
    output = tmp_path / "transfer.json"
    words = ["--quick", "--threads", 1, "--rates", 1, "--data", data, "--output", output, "--plot"]
    words += ["--condition", "own", BACKBONE, "method.name=prefix", "method.num_virtual_tokens=4"]
    for start in range(2):
        said = command("quality_transfer", *words)
        assert ("seed 0: loss" in said) == (start == 0)
        found = json.loads(output.read_text())["records"]
        assert [each["learning_rate"] for each in found] == [0.0, TrainConfig().learning_rate]
        assert all(math.isfinite(each["loss"]) for each in found)
    assert str(BACKBONE) not in output.read_text()
    assert f"| own | {TrainConfig().learning_rate:g} (edge of the grid) |" in output.with_suffix(".md").read_text(
        encoding="utf-8"
    )
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
