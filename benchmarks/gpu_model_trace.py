"""Trace an optimizer step of a large backbone on the emulated GPU, and sort what it launches into parts.

The step is the real one: model, attention, readout, encoder, reduction and optimizer run on tensors on ``cuda:0`` that
have shapes but no numbers (`tests.gpu_paper.device.shapes_only`), so a 7B takes seconds and little memory. Two traces
with few layers give the launches of any number of layers. Import this module before torch, because of the emulated GPU.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from tests.gpu_paper.device import Seen, shapes_only, watched

# isort: split
# The emulated GPU is loaded before torch.
import ptd_kernels
import torch
import transformers
from gpu_model_triton import work_of
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig

import ptd
from ptd.backbone.shared_input import share_inputs
from ptd.commands.plan import GPU as HOPPER
from ptd.commands.plan import build_blank
from ptd.config import RunConfig, parse_config
from ptd.distributed.ranks import Ranks
from ptd.engine.forward import Forward
from ptd.engine.loop import Loop
from ptd.engine.member import Member
from ptd.engine.phases import PhaseClock
from ptd.engine.prompt_step import Trained
from ptd.engine.setup import Prepared
from ptd.planner.step_trace import without_data
from ptd.planner.worst_case_batch import rows_of, sample_batch
from ptd.runs.build import build_step
from ptd.types import Reporter

aten = torch.ops.aten
PTD, KERNELS, TRANSFORMERS = (f"{package.__path__[0]}/" for package in (ptd, ptd_kernels, transformers))
ATTENTION, CROSS_ENTROPY = f"{KERNELS}prefix_attention/", f"{KERNELS}linear_cross_entropy/"
INJECTED, LAYERS = f"{PTD}inject/attention.py", f"{PTD}backbone/"
DEVICE, HOST = torch.device("cuda", 0), torch.device("cpu")
FEW = 2
"""Layers of the shorter trace: the first layer, whose input has no gradient, and the last layer, which computes only
supervised positions after its attention. The longer trace has one layer more, a layer of the middle."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Llama."""

    intermediate: int
    kv_heads: int
    vocabulary: int
    hidden: int = 4096
    heads: int = 32
    layers: int = 32

    @property
    def layer_weights(self) -> int:
        """Weights of the linear layers of one decoder layer."""
        kv = self.hidden * self.kv_heads // self.heads
        return 2 * self.hidden * (self.hidden + kv) + 3 * self.hidden * self.intermediate

    @property
    def weights(self) -> int:
        """Weights that multiply every token: all linear layers, the output layer included."""
        return self.layers * self.layer_weights + self.hidden * self.vocabulary


@dataclass(frozen=True)
class Cell:
    """One step: a bf16 backbone, rows of ``length`` tokens packed into one micro-batch, and a prefix. Half of the
    tokens are supervised."""

    sizes: Sizes
    rows: int
    length: int
    virtual_tokens: int
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length


PARTS = {
    "GEMMs": "matrix products of the frozen layers",
    "attention": "flash kernels, of the tokens' own segment and of the prefix",
    "prefix gradient": "the backward pass of the prefix's segment",
    "merging": "the rest of ptd's attention",
    "autograd elementwise": "what autograd launches on its own, without products",
    "transformers elementwise": "the forward code of the model, without products",
    "loss": "output layer and cross-entropy, with their products",
    "optimizer": "encoder, reduction at the prompt, clipping and AdamW",
    "other": "positions, and the gathering of supervised tokens in the last layer",
}
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm}
FLASH = {aten._flash_attention_forward: 4, aten._flash_attention_backward: 10}
"""FLOPs per query-key pair, head and channel: two products in the forward pass, five in the backward pass."""
OVERWRITTEN = {aten.copy_, aten.fill_, aten.zero_}
"""Operations that do not read the tensor that they write."""
PICKED = {aten.embedding, aten.index, aten.index_select, aten.gather}
"""Operations that read as many numbers of their first tensor as they write."""
PLACED = {aten.index_copy}
"""Operations in place that write only the numbers that they are given (their fourth argument)."""


class Launch(NamedTuple):
    """An operation that the GPU runs. ``read``, ``written``: bytes; ``rate``: which of the GPU's rates bounds its
    ``flops``; ``place``: the file and line that launched it, empty for autograd."""

    part: str
    operator: str
    rate: str
    read: int
    written: int
    flops: int
    place: str


