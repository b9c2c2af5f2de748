"""``ptd plan``: its figures match those of a real step, for every family, and it needs only a config."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import yaml
from families import ENCODER_DECODERS, ENCODERS, FAMILIES, save_backbone, tiny_config, tiny_model
from transformers import AutoConfig

from ptd.backbone import load_model
from ptd.cli import main
from ptd.commands.plan import GPU, parse_size, plan, trace_run
from ptd.config import BackboneConfig, RunConfig, parse_config
from ptd.distributed.ranks import Ranks
from ptd.engine.prompt_step import StepSums, Trained, finish_step
from ptd.engine.setup import prepare
from ptd.planner.placement import ITEMS
from ptd.planner.step_trace import Trace
from ptd.planner.worst_case_batch import rows_of, sample_batch
from ptd.runs.build import build_step, build_trained
from ptd.tasks import make_task
from ptd.types import UserError

SHAPES = {  # hidden, intermediate, layers, heads, key/value heads, vocabulary; parameters
    "7B": ((4096, 11008, 32, 32, 32, 32000), 6_738_415_616),
    "13B": ((5120, 13824, 40, 40, 40, 32000), 13_015_864_320),
    "34B": ((8192, 22016, 48, 64, 8, 32000), 33_743_970_304),
    "70B": ((8192, 28672, 80, 64, 8, 32000), 68_976_648_192),
}
CPU = torch.device("cpu")


def write_config(folder: Path, shape: str) -> Path:
    """Write a llama's config.json, and nothing else, into the folder; return the folder."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape][0]
    AutoConfig.for_model(
        "llama", hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=4096,
        dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def run(folder: Path, *, kind: str = "causal_lm", **sections: dict[str, Any]) -> RunConfig:
    raw: dict[str, dict[str, Any]] = {
        "backbone": {"path": str(folder)},
        "method": {"name": "prefix", "num_virtual_tokens": 5},
        "task": {"kind": kind},
        "data": {"train": "unread.jsonl", "max_length": 64},
        "train": {"per_device_train_batch_size": 4},
    }
    for name, changes in sections.items():
        raw[name] = changes if "name" in changes else {**raw[name], **changes}
    return parse_config(raw)


def step_peak(trace: Trace) -> int:
    """Return the peak of the bytes that a step has in use, minus the bytes in use before the step."""
    return max(sum(interval.peak.values()) for interval in trace.timeline) - sum(trace.timeline[0].start.values())


def allocated_in_a_step(config: RunConfig) -> int:
    """Return the same peak for a real step on a CPU, as torch's allocator reports it to the profiler."""
    ranks = Ranks(0, 1, 1, CPU)
    task = make_task(config.task, config.data, "decoder")
    prepared = prepare(config.backbone, ranks, output=task.output)
    trained = build_trained(config, prepared, task, None)
    step = build_step(config, Trained(trained.encoder, trained.readout), ranks, prepared.model.dtype)
    batch = sample_batch(config, task, trained.readout, rows_of(config), packed=prepared.attachment.packable)

    def once() -> None:
        prepared.attachment.set(step.encode())
        reading = step.readout(prepared.run, batch)
        reading.loss.backward()
        sums = StepSums.zero(CPU)
        sums.add(reading, batch)
        finish_step([step], [sums])

    once()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        once()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


WIDE = {"name": "prefix", "prefix_projection": True, "encoder_hidden_size": 2000}
CASES: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"data": {"packing": False}},
    "checkpointing": {"backbone": {"gradient_checkpointing": True}},
    "bfloat16": {"backbone": {"dtype": "bfloat16"}},
    "wide projection": {"method": WIDE},
    "wide projection, 8-bit AdamW": {"method": WIDE, "train": {"optimizer": "adamw_8bit"}},
    "wide projection, Lion": {"method": WIDE, "train": {"optimizer": "lion"}},
    "soft tokens": {"method": {"name": "prompt", "num_virtual_tokens": 7}},
    "LSTM": {"method": {"name": "p_tuning", "num_virtual_tokens": 7}},
    "nf4": {"backbone": {"quantization": "nf4"}},
    "int8": {"backbone": {"quantization": "int8"}},
    "fp8": {"backbone": {"quantization": "fp8"}},
}


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_traced_step_allocates_what_a_real_one_does(case: str, tmp_path: Path) -> None:
    """The peaks agree within 2 %; the trace has no small integer tensors, generator states or oneDNN LSTM workspace."""
    changes = {name: dict(section) for name, section in CASES[case].items()}
    quantization = changes.get("backbone", {}).get("quantization", "none")
    save_backbone(tmp_path, hidden_size=64, intermediate_size=128)
    config = run(tmp_path, **changes)
    trace = trace_run(config, quantization, capability=None, local_ranks=1)
    assert step_peak(trace) == pytest.approx(allocated_in_a_step(config), rel=0.1 if case == "LSTM" else 0.02)


