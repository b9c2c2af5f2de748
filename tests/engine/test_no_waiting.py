"""The host asks for optimizer steps and never waits for what the GPU makes of them; for an evaluation it waits once.

Without a GPU the CPU stands for one: `Paper` knows which tensors would be on it, and sees every operation that would
wait for one of them. With one, torch itself raises at every such operation.
"""

from __future__ import annotations

import json
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from families import save_backbone
from ptd_kernels.prefix_attention.problem import stand_in
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ptd.config import parse_config
from ptd.engine import evaluation
from ptd.engine.evaluation import evaluate
from ptd.engine.loop import Loop, Stopped
from ptd.engine.ranks import Ranks
from ptd.inject.head import Head
from ptd.train import build_engine, read_material
from ptd.transfer import to_device
from ptd.types import Batch, Reporter

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu", 0)
"""``cpu:0`` is the CPU to torch, and another device than the host's ``cpu`` to `Paper`."""
STEPS, LOGGED = 6, 3
CAPABILITY = (7, 0)
"""The compute capability the CPU stands for: of a GPU on which attention is plain torch, which runs here, too."""

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten.bincount,
    aten._unique2, aten.unique_consecutive, aten.unique_dim,
}  # fmt: skip
"""Operations whose answer is a number on the host, or decides the shape of a tensor."""