class Launches(Seen):
    """Collects the launches of a step. ``doing`` is the phase of the step (`ptd.engine.phases.PHASES`)."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Launch] = Counter()

    def ran(self, op: Any, args: Any, kwargs: Any, out: Any) -> None:
        frames = list(_own_frames(sys._getframe(1)))
        packet = op.overloadpacket
        read, written = _traffic(op, args, kwargs, out)
        flops, rate = _computation(packet, args, kwargs, out)
        self.counts[Launch(self._part(packet, frames), str(packet), rate, read, written, flops, _place(frames))] += 1

    def ran_triton(self, kernel: Any, arguments: dict[str, Any]) -> None:
        frames = list(_own_frames(sys._getframe(1)))
        work = work_of(kernel, arguments)
        read, written = (sum(map(_bytes, {id(x): x for x in some}.values())) for some in (work.read, work.written))
        part = self._part(None, frames, multiplies=work.flops > 0)
        launch = Launch(part, f"triton.{kernel.__name__}", work.rate, read, written, work.flops, _place(frames))
        self.counts[launch] += 1

    def _part(self, packet: Any, frames: list[FrameType], multiplies: bool = False) -> str:
        """Return the part of an operation that was launched by code in ``frames``, the innermost frame first.

        ``multiplies``: it is a Triton kernel with products.
        """
        if self.doing in ("encoder", "reduce", "optimizer"):
            return "optimizer"
        attends = [frame.f_code.co_name for frame in frames if _inside(frame, ATTENTION)]
        if "_prefix_backward" in attends:
            return "prefix gradient"
        if any(_inside(frame, CROSS_ENTROPY) for frame in frames):
            return "loss"
        if packet in PRODUCTS:
            return "GEMMs"
        if packet in FLASH or (attends and multiplies):
            return "attention"
        if attends or any(_inside(frame, INJECTED) for frame in frames):
            return "merging"
        innermost = frames[0] if frames else None
        if innermost is not None and (_inside(innermost, TRANSFORMERS) or _inside(innermost, LAYERS)):
            return "transformers elementwise" if innermost.f_code.co_name != "backward" else "autograd elementwise"
        # Autograd's own thread has no frame; a part of the backward pass without one of the above is autograd's too.
        return "autograd elementwise" if self.doing == "backward" else "other"


def _place(frames: list[FrameType]) -> str:
    return f"{Path(frames[0].f_code.co_filename).name}:{frames[0].f_lineno}" if frames else ""


def _own_frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the frames of ptd, its kernels and transformers, the innermost first."""
    while frame is not None:
        if any(_inside(frame, folder) for folder in (PTD, KERNELS, TRANSFORMERS)):
            yield frame
        frame = frame.f_back


def _inside(frame: FrameType, path: str) -> bool:
    return frame.f_code.co_filename.startswith(path)


def _traffic(op: Any, args: Any, kwargs: Any, out: Any) -> tuple[int, int]:
    """Return the bytes that an operation reads and writes, each tensor once, expanded axes without their copies."""
    packet = op.overloadpacket
    if packet in PLACED:
        return _bytes(args[2]) + _bytes(args[3]), _bytes(args[3])
    writes = [argument.alias_info is not None and argument.alias_info.is_write for argument in op._schema.arguments]
    given = [*args, *(kwargs.get(argument.name) for argument in op._schema.arguments[len(args) :])]
    read: dict[int, Tensor] = {}
    for argument, value, written in zip(op._schema.arguments, given, writes, strict=False):
        if not (written and (packet in OVERWRITTEN or argument.kwarg_only)):
            read |= {id(tensor): tensor for tensor in tree_leaves(value) if isinstance(tensor, Tensor)}
    changed = [value for value, written in zip(given, writes, strict=False) if written]
    made = {id(tensor): tensor for tensor in tree_leaves([out, changed]) if isinstance(tensor, Tensor)}
    size = sum(map(_bytes, made.values()))
    if packet in PICKED:
        read.pop(id(args[0]))
        return size + sum(map(_bytes, read.values())), size
    return sum(map(_bytes, read.values())), size


def _bytes(tensor: Tensor) -> int:
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


def _computation(packet: Any, args: Any, kwargs: Any, out: Any) -> tuple[int, str]:
    """Return the FLOPs of an operation, and the rate that bounds them; elementwise operations have none."""
    if packet in FLASH:
        forward = packet is aten._flash_attention_forward
        q, (cu_q, _, rows, keys, _, causal) = (args[0], args[3:9]) if forward else (args[1], args[6:12])
        sequences = q.shape[0] if cu_q is None else cu_q.numel() - 1
        pairs = rows * (rows + 1) // 2 if causal else rows * keys  # all sequences are of the same length
        flops = FLASH[packet] * sequences * pairs * q.shape[-2] * q.shape[-1]
        return flops, "flash forward" if forward else "flash backward"
    if packet in PRODUCTS:
        dtype = next(value.dtype for value in args if isinstance(value, Tensor))
        formula = flop_registry[aten.addmm if packet is aten.addmm_ else packet]
        return int(formula(*args, **kwargs, out_val=out)), "bf16" if dtype == torch.bfloat16 else "fp32"
    return 0, "memory"


