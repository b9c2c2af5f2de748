"""The host launches optimizer steps and never waits for their results; it waits once per evaluation."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ENCODER_DECODERS, ENCODERS, save_backbone
from families import FAMILIES as DECODERS
from reporting import Notes

from ptd.backbone import load_model
from ptd.config import BackboneConfig, parse_config
from ptd.distributed.ranks import Ranks
from ptd.engine.evaluation import evaluate_held_out
from ptd.engine.loop import Loop
from ptd.engine.member import Member, Stopped
from ptd.engine.prompt_step import StepSums, finish_step
from ptd.inject import Attachment, check_supported
from ptd.inject.output_layer import OutputLayer
from ptd.methods.prefix import PrefixEncoder
from ptd.methods.prompt import SoftPromptEncoder
from ptd.runs.build import build_engine, read_material
from ptd.types import Reporter, Units
from tests.gpu_paper.device import strictly, watched

GPU = torch.device("cuda", 0)
STEPS, LOGGED = 6, 3
CASES: dict[str, dict[str, Any]] = {
    "packed": {"method": {"prefix_projection": True}},
    "without levers": {},
    "padded": {"data": {"packing": False}},
    "recomputed": {"backbone": {"gradient_checkpointing": True}},
    "float16": {"backbone": {"dtype": "float16"}},
    "float16, lowered": {"backbone": {"dtype": "float16"}, "train": {"initial_scale_power": 40}},
    "bfloat16": {"backbone": {"dtype": "bfloat16"}},
    "prompt": {"method": {"name": "prompt"}},
    "classification": {"task": {"kind": "classification"}, "method": {"name": "p_tuning_v2"}},
    "mean of words": {
        "task": {"kind": "classification", "class_weights": "balanced"},
        "method": {"name": "head", "pooling": "mean", "num_virtual_tokens": None},
    },
    "cloze": {
        "task": {"kind": "classification", "patterns": ["{text}? {mask}"], "verbalizer": {"bad": "x", "good": "y"}}
    },
    "tags": {"task": {"kind": "token_classification"}, "method": {"name": "p_tuning_v2"}},
    "spans": {"task": {"kind": "question_answering"}, "method": {"name": "p_tuning_v2"}},
    "an encoder": {"task": {"kind": "classification"}, "method": {"name": "p_tuning_v2"}},
    "text from text": {"task": {"kind": "seq2seq_lm"}},
}
FAMILIES = {"an encoder": "bert", "text from text": "t5"}
EVALUATED = ("packed", "padded", "classification", "mean of words", "cloze", "tags", "spans", *FAMILIES)


class Run:
    """`STEPS` optimizer steps of two micro-batches each, with a record every `LOGGED` steps."""

    def __init__(
        self,
        backbone: Path,
        rows: Path,
        changes: dict[str, dict[str, Any]],
        device: torch.device = GPU,
        **loop: Any,
    ) -> None:
        raw: dict[str, Any] = {
            "backbone": {"path": str(backbone)},
            "method": {"name": "prefix", "num_virtual_tokens": 4},
            "data": {"train": str(rows), "max_length": 64},
            "train": {
                "max_steps": STEPS,
                "per_device_train_batch_size": 3,
                "gradient_accumulation_steps": 2,
                "max_grad_norm": 0.01,
                "logging_steps": LOGGED,
            },
            "output_dir": "unused",
        }
        for section, values in changes.items():
            merged = {**raw.get(section, {}), **values}
            raw[section] = {key: value for key, value in merged.items() if value is not None}
        config, self.ranks = parse_config(raw), Ranks(0, 1, 1, device)
        self.material = read_material(config, self.ranks, Reporter())
        self.prepared, self.step, batches = build_engine(config, None, self.ranks, config.train, self.material)
        self.prepared.attachment.stacks[0].left_obstacle = "as some do"  # then batches padded on the left are refused
        self.records: list[dict[str, Any]] = []
        self.reporter = Notes()
        member = Member(config.train, self.step, batches, on_record=self.records.append)
        self.loop = Loop(self.prepared, self.ranks, self.reporter, [member], **loop)


@pytest.fixture(scope="module")
def backbones(backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the backbone of a case."""
    made = {family: save_backbone(tmp_path_factory.mktemp(family), family) for family in FAMILIES.values()}
    return lambda case: made[FAMILIES[case]] if case in FAMILIES else backbone_dir