class Paper(TorchDispatchMode):
    """A GPU on paper: what is made on `DEVICE`, copied to it or computed from what is there, is there.

    ``waited`` holds, for each operation that would wait for it, what was ``doing`` then, its name and where it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.there: dict[int, StorageWeakRef] = {}
        self.waited: list[tuple[str, str, str]] = []
        self.doing = ""
        self._python = _Python(self)

    def __enter__(self) -> Any:
        self._python.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._python.__exit__(*error)

    def put(self, tensor: Tensor) -> None:
        """From now on this tensor, and what shares its memory, is there."""
        storage = tensor.untyped_storage()
        self.there[storage._cdata] = StorageWeakRef(storage)  # as long as it is kept, no other gets the address

    def holds(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self.there

    def waits(self, name: str) -> None:
        own = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename][:-2]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in own[:-5:-1])
        self.waited.append((self.doing, name, where))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet, made_there = func.overloadpacket, kwargs.get("device") == DEVICE
        there = [self.holds(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(there) and self._reads(packet, args, kwargs):
            self.waits(str(packet))
        arrives = packet is aten._to_copy and made_there and not there[0]
        arrives |= packet is aten.copy_ and there[0] != there[1]
        if arrives and True not in (kwargs.get("non_blocking"), *args[2:]):
            self.waits(f"{packet} between host and GPU")
        out = func(*args, **kwargs)
        if any(there) or made_there:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.put(leaf)
        return out

    def _reads(self, packet: Any, args: Any, kwargs: Any) -> bool:
        if packet in (aten.index, aten.index_put, aten.index_put_):
            indices = [index for index in args[1] if index is not None]
            fills = packet is not aten.index and args[2].numel() == 1  # then a mask is not turned into places
            masked = any(index.dtype == torch.bool for index in indices) and not fills
            return masked or not all(self.holds(index) for index in indices)
        if packet is aten.repeat_interleave:
            return kwargs.get("output_size") is None
        return packet in WAITS and any(self.holds(value) for value in args)


class _Python(TorchFunctionMode):
    """What is no operation where the CPU stands for the GPU: ``device``, ``tolist``, copies to the host."""

    def __init__(self, paper: Paper) -> None:
        super().__init__()
        self.paper = paper

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        paper, name = self.paper, getattr(func, "__name__", "")
        held = bool(args) and paper.holds(args[0])
        if held and getattr(func, "__self__", None) is Tensor.device:
            return DEVICE
        if held and name in ("tolist", "numpy", "cpu", "__array__"):
            paper.waits(name)
        if not held and name in ("tensor", "as_tensor") and kwargs.get("device") == DEVICE:
            paper.waits(f"{name} on the GPU")
            made = func(*args, **kwargs)
            paper.put(made)
            return made
        if held and name == "to" and torch.device("cpu") in (kwargs.get("device"), *map(_as_device, args[1:])):
            if not kwargs.get("non_blocking"):
                paper.waits("to the host")
            with _disable_current_modes():
                return args[0].detach().clone()
        return func(*args, **kwargs)


def _as_device(value: Any) -> Any:
    return torch.device(value) if isinstance(value, str) else value


# ---- the paper by itself


WAITING: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda there: float(there.sum()),
    "a condition": lambda there: bool(there.any()),
    "a list": lambda there: there.tolist(),
    "an array": lambda there: there.numpy(),
    "a copy": lambda there: there.cpu(),
    "a copy by name": lambda there: there.to("cpu"),
    "places": lambda there: there.nonzero(),
    "a mask": lambda there: there[there > 0],
    "a mask put": lambda there: there.index_put_((there > 0,), torch.ones_like(there)[there > 0]),
    "indices of the host": lambda there: there[torch.tensor([0, 1])],
    "repeats": lambda there: torch.repeat_interleave(there.long()),
    "distinct": lambda there: there.unique(),
    "a copy of the host's": lambda there: torch.zeros(3).to(there.device),
    "a copy into": lambda there: there.copy_(torch.zeros(3)),
    "made from a list": lambda there: torch.tensor([1.0], device=there.device),
}
NOT_WAITING: dict[str, Callable[[Tensor], Any]] = {
    "an answer that stays": lambda there: (there + 1).sum() > 0,
    "a fill": lambda there: there.masked_fill(there > 0, 2.0),
    "a fill by index": lambda there: there.index_put_((there > 0,), there.new_zeros(())),
    "a number of the host": lambda there: there * torch.tensor(2.0),
    "the host's own": lambda there: (float(torch.ones(1)), torch.ones(2).nonzero(), torch.ones(2).tolist()),
    "a copy meanwhile": lambda there: to_device(torch.zeros(3), there.device) + there,
    "what was copied meanwhile": lambda there: there.to("cpu", non_blocking=True).tolist(),
    "known repeats": lambda there: torch.repeat_interleave(there, there.long(), output_size=6),
}
on_paper = pytest.mark.skipif(GPU, reason="there is a GPU")


@on_paper
@pytest.mark.parametrize("waits", [True, False])
def test_the_paper_sees_what_waits_and_nothing_else(waits: bool) -> None:
    for name, operation in (WAITING if waits else NOT_WAITING).items():
        with Paper() as paper:
            operation(torch.ones(3, device=DEVICE).cumsum(0))
        assert bool(paper.waited) == waits, (name, paper.waited)


# ---- a run


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
    "cloze": {"task": {"kind": "classification", "patterns": ["{text}? {mask}"], "verbalizer": {"a": "x", "b": "y"}}},
    "tags": {"task": {"kind": "token_classification"}, "method": {"name": "p_tuning_v2"}},
    "spans": {"task": {"kind": "question_answering"}, "method": {"name": "p_tuning_v2"}},
    "an encoder": {"task": {"kind": "classification"}, "method": {"name": "p_tuning_v2"}},
    "text from text": {"task": {"kind": "seq2seq_lm"}},
}
FAMILIES = {"an encoder": "bert", "text from text": "t5"}
EVALUATED = ("packed", "padded", "classification", "mean of words", "cloze", "tags", "spans", *FAMILIES)
ROWS = [
    {
        "prompt": f"{index} times {index % 5} is ",
        "completion": "ab" * (1 + index * 7 % 11),
        "text": "fine " * (index % 3) + f"row {index}",
        "label": "ab"[index % 2],
        "tokens": ["ann", "is", "in", "oslo"][: 2 + index % 3],
        "tags": ["B-PER", "O", "O", "B-LOC"][: 2 + index % 3],
        "question": "who?",
        "context": "he saw " * (1 + index * 2 % 5) + f"ann {index}",
        "answers": f"ann {index}" if index % 4 else "",
    }
    for index in range(22)
]


@pytest.fixture(scope="module")
def labelled_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


class Run:
    """`STEPS` optimizer steps of two micro-batches, with a record every `LOGGED`."""

    def __init__(self, backbone: Path, rows: Path, changes: dict[str, dict[str, Any]], **loop: Any) -> None:
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
        config, self.ranks = parse_config(raw), Ranks(0, 1, 1, DEVICE)
        material = read_material(config, self.ranks, Reporter())
        self.material = material
        self.prepared, self.step, batches = build_engine(config, None, self.ranks, config.train, material)
        self.prepared.attachment.stacks[0].left_obstacle = "as some do"  # what is padded on the left is refused then
        for group in self.step.optimizer.param_groups:
            group.update(fused=True, foreach=False)  # as on a GPU
        self.records: list[dict[str, Any]] = []
        self.reporter = Notes()
        nothing = lambda *unused: None  # noqa: E731
        self.loop = Loop(
            config.train, self.prepared, self.step, batches, None, self.ranks, self.reporter, self.records.append,
            nothing, nothing, **loop,
        )  # fmt: skip


class Notes(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def backbones(backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The backbone of a case."""
    made = {family: save_backbone(tmp_path_factory.mktemp(family), family) for family in FAMILIES.values()}
    return lambda case: made[FAMILIES[case]] if case in FAMILIES else backbone_dir