@pytest.mark.parametrize(("optimizer", "per_number"), [("adamw", 8), ("adamw_8bit", 2), ("lion", 4)])
def test_the_optimizer_state_is_counted_exactly(optimizer: str, per_number: float, tmp_path: Path) -> None:
    save_backbone(tmp_path)
    config = run(tmp_path, method=WIDE, train={"optimizer": optimizer})
    found = plan(config, device="cpu", memory="2GiB", alternatives=False)
    material = make_task(config.task, config.data, "decoder")
    trained = build_trained(config, prepare(config.backbone, Ranks(0, 1, 1, CPU)), material, None)
    step = build_step(config, trained, Ranks(0, 1, 1, CPU), torch.float32)
    for parameter in trained.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    held = sum(tensor.nbytes for state in step.optimizer.state.values() for tensor in state.values())
    counts = 4 * len(step.optimizer.state)  # torch's own AdamW makes its step counts where the trace does not see them
    assert found.own.items["optimizer"] == held - (counts if optimizer == "adamw" else 0)
    assert held == pytest.approx(per_number * trained.count(), rel=0.1)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4", "fp8"])
def test_the_weights_are_counted_exactly(quantization: str, tmp_path: Path) -> None:
    save_backbone(tmp_path, hidden_size=128, intermediate_size=192)
    trace = trace_run(run(tmp_path), quantization, capability=None, local_ranks=1)
    model = load_model(BackboneConfig(path=str(tmp_path), quantization=quantization), device=CPU)
    assert sum(weight.nbytes for weight in trace.weights) == sum(
        parameter.numel() * parameter.element_size() for parameter in model.parameters()
    )
    scales = 0
    for module in model.modules():
        kept = [getattr(getattr(module, name, None), "SCB", None) for name in ("weight", "state")]
        scales += max((4 * tensor.numel() for tensor in kept if isinstance(tensor, torch.Tensor)), default=0)
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            scales += state.absmax.numel() + 4 * state.state2.absmax.numel() + 4
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    codes = 0 if quantization != "nf4" else 4 * 16 + 4 * 256
    assert trace.fixed_bytes == pytest.approx(scales + buffers, abs=codes * 32)


@pytest.mark.parametrize("family", [*FAMILIES, *ENCODERS, *ENCODER_DECODERS])
def test_every_family_can_be_planned_without_weights(family: str, tmp_path: Path) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    kind = "seq2seq_lm" if family in ENCODER_DECODERS else "token_classification" if family in ENCODERS else "causal_lm"
    projection = {"name": "prefix", "num_virtual_tokens": 5, "prefix_projection": True}
    found = plan(run(tmp_path, kind=kind, method=projection), gpus=2, nodes=2, memory="2GiB", alternatives=False)
    parameters = tiny_model(family).num_parameters()
    assert found.parameters == parameters or kind == "token_classification"
    assert found.own.fits
    assert found.own.items["weights"] >= found.parameters * 4
    # Roughly the forward pass and the gradients with respect to the inputs of all linear layers.
    assert found.trace.flops > 2 * found.trace.tokens * found.parameters / 2