class _Phases(PhaseClock):
    """Tells the phase of the step to ``seen``."""

    def __init__(self, seen: Seen) -> None:
        super().__init__(DEVICE)
        self.seen = seen

    def begin(self, name: str) -> None:
        self.seen.doing = name


class Step(NamedTuple):
    """The launches of an optimizer step of ``cell``: with `FEW` layers, and in addition per layer of the middle.

    An operation on the whole prompt, whose size depends on the layers, is in ``layer`` with its new size, and with its
    size in ``few`` and a negative count. So sums of launches, bytes and FLOPs are right for any number of layers, and
    sums of seconds too, except for the few operations on the prompt that are too short for their bytes to matter.
    """

    cell: Cell
    few: Counter[Launch]
    layer: Counter[Launch]

    def launches(self) -> Counter[Launch]:
        """Return the launches with all layers of the cell."""
        found = Counter(self.few)
        for launch, count in self.layer.items():
            found[launch] += (self.cell.sizes.layers - FEW) * count
        return found


def trace(cell: Cell) -> Step:
    """Trace a step with `FEW` layers and one with a layer more. Raises `RuntimeError` if a step waits for the GPU."""
    few, more = (launches_of(replace(cell, sizes=replace(cell.sizes, layers=layers))) for layers in (FEW, FEW + 1))
    layer = Counter(more)
    layer.subtract(few)
    return Step(cell, few, layer)


def launches_of(cell: Cell) -> Counter[Launch]:
    """Return the launches of an optimizer step in which every layer of the cell ran. Raises as `trace` does."""
    seen = Launches()
    with blank_on_gpu(cell) as (config, task, prepared, trained):
        with without_data(HOPPER):
            batch = sample_batch(config, task, trained.readout, rows_of(config), packed=True, supervised=0.5)
        ranks = Ranks(0, 1, 1, DEVICE)
        step = build_step(config, Trained(trained.encoder, trained.readout), ranks, prepared.model.dtype)
        step.clock = _Phases(seen)
        no_batches: Any = None
        loop = Loop(prepared, ranks, Reporter(), [Member(config.train, step, no_batches)])
        loop.take_step(0, [[batch]])  # creates the optimizer's state
        with watched(seen):
            loop.take_step(1, [[batch]])
    if seen.waited:
        raise RuntimeError(f"the step waits for the GPU, so its values matter: {seen.waited[0]}")
    return seen.counts


@contextmanager
def blank_on_gpu(cell: Cell) -> Iterator[tuple[RunConfig, Any, Prepared, Any]]:
    """Yield the run, its task, its backbone and what it trains, without weights, on the emulated GPU."""
    with _run(cell) as config, shapes_only():
        with without_data(HOPPER):
            task, prepared, trained = build_blank(config, "cuda")
        for module in (prepared.model, trained):
            _move(module)
        share_inputs(prepared.model)
        forward = Forward(prepared.attachment, DEVICE)
        yield config, task, Prepared(prepared.model, prepared.attachment, forward, ""), trained


@contextmanager
def _run(cell: Cell) -> Iterator[RunConfig]:
    """Yield the run's configuration, while the folder of its backbone's config exists."""
    sizes = cell.sizes
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(
            vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate,
            num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
            max_position_embeddings=8192, tie_word_embeddings=False, dtype="bfloat16",
        ).save_pretrained(folder)  # fmt: skip
        yield parse_config(
            {
                # `auto` takes Liger on a real GPU, but not in Triton's interpreter.
                "backbone": {"path": folder, "gradient_checkpointing": cell.checkpointing, "liger": True},
                "method": {"name": "prefix", "num_virtual_tokens": cell.virtual_tokens},
                "data": {"train": "unread.jsonl", "max_length": cell.length},
                "train": {"per_device_train_batch_size": cell.rows, "max_steps": 2},
                "output_dir": "unused",
            }
        )


def _move(module: nn.Module) -> None:
    """Replace the parameters and buffers, which have no data, by tensors of the emulated GPU."""
    moved: dict[int, Tensor] = {}

    def on_gpu(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
            is_parameter = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(there, requires_grad=tensor.requires_grad) if is_parameter else there
        return moved[id(tensor)]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = on_gpu(tensor)