@pytest.fixture
def run(backbones: Callable[[str], Path], labelled_rows: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    def build(case: str, **loop: Any) -> Run:
        if case == "without levers":
            monkeypatch.setattr(Head, "fuses", False)
        return Run(backbones(case), labelled_rows, CASES[case], **loop)

    return build


@contextmanager
def as_on_a_gpu(built: Run, paper: Paper, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it what ``built`` consists of is on the paper's GPU."""
    monkeypatch.setattr(Batch, "to", lambda self, device: self.map(lambda tensor: to_device(tensor, device)))
    # Recomputing happens where Python's side of the paper is not asked, and `device` is not what it was.
    monkeypatch.setitem(torch.utils.checkpoint._allowed_determinism_checks_to_fns, "default", lambda tensor: None)
    for module in (built.prepared.model, built.step.trained):
        for tensor in (*module.parameters(), *module.buffers()):
            paper.put(tensor)
    for tensor in built.step.tensors().values():
        paper.put(tensor)
    token = stand_in.set(CAPABILITY)
    try:
        with paper:
            yield
    finally:
        stand_in.reset(token)


@on_paper
@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_on_paper(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    paper = Paper()
    built = run(case, heartbeat=lambda doing: setattr(paper, "doing", doing), behind=1)
    with as_on_a_gpu(built, paper, monkeypatch):
        built.loop.run(0, STEPS)
    assert [record["step"] for record in built.records] == [LOGGED, STEPS]
    assert paper.waited == []


def evaluated(folder: Path, rows: Path, case: str) -> Run:
    """A run with held-out rows in eleven batches."""
    changes = CASES[case]
    raised = {**changes.get("train", {}), "per_device_eval_batch_size": 2}
    return Run(folder, rows, {**changes, "data": {**changes.get("data", {}), "eval": str(rows)}, "train": raised})


def run_evaluation(built: Run) -> dict[str, Any]:
    built.prepared.attachment.set(built.step.state())
    return evaluate(built.material.held_out, built.prepared, built.step.readout, built.ranks, built.reporter)


@on_paper
@pytest.mark.parametrize("case", EVALUATED)
def test_an_evaluation_waits_once_on_paper(
    backbones: Callable[[str], Path], labelled_rows: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    built = evaluated(backbones(case), labelled_rows, case)
    expected = run_evaluation(built)
    paper = Paper()
    with as_on_a_gpu(built, paper, monkeypatch):
        found = run_evaluation(built)
    assert found == pytest.approx(expected, rel=1e-5)  # by other attention kernels
    assert [name for _, name, _ in paper.waited] == ["tolist"]  # the sums over all ranks


@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("case", EVALUATED)
def test_an_evaluation_waits_once_on_a_gpu(
    backbones: Callable[[str], Path], labelled_rows: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    built = evaluated(backbones(case), labelled_rows, case)
    run_evaluation(built)  # the first loads kernels
    monkeypatch.setattr(evaluation, "_over_all", may_wait(evaluation._over_all))
    with ExitStack() as stack:
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        torch.cuda.set_sync_debug_mode("error")
        run_evaluation(built)


def may_wait(function: Callable[..., Any]) -> Callable[..., Any]:
    def waiting(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return function(*args)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    return waiting


@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_on_a_gpu(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    built = run(case)
    built.loop.run(0, LOGGED)  # the first steps load kernels and make the optimizer's state
    with ExitStack() as stack:
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        torch.cuda.set_sync_debug_mode("error")
        built.loop.run(LOGGED, STEPS)


# ---- results that are read later


def test_results_read_later_are_the_same(run: Callable[..., Run]) -> None:
    """In float16 with a scale that is lowered, so that steps are skipped, whose results nobody has seen yet."""
    at_once, later = (run("float16, lowered", behind=behind) for behind in (0, 1))
    for built in (at_once, later):
        built.loop.run(0, STEPS)
    kept = ("step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "skipped_steps", "loss_scale")
    series = [[str([record[key] for key in kept]) for record in built.records] for built in (later, at_once)]  # nan too
    assert series[0] == series[1]
    assert at_once.records[0]["skipped_steps"] == LOGGED
    assert later.reporter.lines == at_once.reporter.lines
    assert later.reporter.lines[1].endswith("a gradient overflowed; loss scale lowered to 2.74878e+11")


@pytest.mark.parametrize(("behind", "stopped"), [(0, 1), (1, 2)])
def test_a_request_to_stop_is_seen_as_late_as_results_are(run: Callable[..., Run], behind: int, stopped: int) -> None:
    built = run("packed", behind=behind)
    built.loop.request.signal = signal.SIGTERM
    assert built.loop.run(0, STEPS) == Stopped(stopped, evaluation_due=False)


def test_the_fused_optimizer_skips_as_the_host_would(run: Callable[..., Run]) -> None:
    """Nothing changes in a step whose loss is not finite: no parameter, no moment, no count of steps."""
    built = run("packed")
    built.loop.run(0, LOGGED)
    before = {name: tensor.clone() for name, tensor in built.step.tensors().items()}
    state = built.step.encode()
    built.prepared.attachment.set(state)
    loss = sum(tensor.square().sum() for tensor in state.tensors()) * torch.nan
    loss.backward()
    result = built.step.finish(loss, 1.0, 1, 1).read()
    assert result.skipped
    after = built.step.tensors()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
