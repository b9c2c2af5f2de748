"""``ptd eval``, ``predict``, ``generate``, ``inspect``, ``bench`` on ranks match one process, in every placement."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import EOS, VOCAB, save_backbone
from transformers import GenerationConfig

from ptd.cli import main
from ptd.commands.train import train
from ptd.config import parse_config
from ptd.runs.sampler import SPARE
from ptd.runs.samples_log import read_samples

WORKER = Path(__file__).with_name("worker_verbs.py")
# Wide enough that DeepSpeed shards the layers, in 4 bits as well: it does not shard weights below 100,000 numbers.
WIDE = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2}
WIDE_T5 = {"d_model": 384, "d_ff": 384, "d_kv": 96}
PROMPTS = ["a cat", "the quick brown fox jumps", "12 times 3 is", "I", "what is it that you have seen there?"]
SHARDED = {
    "world": ["--set", "backbone.sharding=world"],
    "node": ["--set", "backbone.sharding=node", "--set", "backbone.sharding_group_size=1"],
    "nf4": ["--set", "backbone.sharding=world", "--set", "backbone.quantization=nf4"],
    "replicated": [],
}


def stops_early(folder: Path) -> Path:
    """Let a tenth of the vocabulary end a text, so that texts of a random model have very different lengths."""
    GenerationConfig(
        eos_token_id=[EOS, *range(7, VOCAB, 10)], pad_token_id=0, decoder_start_token_id=0
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, rows_file: Path) -> dict[str, Path]:
    """Train a text model, a classifier, an encoder-decoder and a soft prompt for one step; also return the rows."""
    folder = tmp_path_factory.mktemp("adapters")
    llama = stops_early(save_backbone(folder / "llama", **WIDE))
    t5 = stops_early(save_backbone(folder / "t5", "t5", **WIDE_T5))
    labelled = folder / "labelled.jsonl"
    labelled.write_text("".join(json.dumps({"text": t, "label": t[0] < "b"}) + "\n" for t in PROMPTS))
    prefix = {"name": "prefix", "num_virtual_tokens": 4}
    runs: dict[str, Any] = {
        "text": (llama, prefix, "causal_lm", rows_file),
        "labels": (llama, {"name": "head"}, "classification", labelled),
        "t5": (t5, prefix, "seq2seq_lm", rows_file),
        "soft": (llama, {"name": "prompt", "num_virtual_tokens": 3}, "causal_lm", rows_file),
    }
    for name, (backbone, method, kind, rows) in runs.items():
        raw = {
            "backbone": {"path": str(backbone), "dtype": "float32"},
            "method": method,
            "task": {"kind": kind},
            "data": {"train": str(rows), "max_length": 64},
            "train": {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.1},
            "output_dir": str(folder / name),
        }
        train(parse_config(raw))
    return {"rows": rows_file, "labelled": labelled, **{name: folder / name for name in runs}}


@pytest.fixture(scope="module")
def commands(adapters: dict[str, Path]) -> dict[str, list[str]]:
    """Return command lines without any option for sharding, by name."""
    few = ["--batch-size", "2", "--max-new-tokens", "8"]
    five = ["--batch-size", "5"]
    seen = ["--data", str(adapters["rows"]), "--rows", "7", "--json", "--output", str(adapters["text"].parent / "seen")]
    text = ["generate", "--adapter", str(adapters["text"]), "--json", *PROMPTS]
    return {
        "eval": [
            "eval",
            "--adapter",
            str(adapters["text"]),
            "--data",
            str(adapters["rows"]),
            "--generate",
            *few,
            *five,
        ],
        "predict": ["predict", "--adapter", str(adapters["labels"]), "--data", str(adapters["labelled"])],
        "generate": [*text, *few],
        "beams": [*text, *few, "--num-beams", "3"],
        "sample": [*text, *few, "--temperature", "1"],
        "one batch": text,
        "t5": ["generate", "--adapter", str(adapters["t5"]), "--json", *PROMPTS, *few],
        "inspect t5": ["inspect", str(adapters["t5"]), *seen, "--batch-size", "2"],
        "inspect soft": ["inspect", str(adapters["soft"]), *seen, "--batch-size", "2"],
    }


SAMPLED = {"causal_lm": "text", "seq2seq_lm": "t5", "classification": "labels"}
"""The name of each task's adapter in `adapters`."""
CASES = [
    *(("world", name) for name in ("eval", "predict", "generate", "beams", "sample", "one batch", "t5")),
    *((placement, name) for placement in ("node", "nf4") for name in ("eval", "predict", "generate")),
    *(("replicated", name) for name in ("generate", "sample", "inspect t5")),
    ("world", "inspect soft"),
]