def test_a_head_on_labels_that_are_not_known_yet(tmp_path: Path) -> None:
    tiny_config("bert").save_pretrained(tmp_path)
    found = plan(run(tmp_path, kind="classification", method={"name": "head"}), memory="2GiB", alternatives=False)
    assert found.trace.head_numel == 32 * 2 + 2
    assert found.trace.prompt_numel == 0


def test_the_attention_of_a_gpu_needs_no_scores(tmp_path: Path) -> None:
    """In bfloat16 a GPU has a flash kernel, in float32 memory-efficient attention: float32 only doubles the sizes."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 2048}
    tiny_config("llama", **sizes).save_pretrained(tmp_path)
    data = {"max_length": 1000}
    half = trace_run(run(tmp_path, backbone={"dtype": "bfloat16"}, data=data), capability=GPU, local_ranks=1)
    full = trace_run(run(tmp_path, backbone={"dtype": "float32"}, data=data), capability=GPU, local_ranks=1)
    assert step_peak(full) < 2.5 * step_peak(half)


def test_layers_in_ligers_kernels_store_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they are the default. The products stay the same."""
    pytest.importorskip("liger_kernel")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tiny_config("llama", hidden_size=256, num_attention_heads=4, intermediate_size=704).save_pretrained(tmp_path)
    found = {}
    for liger in ("auto", False):
        config = run(tmp_path, backbone={"dtype": "bfloat16", "liger": liger}, data={"max_length": 250})
        found[liger] = plan(config, alternatives=False)
        by = "Liger's kernels" if liger else "transformers' own code"
        assert any(f"run in {by}" in line for line in found[liger].assumptions)
    assert step_peak(found["auto"].trace) < 0.7 * step_peak(found[False].trace)
    assert found["auto"].trace.flops == found[False].trace.flops
    on_cpu = plan(run(tmp_path), device="cpu", alternatives=False)
    assert not any("Liger" in line for line in on_cpu.assumptions)