@pytest.fixture
def run(backbones: Callable[[str], Path], labelled_rows: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    def build(case: str, **loop: Any) -> Run:
        if case == "without levers":
            monkeypatch.setattr(OutputLayer, "fuses", False)

        return Run(backbones(case), labelled_rows, CASES[case], **loop)

    return build


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in Triton's interpreter
@pytest.mark.parametrize("case", CASES)
def test_no_step_waits(run: Callable[..., Run], case: str) -> None:
    with watched() as seen:
        built = run(case, heartbeat=lambda doing: setattr(seen, "doing", doing))
        built.loop.run(0, [LOGGED])  # the first steps load kernels and create the optimizer's state
        seen.waited.clear()
        with strictly():
            built.loop.run(LOGGED, [STEPS])
    assert [record["step"] for record in built.records] == [LOGGED, STEPS]
    assert all(seen.launches(f"step {number}") for number in range(1, STEPS + 1))
    assert seen.waited == []


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS, *ENCODER_DECODERS])
def test_no_familys_step_waits(family: str, labelled_rows: Path, tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {"backbone": {"dtype": "bfloat16"}}
    if family in ENCODERS:
        changes |= {"task": {"kind": "token_classification"}, "method": {"name": "p_tuning_v2"}}
    elif family in ENCODER_DECODERS:
        changes |= {"task": {"kind": "seq2seq_lm"}}
    with watched() as seen:
        built = Run(save_backbone(tmp_path, family), labelled_rows, changes)
        built.loop.heartbeat = lambda doing: setattr(seen, "doing", doing)
        built.loop.run(0, [1])
        seen.waited.clear()
        built.loop.run(1, [2])
    assert seen.launches("step 2")
    assert seen.waited == []


@pytest.mark.parametrize("case", EVALUATED)
def test_an_evaluation_waits_once(
    backbones: Callable[[str], Path], labelled_rows: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """An evaluation waits once, however many batches it has, and gives the same result as on a CPU."""
    changes = CASES[case]
    train = {**changes.get("train", {}), "per_device_eval_batch_size": 2}
    data = {**changes.get("data", {}), "eval": str(labelled_rows)}
    found = []
    for device in (torch.device("cpu"), GPU):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda on=device.type: on == "cuda")
            built = Run(backbones(case), labelled_rows, {**changes, "data": data, "train": train}, device)
            built.prepared.attachment.set(built.step.state())
            held_out = built.material.held_out
            assert held_out is not None
            work = partial(evaluate_held_out, held_out, built.prepared, built.step.readout, built.ranks, built.reporter)
            if device == GPU:
                work()  # the first call loads kernels
            with watched() as seen:
                found.append(work())
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert len(seen.waited) == 1  # for the sums over all batches
    assert seen.launches()


def test_results_read_later_are_the_same(run: Callable[..., Run]) -> None:
    """Results read one step later are the same, even in float16 while the loss scale is lowered.

    Steps are then skipped before the host has read their results.
    """
    at_once, later = (run("float16, lowered", behind=behind) for behind in (0, 1))
    for built in (at_once, later):
        built.loop.run(0, [STEPS])
    kept = ("step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "skipped_steps", "loss_scale")
    # Compared as text, because NaN does not equal NaN.
    series = [[str([record[key] for key in kept]) for record in built.records] for built in (later, at_once)]
    assert series[0] == series[1]
    assert at_once.records[0]["skipped_steps"] == LOGGED
    assert later.reporter.lines == at_once.reporter.lines
    assert later.reporter.lines[1].endswith("a gradient overflowed; loss scale lowered to 2.74878e+11")


@pytest.mark.parametrize(("behind", "stopped"), [(0, 1), (1, 2), (None, 2)])
def test_a_request_to_stop_is_seen_as_late_as_results_are(
    run: Callable[..., Run], behind: int | None, stopped: int
) -> None:
    built = run("packed", behind=behind)
    built.loop.request.signal = signal.SIGTERM
    assert built.loop.run(0, [STEPS]) == [Stopped(stopped, evaluation_due=False)]


def test_the_fused_optimizer_skips_as_the_host_would(run: Callable[..., Run]) -> None:
    """A step whose loss is not finite changes nothing: no parameter, no moment, no step count."""
    built = run("packed")
    built.loop.run(0, [LOGGED])
    before = {name: tensor.clone() for name, tensor in built.step.tensors().items()}
    state = built.step.encode()
    built.prepared.attachment.set(state)
    loss = sum(tensor.square().sum() for tensor in state.tensors()) * torch.nan
    loss.backward()
    result = finish_step([built.step], [StepSums(loss.detach().double(), 1.0, 1, 1)])[0].read()
    assert result.skipped
    after = built.step.tensors()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("case", ["packed", "classification"])
def test_what_a_resumed_run_is_to_load_lies_where_the_optimizer_wants_it(run: Callable[..., Run], case: str) -> None:
    """Optimizer state is on its parameter's device, before any step (when a resumed run loads it) and after steps."""
    resumed, trained = run(case), run(case)
    trained.loop.run(0, [STEPS])
    for step in (resumed.step, trained.step):
        step.tensors()
        for parameter in step.trained.parameters():
            state = step.optimizer.state[parameter]
            assert {name: tensor.device for name, tensor in state.items()} == dict.fromkeys(state, parameter.device)
            assert len(state) == 3
    for name, tensor in resumed.step.tensors().items():
        other = trained.step.tensors()[name]
        assert (tensor.device, tensor.dtype, tensor.shape) == (other.device, other.dtype, other.shape), name
        tensor.data.copy_(other)
    resumed.loop.run(STEPS, [STEPS + 1])


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_a_generated_token_waits_no_more_often_than_without_a_prompt(backbone_dir: Path, method: str) -> None:
    """With padded prompts of different lengths, only transformers itself waits, to check which rows are finished."""

    def waits_a_token(with_prompt: bool) -> float:
        model = load_model(BackboneConfig(path=str(backbone_dir)), device=GPU, check=check_supported)
        ids = torch.full((2, 6), 20, device=GPU)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["attention_mask"][0, :2] = 0
        if with_prompt:
            attachment = Attachment(model)
            shape = attachment.shape
            soft = SoftPromptEncoder(Units(torch.ones(3, shape.hidden_size), torch.ones(shape.hidden_size)))
            encoder = (PrefixEncoder(shape.layers, 3) if method == "prefix" else soft).to(GPU)
            with torch.no_grad():
                attachment.set(encoder.state(encoder()))
            inputs = attachment.generation_inputs(**inputs)
        counts = []
        for tokens in (2, 6):
            with watched() as seen:
                model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
            counts.append(len(seen.waited))
        return (counts[1] - counts[0]) / 4

    assert waits_a_token(True) <= waits_a_token(False)
