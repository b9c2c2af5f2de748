"""The command line as a user sees it: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import save_backbone

from ptd.methods import methods

ROWS = [{"prompt": f"Add {a} and {b}: ", "completion": str(a + b)} for a in range(3) for b in range(4)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_run(folder: Path, backbone_path: Path, **sections: dict[str, Any]) -> Path:
    """Write a RUN.yaml of three steps; ``sections`` override keys of its sections."""
    data = write_rows(folder / "rows.jsonl", ROWS)
    run: dict[str, Any] = {
        "backbone": {"path": str(backbone_path), "dtype": "float32"},
        "method": {"name": "prefix", "num_virtual_tokens": 4},
        "data": {"train": str(data), "eval": str(data), "max_length": 64},
        "train": {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2},
        "output_dir": str(folder / "out"),
    }
    for name, values in sections.items():
        run[name] = {**run[name], **values}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, backbone_dir: Path) -> Path:
    """Train a run; return its output folder."""
    from ptd.commands.train import train
    from ptd.config import load_config

    folder = tmp_path_factory.mktemp("trained")
    train(load_config(write_run(folder, backbone_dir)))
    return folder / "out"


def test_train_leaves_what_the_readme_says(ptd: Any, tmp_path: Path, backbone_dir: Path) -> None:
    outcome = ptd("train", write_run(tmp_path, backbone_dir), "train.max_steps=2", "train.learning_rate=0.5")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["steps"] == 2
    assert result["eval_loss"] > 0
    assert "train 2/2" in outcome.err
    out = tmp_path / "out"
    alone, tuned = (f"{result[name]:.4f}" for name in ("frozen_loss", "eval_loss"))
    assert f"result:  held-out loss: frozen backbone {alone} → tuned {tuned}\nwritten: " in outcome.err
    written, then = outcome.err.split("written: ")[1].split("next: ")
    for line in written.splitlines():
        assert Path(line.split()[0]).exists()
    for name in ("adapter", "best", "metrics.jsonl", "loss.png", "run.json"):
        assert f"{out / name} " in written
    assert f"ptd generate --adapter {out} 'your prompt'" in then
    assert f"ptd inspect {out} --data" in then
    assert {path.name for path in out.iterdir()} == {
        *("adapter", "best", "checkpoints", "loss.png", "metrics.jsonl", "report.html", "run.json", "tensorboard")
    }
    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["config"]["train"]["max_steps"] == 2
    assert run["versions"]["torch"]


def test_report_of_runs(ptd: Any, trained: Path, tmp_path: Path) -> None:
    alone = ptd("report", trained, "--output", tmp_path / "page.html", "--png", tmp_path / "png")
    assert alone.code == 0, alone.err
    page, *pictures = map(Path, alone.out.splitlines())
    assert page == tmp_path / "page.html"
    assert {picture.name for picture in pictures} >= {"loss.png", "throughput.png", "learning_rate.png"}
    assert all(picture.is_file() for picture in (page, *pictures))
    shutil.copytree(trained, tmp_path / "again")
    both = ptd("report", trained, tmp_path / "again", "--output", tmp_path / "both.html", "--json")
    assert both.code == 0, both.err
    found = json.loads(both.out)
    assert [run["name"] for run in found["runs"]] == ["out", "again"]
    assert found["runs"][0]["loss"] == json.loads((trained / "run.json").read_text())["result"]["loss"]
    assert "again" in (tmp_path / "both.html").read_text()
    assert ptd("report", tmp_path / "nowhere").code == 2


def test_a_tracker_that_fails_does_not_stop_a_run(
    ptd: Any, tmp_path: Path, backbone_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client of W&B is not installed."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "ptd.trackers.wandb", raising=False)
    run = write_run(tmp_path, backbone_dir, train={"report_to": ["wandb"]})
    outcome = ptd("train", run, "train.max_steps=2")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("wandb gets no more records (it is not installed: pip install 'ptd[wandb]')") == 1
    assert "Traceback" not in outcome.err
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2, 2], "the backbone alone, training, an evaluation"
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_eval_prints_one_json_object(ptd: Any, trained: Path) -> None:
    outcome = ptd("eval", "--adapter", trained, "--data", trained.parent / "rows.jsonl")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    run = json.loads((trained / "run.json").read_text())
    assert set(result) == {"loss", "perplexity", "supervised_tokens"}
    assert result["loss"] == pytest.approx(run["result"]["eval_loss"], rel=1e-6)
    assert result["supervised_tokens"] == sum(len(row["completion"]) + 1 for row in ROWS)


def test_eval_with_generation_adds_text_metrics(ptd: Any, trained: Path) -> None:
    data = trained.parent / "rows.jsonl"
    outcome = ptd("eval", "--adapter", trained, "--data", data, "--generate", "--max-new-tokens", 4, "--num-beams", 2)
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["generated"] == len(ROWS)
    assert 0 <= result["exact_match"] <= 100
    assert {"bleu", "rouge_l"} <= set(result)


def test_eval_of_the_plain_backbone_needs_no_adapter(ptd: Any, trained: Path, backbone_dir: Path) -> None:
    outcome = ptd(
        "eval", "--backbone", backbone_dir, "--data", trained.parent / "rows.jsonl", "--set", "data.max_length=64"
    )
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["loss"] > 0


def test_a_backbone_is_used_as_it_was_trained_unless_told(ptd: Any, trained: Path, tmp_path: Path) -> None:
    """The stored weights are float32, and so was the run; a second adapter says it was trained in bfloat16."""
    shutil.copytree(trained / "adapter", tmp_path / "half")
    described = json.loads((tmp_path / "half" / "ptd.json").read_text())
    assert described["backbone_config"]["dtype"] == "float32"
    assert described["backbone"] == described["backbone_config"]["path"], "the folder is its own key"
    described["backbone_config"] |= {"dtype": "bfloat16", "trust_remote_code": True, "sharding": "world"}
    (tmp_path / "half" / "ptd.json").write_text(json.dumps(described))

    def loss(adapter: Path, *changes: str) -> float:
        options = [word for change in changes for word in ("--set", change)]
        outcome = ptd("eval", "--adapter", adapter, "--data", trained.parent / "rows.jsonl", *options)
        assert outcome.code == 0, outcome.err
        return float(json.loads(outcome.out)["loss"])

    assert loss(tmp_path / "half") == loss(trained, "backbone.dtype=bfloat16") != loss(trained)
    assert loss(tmp_path / "half", "backbone.dtype=float32", "backbone.attention=reference") == pytest.approx(
        loss(trained), rel=1e-5
    )
    del described["backbone_config"]  # as older versions wrote it
    (tmp_path / "half" / "ptd.json").write_text(json.dumps(described))
    assert loss(tmp_path / "half") == loss(trained, "backbone.dtype=auto", "data.max_length=64")


BAD_CHANGES = {
    "format=text": "did you mean data.format?",
    "dtype=bfloat16": "did you mean backbone.dtype?",
    "backbone.dtyp=bfloat16": "did you mean backbone.dtype?",
    "train.learning_rate=1": "valid keys: backbone.allow_pickle",
    "backbone.path=other": "give the backbone as --backbone",
    "data.eval=rows.jsonl": "give the rows as --data",
    "backbone.gradient_checkpointing=true": "this command does not train",
    "backbone.dtype=float8": "backbone.dtype: got 'float8'",
    "backbone.offload=cpu": "offload: cpu stores shards of the weights, but sharding: none makes no shards; set",
    "backbone.sharding_group_size=2": "sharding_group_size: has no effect without sharding: node",
    "backbone.attention=nonsense": "backbone.attention: there is no backend 'nonsense'",
    "data.max_length=1": "data.max_length: got 1",
    "data.columns={nowhere: text}": "data.columns: format prompt_completion has no field 'nowhere'",
    "backbone": "write it as SECTION.KEY=VALUE",
}


@pytest.mark.parametrize("change", BAD_CHANGES)
def test_bad_changes_are_refused_with_advice(ptd: Any, trained: Path, change: str) -> None:
    common = ("--adapter", trained, "--set", change)
    commands = [("eval", *common, "--data", trained.parent / "rows.jsonl")]
    if not change.startswith("data"):
        commands += [("generate", *common, "hello"), ("predict", *common, "--data", trained.parent / "rows.jsonl")]
    for command in commands:
        outcome = ptd(*command)
        assert outcome.code == 2, outcome.err
        assert BAD_CHANGES[change] in outcome.err
        assert "Traceback" not in outcome.err


def test_generate_takes_prompts_from_arguments_file_and_stdin(ptd: Any, trained: Path, tmp_path: Path) -> None:
    prompts = [row["prompt"].strip() for row in ROWS[:3]]
    common = ("generate", "--adapter", trained, "--max-new-tokens", 5, "--json")
    from_arguments = ptd(*common, *prompts)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    from_file = ptd(*common, "--file", tmp_path / "prompts.txt")
    from_stdin = ptd(*common, "--batch-size", 1, stdin="\n".join(prompts))
    assert from_arguments.code == 0, from_arguments.err
    assert from_arguments.out == from_file.out == from_stdin.out
    lines = [json.loads(line) for line in from_arguments.out.splitlines()]
    assert [line["prompt"] for line in lines] == prompts


def test_generate_sends_a_prompt_as_training_did_or_raw(ptd: Any, trained: Path, tmp_path: Path) -> None:
    """``--set data.…`` defines how a prompt is sent, and ``--raw`` sends it as it is; the test needs no training."""
    from families import save_backbone, tiny_tokenizer

    chatty = save_backbone(tmp_path / "chatty")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    tokenizer.save_pretrained(chatty)
    common = ("generate", "--backbone", chatty, "--max-new-tokens", 8)
    chat = ptd(*common, "--set", "data.format=messages", "hello")
    assert chat.code == 0, chat.err
    assert "each prompt is sent as a user message in the tokenizer's chat template; --raw sends the text" in chat.err
    rendered = ptd(*common, "--set", "data.format=messages", "--raw", "[user]hello[assistant]")
    assert chat.out == rendered.out
    assert "chat template" not in rendered.err
    raw = ptd(*common, "--set", "data.format=messages", "--raw", "hello")
    assert raw.out == ptd(*common, "hello").out != chat.out
    several = ptd(*common, "--set", 'data.prompt_template="{a} and {b}"', "hello")
    assert several.out == raw.out
    assert "data.prompt_template has 2 fields, so each text is sent as a complete prompt" in several.err
    single = ("--set", 'data.prompt_template="[user]{a}[assistant]"', "hello")
    assert ptd(*common, *single).out == chat.out
    assert ptd(*common, "--raw", *single).out == raw.out


def test_the_authors_settings_are_an_option(ptd: Any, trained: Path, tmp_path: Path) -> None:
    from families import save_backbone

    author = save_backbone(tmp_path / "author")
    file = author / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "suppress_tokens": list(range(5, 250))}))
    data = trained.parent / "rows.jsonl"
    common = ("--adapter", trained, "--backbone", author, "--max-new-tokens", 2)
    neutral = ptd("generate", *common, "hello")
    model = ptd("generate", *common, "hello", "--generation-config", "model")
    assert neutral.code == model.code == 0, neutral.err + model.err
    assert neutral.out != model.out
    assert "the model's generation_config is not followed (suppress_tokens [5, 6," in neutral.err
    assert "decoding follows the model's generation_config: suppress_tokens [5, 6," in model.err
    found = ptd("eval", *common, "--data", data, "--generate", "--generation-config", "model")
    assert found.code == 0, found.err
    assert "decoding follows the model's generation_config: suppress_tokens" in found.err
    refused = ptd("eval", *common, "--data", data, "--generation-config", "model")
    assert refused.code == 2
    assert "--generation-config: has no effect without --generate" in refused.err
    refused = ptd("generate", *common, "hello", "--top-p", 0.5)
    assert refused.code == 2
    assert "--top-p: has no effect without sampling; give --temperature" in refused.err


def test_references_that_no_text_can_reach_are_said(ptd: Any, trained: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "long.jsonl", [{"prompt": "a", "completion": "0123456789"}, *ROWS[:2]])
    outcome = ptd("eval", "--adapter", trained, "--data", data, "--generate", "--max-new-tokens", 4)
    assert outcome.code == 0, outcome.err
    assert "--max-new-tokens: 1 of 3 references are longer than 4 tokens (the longest has 10)" in outcome.err
    long = write_rows(tmp_path / "longer.jsonl", [{"prompt": "a" * 50, "completion": "b"}])
    outcome = ptd("eval", "--adapter", trained, "--data", long, "--generate", "--max-new-tokens", 236)
    assert outcome.code == 0, outcome.err
    assert "--generate: 1 prompts fill the 16 tokens that --max-new-tokens leaves" in outcome.err


def test_generate_samples_reproducibly(ptd: Any, trained: Path) -> None:
    common = (
        "generate",
        "--adapter",
        trained,
        "Add 1 and 2:",
        "--max-new-tokens",
        12,
        "--temperature",
        1.0,
        "--top-k",
        50,
    )
    first, again, other = (ptd(*common, "--seed", seed).out for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_export_and_import_keep_the_adapter(ptd: Any, trained: Path, tmp_path: Path, backbone_dir: Path) -> None:
    assert ptd("export", trained, tmp_path / "peft").code == 0
    written = {path.name for path in (tmp_path / "peft").iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert ptd("import", tmp_path / "peft", tmp_path / "back", "--backbone", backbone_dir).code == 0
    data = trained.parent / "rows.jsonl"
    losses = [
        json.loads(ptd("eval", "--adapter", adapter, "--data", data, "--set", "data.max_length=64").out)["loss"]
        for adapter in (trained, tmp_path / "peft", tmp_path / "back")
    ]
    assert losses[0] == losses[1] == losses[2]
    refused = ptd("export", trained, tmp_path / "peft")
    assert refused.code == 2
    assert "already exists" in refused.err


def test_a_run_in_the_folder_is_refused_unless_overwritten(ptd: Any, tmp_path: Path, backbone_dir: Path) -> None:
    run = write_run(tmp_path, backbone_dir)
    assert ptd("train", run).code == 0
    finished, other = ptd("train", run), ptd("train", run, "train.learning_rate=0.5")
    assert finished.code == other.code == 2
    assert "finished" in finished.err
    assert "train.learning_rate" in other.err
    assert ptd("train", run, "train.learning_rate=0.5", "--overwrite").code == 0


BAD = {
    "missing backbone": ({"backbone": {"path": "./nowhere"}}, [], "backbone.path: there is no model folder ./nowhere"),
    "unknown key": ({}, ["train.learning_rat=1"], "did you mean train.learning_rate"),
    "unknown section": ({}, ["trian.max_steps=1"], "did you mean train"),
    "no virtual tokens": ({}, ["method.num_virtual_tokens=0"], "method.num_virtual_tokens: got 0"),
    "prefix longer than the context": (
        {},
        ["method.num_virtual_tokens=300"],
        "do not fit",
    ),
    "prefix and text longer than the context": ({}, ["data.max_length=256"], "set data.max_length to at most 252"),
    "text shorter than the prefix": (
        {},
        ["method.init=text", "method.init_text=Hi"],
        "fewer than method.num_virtual_tokens=4",
    ),
    "unknown method": (
        {},
        ["method.name=prefx"],
        f"available: {', '.join(sorted(methods()))}",
    ),
    "missing data": ({"data": {"train": "nowhere.jsonl"}}, [], "nowhere.jsonl"),
    "not an override": ({}, ["max_steps"], "write it as key=value"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused_with_advice(ptd: Any, tmp_path: Path, backbone_dir: Path, case: str) -> None:
    sections, overrides, message = BAD[case]
    outcome = ptd("train", write_run(tmp_path, backbone_dir, **sections), *overrides)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


BAD_DATA = {
    "empty": ("", "no rows"),
    "broken line": ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', "line 2"),
    "row without the column": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "completion"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused_with_the_place(ptd: Any, tmp_path: Path, backbone_dir: Path, case: str) -> None:
    content, message = BAD_DATA[case]
    bad = tmp_path / "bad.jsonl"
    bad.write_text(content)
    outcome = ptd("train", write_run(tmp_path, backbone_dir, data={"train": str(bad)}))
    assert outcome.code == 2
    assert "bad.jsonl" in outcome.err
    assert message in outcome.err
    assert not (tmp_path / "out").exists()


def test_an_unsupported_family_is_named(
    ptd: Any, tmp_path: Path, backbone_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    from ptd.inject.attach import WRONG_UPSTREAM

    monkeypatch.setitem(WRONG_UPSTREAM, "bloom", "for this test")
    folder = tmp_path / "bloom"
    BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(folder)
    for file in backbone_dir.glob("tokenizer*"):
        shutil.copy(file, folder)
    outcome = ptd("train", write_run(tmp_path, folder))
    assert outcome.code == 2
    assert "'bloom'" in outcome.err
    assert "llama" in outcome.err
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_another_backbone_is_refused(ptd: Any, trained: Path, tmp_path: Path) -> None:
    save_backbone(tmp_path / "other_weights", seed=1)
    save_backbone(tmp_path / "other_shape", "gpt2")
    for other, reason in (("other_weights", "fingerprint"), ("other_shape", "kv heads")):
        outcome = ptd("generate", "--adapter", trained, "--backbone", tmp_path / other, "hello")
        assert outcome.code == 2
        assert reason in outcome.err
        assert "another backbone" in outcome.err or "was made for" in outcome.err
    missing = ptd("generate", "--adapter", tmp_path / "none", "hello")
    assert missing.code == 2
    assert "there is no folder" in missing.err


def test_help_and_version(ptd: Any) -> None:
    assert ptd("--version").out.startswith("ptd ")
    for command in ("train", "eval", "generate", "export", "import", "quickstart"):
        outcome = ptd(command, "--help")
        assert outcome.code == 0
        assert "Usage" in outcome.out


def test_inspect_prints_tables_or_json(ptd: Any, trained: Path, tmp_path: Path) -> None:
    outcome = ptd(
        "inspect", trained, "--data", trained.parent / "rows.jsonl", "--rows", 5, "--output", tmp_path / "seen"
    )
    assert outcome.code == 0, outcome.err
    assert "5 of 12 rows" in outcome.out
    assert "How many virtual tokens are needed" in outcome.out
    assert "no vocabulary token can be compared" in outcome.out
    assert str(tmp_path / "seen" / "index.html") in outcome.err
    alone = ptd("inspect", trained, "--json", "--output", tmp_path / "alone")
    assert json.loads(alone.out)["data"] is None
    assert json.loads(alone.out) == json.loads((tmp_path / "alone" / "inspect.json").read_text())
    assert "--data ROWS adds" in alone.err


def test_the_adapters_of_a_run_say_what_they_are(trained: Path) -> None:
    result = json.loads((trained / "run.json").read_text())["result"]
    for name, loss in (("adapter", result["eval_loss"]), ("best", result["best"]["loss"])):
        text = (trained / name / "README.md").read_text(encoding="utf-8")
        assert f"| loss | {loss:.6g} |" in text
        assert "| rows | 12 |" in text
        assert "| training data | rows.jsonl |" in text
        assert str(trained.parent) not in text


def test_quiet_leaves_the_result_alone(ptd: Any, trained: Path, tmp_path: Path, backbone_dir: Path) -> None:
    run, rows = write_run(tmp_path, backbone_dir), trained.parent / "rows.jsonl"
    commands: list[tuple[object, ...]] = [
        ("train", run, "train.max_steps=1"),
        ("eval", "--adapter", trained, "--data", rows),
        ("generate", "--adapter", trained, "hello", "--max-new-tokens", 2),
        ("inspect", trained, "--output", tmp_path / "seen", "--json"),
        ("export", trained, tmp_path / "peft"),
        ("import", tmp_path / "peft", tmp_path / "back", "--backbone", backbone_dir),
        ("plan", run, "--device", "cpu", "--gpu-memory", "2GiB", "--json"),
    ]
    for command in commands:
        outcome = ptd(*command, "--quiet")
        assert outcome.code == 0, outcome.err
        assert outcome.err == "", command
        assert outcome.out.strip(), command
    refused = ptd("train", run, "train.max_steps=1", "--quiet")
    assert refused.code == 2
    assert "finished" in refused.err


def test_what_is_written_and_what_is_next(ptd: Any, trained: Path, tmp_path: Path, backbone_dir: Path) -> None:
    exported = ptd("export", trained, tmp_path / "peft").err
    assert f"written: {tmp_path / 'peft'} " in exported
    assert f"ptd import {tmp_path / 'peft'}" in exported
    brought = ptd("import", tmp_path / "peft", tmp_path / "back", "--backbone", backbone_dir).err
    assert f"next:    ptd eval --adapter {tmp_path / 'back'}" in brought
    run = write_run(tmp_path, backbone_dir)
    plan = ("plan", run, "train.seed=1", "--gpu-memory", "2GiB", "--json")
    assert f"next:    ptd train {run} train.seed=1\n" in ptd(*plan).err
    many = ptd(*plan, "--gpus", 4, "--nodes", 2).err
    assert f"next:    ptd launch slurm {run} train.seed=1 --nodes 2 --gpus-per-node 4\n" in many


def test_nothing_is_coloured_where_nobody_sees_it(
    ptd: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspect = ("inspect", trained, "--output", tmp_path / "seen")
    assert "\x1b" not in ptd(*inspect).out
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in ptd(*inspect).out
    monkeypatch.setenv("NO_COLOR", "1")

    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", ptd(*inspect).out)


def test_ranks_are_quiet_too(ptd: Any, tmp_path: Path, backbone_dir: Path) -> None:
    run = write_run(tmp_path, backbone_dir)
    hosts = tmp_path / "hostfile"
    hosts.write_text("a slots=2\n", encoding="utf-8")
    for where in (
        ("local", "--gpus-per-node", 0),
        ("ssh", "--hostfile", hosts, "--no-ssh", "--node-rank", 0, "--master-addr", "a"),
    ):
        for flags, ends in (((), str(run)), (("--quiet",), f"{run} --quiet")):
            outcome = ptd("launch", where[0], run, *where[1:], *flags, "--dry-run")
            assert outcome.code == 0, outcome.err
            assert outcome.out.splitlines()[-1].endswith(ends)