def test_a_wide_encoder_is_shared_by_the_ranks_of_a_node(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    method = {"name": "prefix", "num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 4096}
    one, four = (
        plan(run(tmp_path, method=method), gpus=gpus, memory="2GiB", alternatives=False).own for gpus in (1, 4)
    )
    assert four.items["optimizer"] < 0.3 * one.items["optimizer"]
    assert four.sent_inside > one.sent_inside == 0


@pytest.fixture
def ptd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs ``ptd plan ARGUMENTS…`` and returns its exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ptd", "plan", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def write_run(folder: Path, **changes: Any) -> Path:
    raw = {
        "backbone": {"path": str(folder)},
        "method": {"name": "prefix", "num_virtual_tokens": 30, "prefix_projection": True, "encoder_hidden_size": 512},
        "data": {"train": "none.jsonl", "max_length": 512},
        "train": {"per_device_train_batch_size": 2},
        **changes,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def test_a_7b_from_the_command_line(ptd: Any, tmp_path: Path) -> None:
    path = write_run(write_config(tmp_path, "7B"))
    code, out, err = ptd(path, "--gpus", 8, "--gpu-memory", "24GiB", "--nodes", 4, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["backbone_parameters"] == SHAPES["7B"][1]
    by_name = {each["name"]: each for each in found["placements"]}
    assert by_name["none"]["own"]
    assert by_name["none"]["items"]["weights"] == pytest.approx(2 * SHAPES["7B"][1], rel=1e-3)
    assert by_name["node"]["items"]["weights"] == pytest.approx(2 * SHAPES["7B"][1] / 8, rel=1e-3)
    assert by_name["world"]["items"]["weights"] == pytest.approx(2 * SHAPES["7B"][1] / 32, rel=1e-3)
    for each in found["placements"]:
        assert each["peak_bytes"] == sum(each["items"][name] for name in ITEMS)
        assert each["fits"] == (each["peak_bytes"] <= found["usable_bytes_per_rank"])
        assert (each["largest_micro_batch_rows"] >= 2) == each["fits"]
    # A node sends only the prompt's bytes, however the backbone is placed, unless it is sharded over nodes.
    prompt = 30 * 32 * 2 * 4096 * 4
    between = "bytes_sent_between_nodes_per_node_and_step"
    assert by_name["node"][between] == by_name["nf4"][between] == 2 * 3 * prompt // 4
    assert by_name["world"][between] > 100 * prompt
    assert by_name["node + offload cpu"]["host_bytes"] > 1.6e9
    # A frozen model takes 4 N FLOPs per token, not counting the attention and the embedding.
    assert found["flops_per_token"] == pytest.approx(4 * SHAPES["7B"][1], rel=0.1)
    assert found["best"] in by_name
    assert by_name[found["best"]]["fits"]


@pytest.mark.parametrize("shape", ["13B", "34B", "70B"])
def test_larger_shapes(shape: str, tmp_path: Path) -> None:
    config = run(write_config(tmp_path, shape), backbone={"sharding": "node"}, data={"max_length": 128})
    found = plan(config, gpus=8, nodes=2, alternatives=False)
    assert found.parameters == SHAPES[shape][1]
    assert found.own.items["weights"] == pytest.approx(2 * found.parameters / 8, rel=1e-3)
    assert found.own.items["gather_buffers"] > 5e8
    assert found.best is found.own


def test_a_plan_people_read(ptd: Any, tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    code, out, err = ptd(write_run(tmp_path), "data.max_length=64", "--gpus", 2, "--nodes", 2, "--gpu-memory", "2GiB")
    assert code == 0, err
    for word in (
        "weights",
        "gather buffers",
        "activations",
        "logits",
        "encoder",
        "optimizer",
        "prompt",
        "node",
        "best:",
    ):
        assert word in out


def test_what_cannot_be_planned_is_said(ptd: Any, tmp_path: Path) -> None:
    path = write_run(tmp_path)
    code, _, err = ptd(path)
    assert (code, "has no config.json" in err) == (2, True)
    tiny_config("llama").save_pretrained(tmp_path)
    code, _, err = ptd(path, "--gpu-memory", "much")
    assert (code, "--gpu-memory: got 'much'" in err) == (2, True)
    code, _, err = ptd(path, "backbone.sharding=node", "backbone.sharding_group_size=3", "--gpus", 4)
    assert (code, "ranks do not divide into groups of 3" in err) == (2, True)
    code, _, err = ptd(path, "data.max_length=9999")
    assert (code, "exceed" in err) == (2, True)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    code, _, err = ptd(path)
    assert (code, "already quantised" in err) == (2, True)


def test_sizes() -> None:
    assert parse_size("80GiB", "x") == 80 * 2**30
    assert parse_size("24 GB", "x") == 24 * 10**9
    assert parse_size("1000", "x") == 1000
    for wrong in ("", "GiB", "80 parsecs", "1.2.3GiB", "0GiB"):
        with pytest.raises(UserError, match="write a size"):
            parse_size(wrong, "x")


def test_a_plan_leaves_no_trace_in_the_process(tmp_path: Path) -> None:
    save_backbone(tmp_path, hidden_size=128, intermediate_size=192)
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))

    def rounded() -> torch.Tensor:
        packed, state = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        return bnb.functional.dequantize_4bit(packed, state)

    def forget() -> None:
        for tables in (bnb.functional.name2qmap, getattr(bnb.backends.utils, "_code_4bit_cache", {})):
            tables.clear()

    forget()
    trace_run(run(tmp_path), "nf4", capability=None, local_ranks=1)
    after = rounded()
    forget()
    assert torch.equal(after, rounded())
    assert (after - weight).norm() < 0.15 * weight.norm()