@pytest.fixture(scope="module")
def printed(launch, adapters, commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all commands on two ranks in one job; return the folder with their output."""
    folder = tmp_path_factory.mktemp("printed")
    lines = {f"{placement}-{name}": [*commands[name], *SHARDED[placement]] for placement, name in CASES}
    run = folder / "run.yaml"
    sections = json.loads((adapters["text"] / "run.json").read_text())["config"]
    run.write_text(json.dumps({name: sections[name] for name in ("backbone", "method", "data", "train")}))
    timed = ["--repeats", "2", "--warmup", "1", "--sweep", "method.num_virtual_tokens=2,6"]
    for placement in ("none", "world"):
        sharding = f"backbone.sharding={placement}"
        lines[f"bench-{placement}"] = ["bench", str(run), sharding, *timed, "-o", str(folder / placement)]
    lines |= {f"train-{kind}": ["train", str(run_file(adapters, folder, kind))] for kind in SAMPLED}
    case_file = folder / "cases.json"
    case_file.write_text(json.dumps({"commands": lines, "adapter": str(adapters["text"])}))
    launch(2, WORKER, case_file, folder)
    return folder


def run_file(adapters: dict[str, Path], folder: Path, kind: str) -> Path:
    """Write the run file of two steps with a sharded backbone and samples of five rows; return its path."""
    adapter = adapters[SAMPLED[kind]]
    writes = adapter.name != "labels"
    rows = str(adapters["rows" if writes else "labelled"])
    run = {
        "backbone": {"path": str(adapter.parent / ("t5" if adapter.name == "t5" else "llama")), "sharding": "world"},
        "method": {"name": "prefix", "num_virtual_tokens": 4} if writes else {"name": "head"},
        "task": {"kind": kind},
        "data": {"train": rows, "eval": rows, "max_length": 64},
        "train": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.1, "samples": 5},
        "output_dir": str(folder / kind),
    }
    path = folder / f"{kind}.yaml"
    path.write_text(json.dumps(run))
    return path


@cache
def in_one_process(*arguments: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ptd", *arguments])
        with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    return out.getvalue()


def numbers(printed: str, name: str) -> list[Any]:
    whole = name == "eval" or name.startswith("inspect")
    rows = [json.loads(printed)] if whole else [json.loads(line) for line in printed.splitlines()]

    def close(text: str) -> Any:
        return pytest.approx(float(text), rel=1e-5, abs=2e-6)  # abs: a small difference of losses has their error

    return [json.loads(json.dumps(row), parse_float=close) for row in rows]


@pytest.mark.parametrize(("placement", "name"), CASES)
def test_ranks_say_what_one_process_says(printed: Path, commands, placement: str, name: str) -> None:
    quantised = ["--set", "backbone.quantization=nf4"] if placement == "nf4" else []
    alone = in_one_process(*commands[name], *quantised)
    ranks = [(printed / f"{placement}-{name}.{rank}").read_text() for rank in range(2)]
    assert ranks[1] == "", "rank 0 alone prints"
    assert numbers(ranks[0], name) == numbers(alone, name)
    if name in ("generate", "t5"):
        lengths = {len(json.loads(line)["completion"]) for line in alone.splitlines()}
        assert len(lengths) > 2, "ranks are done at different times"


def test_the_weights_are_parted(printed: Path) -> None:
    assert all(float((printed / f"parted.{rank}").read_text()) < 0.51 for rank in range(2))


@pytest.mark.parametrize("kind", ["causal_lm", "seq2seq_lm"])
def test_samples_of_a_run_are_what_generate_writes(printed: Path, adapters: dict[str, Path], kind: str) -> None:
    """With a backbone sharded over two ranks: before training without a prompt, after training with the adapter."""
    rows = [json.loads(line) for line in adapters["rows"].read_text().splitlines()[:5]]
    samples = read_samples(printed / kind)
    assert [sample["step"] for sample in samples] == [0] * 5 + [2] * 5
    assert [sample["reference"] for sample in samples] == 2 * [row["completion"] for row in rows]
    assert all(row["prompt"].strip() in sample["prompt"] for row, sample in zip(2 * rows, samples, strict=True))
    longest = max(len(row["completion"]) for row in rows)
    tokens = "--max-new-tokens", str(longest + SPARE), "--set", "data.max_length=64"
    run = yaml.safe_load((printed / f"{kind}.yaml").read_text())
    alone = ["--backbone", run["backbone"]["path"]]
    texts = [sample["text"] for sample in samples]
    for source, own in ((alone, texts[:5]), (["--adapter", str(printed / kind)], texts[5:])):
        said = in_one_process("generate", *source, *tokens, "--json", *(row["prompt"] for row in rows))
        assert [json.loads(line)["completion"] for line in said.splitlines()] == own
    assert texts[:5] != texts[5:]
    assert "frozen backbone" in (printed / kind / "report.html").read_text()


def test_samples_of_labels_are_what_predict_says(printed: Path, adapters: dict[str, Path]) -> None:
    """With a backbone sharded over two ranks, one with a batch fewer, the samples equal what ptd predict returns."""
    samples = read_samples(printed / "classification")
    assert [sample["step"] for sample in samples] == [0] * 5 + [2] * 5
    adapter, rows = str(printed / "classification"), str(adapters["labelled"])
    said = in_one_process("predict", "--adapter", adapter, "--data", rows)
    for line, sample in zip(said.splitlines(), samples[5:], strict=True):
        row = json.loads(line)
        assert (sample["prompt"], sample["reference"]) == (row["text"], str(row["label"]))
        assert sample["text"] == row["predicted_label"]
        assert sample["score"] == pytest.approx(row["probabilities"][sample["text"]], rel=1e-5)
    assert "before training" in (printed / "classification" / "report.html").read_text()


def test_a_benchmark_of_ranks(printed: Path) -> None:
    """Rank 0 reports the useful tokens of both ranks, and the bytes sent for the prompt and for a sharded backbone."""
    found = {name: json.loads((printed / name / "bench.json").read_text()) for name in ("none", "world")}
    for name, report in found.items():
        assert "ms per step: reduce" in (printed / f"bench-{name}.0").read_text()
        assert (printed / f"bench-{name}.1").read_text() == ""
        assert (printed / name / "method.num_virtual_tokens.png").is_file()
        (lane,) = report["lanes"]
        side = lane["sides"]["ptd"]
        assert lane["rows_per_step"] == side["settings"]["world_size"] * 2 == 4
        assert side["phase_seconds"]["reduce"] > 0
        assert side["flops_per_second"] > 0, side["flops_uncounted"]
    (sweep,) = found["none"]["sweeps"]
    # Each of two ranks sends as many bytes as it sums: the fp32 prompt (2 layers, keys and values 512 wide) and totals.
    for point, tokens in zip(sweep["points"], (2, 6), strict=True):
        assert point["report"]["network"]["network_bytes"] == 2 * (4 * tokens * 2 * 2 * 256 + 8 * 5)
    backbone = {name: report["network"]["network_bytes_backbone"] for name, report in found.items()}
    assert backbone["none"] == 0 < backbone["world"]
