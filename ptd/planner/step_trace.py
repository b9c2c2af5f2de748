"""Trace one optimizer step on shapes alone: its memory at every moment and its floating-point operations.

The model, the injection, the readout, the prompt encoder, the reduction and the optimizer are the real ones. Their
tensors have no data (torch's ``FakeTensorMode``), so a model of any size runs in seconds on any machine.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from ptd.checkpoint.run_state import ResumableOptimizer
from ptd.engine.prompt_step import PromptStep, StepSums, finish_step
from ptd.engine.setup import Prepared
from ptd.inject import standing_in_for_gpu
from ptd.planner.allocation_tracker import Allocations, Interval
from ptd.planner.zero3_gathers import Use, Weight
from ptd.types import Batch, PromptEncoder

aten = torch.ops.aten
Capability = tuple[int, int] | None
"""Compute capability of the NVIDIA GPU to trace for; None: a CPU."""
MULTIPROCESSORS, KEYS_PER_PROGRAM = 132, 128
"""Those of a Hopper GPU, and the most keys of a program of the prefix's gradient (fused/tile_table.py)."""
CUDA_GRANULARITY = 512
"""torch's CUDA allocator rounds allocations up to multiples of these bytes
(kMinBlockSize, c10/cuda/CUDACachingAllocator.cpp)."""


@dataclass(frozen=True)
class Trace:
    """Memory and computation of a step with one micro-batch, on one rank that holds the whole backbone.

    ``timeline``: the intervals between the `Use` events of the backbone, each with the bytes by category at its peak;
    ``weights``: the frozen parameters; ``modules``: for each module the indices of its own parameters in ``weights``
    (without those of submodules); ``fixed_bytes``: buffers and the scales of quantised weights; ``flops``: those of
    forward and backward pass; ``prompt_flow``: numbers that a split encoder sums over its ranks per step.
    """

    timeline: list[Interval]
    weights: list[Weight]
    modules: list[tuple[int, ...]]
    fixed_bytes: int
    flops: int
    tokens: int
    prompt_numel: int
    prompt_flow: int
    trained_numel: int
    head_numel: int

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights) + self.fixed_bytes


@contextmanager
def without_data(capability: Capability) -> Iterator[Allocations]:
    """Run everything inside on shapes alone, as a CPU (None) or a GPU of this capability would run it."""
    on_gpu = capability is not None
    seen = Allocations(
        CUDA_GRANULARITY if on_gpu else 1, _gpu_workspaces() if on_gpu else _cpu_workspaces(), _flop_formulas()
    )
    with FakeTensorMode(allow_non_fake_inputs=True), standing_in_for_gpu(capability), _without_kernels(), seen:
        yield seen


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Launch no Triton kernel: they write memory that their callers have allocated."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    interface = importlib.import_module("triton.runtime.jit").KernelInterface
    launcher = interface.__getitem__
    interface.__getitem__ = lambda kernel, grid: lambda *arguments, **options: None
    try:
        yield
    finally:
        interface.__getitem__ = launcher


def trace_step(
    prepared: Prepared,
    step: PromptStep,
    batch: Batch,
    seen: Allocations,
    *,
    vocab_size: int,
    on_gpu: bool,
) -> Trace:
    """Trace an optimizer step, after creating the optimizer's state in a first one. Call it inside `without_data`."""
    weights, fixed = _own(prepared.model, seen)
    parameters = list(step.trained.parameters())
    seen.own([parameters, list(step.trained.buffers())], "encoder")
    for group in step.optimizer.param_groups:
        if "fused" in group:  # torch's AdamW
            group.update(fused=on_gpu, foreach=not on_gpu)
    _make_state(step.optimizer, seen)
    used = _Uses(prepared.model, weights, seen)
    seen.classify = lambda tensor: "logits" if tensor.ndim > 1 and tensor.shape[-1] == vocab_size else None
    seen.timeline.clear()
    seen.mark(None)
    seen.timeline.clear()
    seen.flops = 0
    with seen.kind("encoder"):
        state = step.encode()
    leaves = list(state.tensors())
    encoder_bytes = {parameter.untyped_storage()._cdata for parameter in parameters}
    seen.own([leaf for leaf in leaves if leaf.untyped_storage()._cdata not in encoder_bytes], "prompt")
    for leaf in leaves:
        leaf.register_post_accumulate_grad_hook(lambda tensor: seen.own([tensor.grad], "prompt"))
    prepared.attachment.set(state)
    seen.flops = 0
    reading = step.readout(prepared.run, batch)
    if reading.loss.requires_grad:
        reading.loss.backward()
    flops = seen.flops
    seen.mark(None)
    with seen.kind("encoder"):
        sums = StepSums.zero(torch.device("cpu"))
        sums.add(reading, batch)
        finish_step([step], [sums])
    seen.mark(None)
    used.remove()
    head = sum(parameter.numel() for parameter in step.readout.parameters())
    return Trace(
        timeline=list(seen.timeline),
        weights=list(weights.values()),
        modules=used.members,
        fixed_bytes=fixed,
        flops=flops,
        tokens=batch.tokens,
        prompt_numel=sum(leaf.numel() for leaf in leaves),
        prompt_flow=_flow(step.encoder, sum(leaf.numel() for leaf in leaves)),
        trained_numel=step.trained.count(),
        head_numel=head,
    )


def split_encoder(encoder: PromptEncoder, ranks: int) -> PromptEncoder:
    """Replace each wide layer by the part that one of ``ranks`` ranks holds (`Ranks.distribute`)."""
    plan = dict(encoder.tensor_parallel_plan())
    sizes = [size for name in plan for weight in encoder.get_submodule(name).parameters() for size in weight.shape]
    if not plan or ranks == 1 or min(sizes) < ranks:
        return encoder
    for name, style in plan.items():
        layer = encoder.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        rows, columns = layer.weight.shape
        if isinstance(style, ColwiseParallel):
            layer.weight = nn.Parameter(layer.weight.new_empty(math.ceil(rows / ranks), columns))
            layer.bias = nn.Parameter(layer.bias.new_empty(math.ceil(rows / ranks)))
        else:
            assert isinstance(style, RowwiseParallel)
            layer.weight = nn.Parameter(layer.weight.new_empty(rows, math.ceil(columns / ranks)))
    return encoder


def _flow(encoder: PromptEncoder, prompt_numel: int) -> int:
    """Return how many numbers a split encoder sums over its ranks per step: its output and its input's gradient."""
    plan = encoder.tensor_parallel_plan()
    if not plan:
        return 0
    inputs = sum(
        encoder.get_submodule(name).in_features  # type: ignore[misc]
        for name, style in plan.items()
        if isinstance(style, ColwiseParallel)
    )
    rows = prompt_numel // max(1, encoder.layout.width)
    return prompt_numel + rows * int(inputs)


def _own(model: PreTrainedModel, seen: Allocations) -> tuple[dict[int, Weight], int]:
    """Return the frozen parameters by id, and the bytes of all other tensors that the backbone holds."""
    weights: dict[int, Weight] = {}
    others: list[Tensor] = list(model.buffers())
    for parameter in model.parameters():
        weights.setdefault(id(parameter), Weight(parameter.numel(), parameter.element_size()))
        seen.own(parameter, "weights")
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            if part is not None:
                others += [part.absmax, part.code] + ([part.offset] if part.offset is not None else [])
    for module in model.modules():
        scale = getattr(getattr(module, "state", None), "SCB", None)
        if isinstance(scale, Tensor):
            others.append(scale)
    seen.own(others, "weights")
    storages = {other.untyped_storage()._cdata: other.untyped_storage().nbytes() for other in others}
    return weights, sum(storages.values())


def _make_state(optimizer: ResumableOptimizer, seen: Allocations) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seen.own([list(state.values()) for state in optimizer.state.values()], "optimizer")


class _Uses:
    """Marks the timeline where DeepSpeed would gather and release weights: before and after every module.

    That includes modules without own parameters, before which DeepSpeed prefetches the weights of others.
    """

    def __init__(self, model: nn.Module, weights: dict[int, Weight], seen: Allocations) -> None:
        self.members: list[tuple[int, ...]] = []
        self._hooks: list[Any] = []
        number = {key: index for index, key in enumerate(weights)}
        for module in model.modules():
            own = tuple(sorted({number[id(parameter)] for parameter in module.parameters(recurse=False)}))
            here = len(self.members)
            begin, end = self._marker(seen, Use("fetch", here)), self._marker(seen, Use("release", here))
            back, done = self._marker(seen, Use("fetch", here, True)), self._marker(seen, Use("release", here, True))
            self.members.append(own)
            self._hooks.append(module.register_forward_pre_hook(self._before(begin, done)))
            self._hooks.append(module.register_forward_hook(self._after(back, end)))

    @staticmethod
    def _marker(seen: Allocations, use: Use) -> Callable[..., None]:
        return lambda *unused: seen.mark(use)

    @staticmethod
    def _before(begin: Callable[..., None], end: Callable[..., None]) -> Callable[..., None]:
        def own(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            value = value.view_as(value)  # modules that share an input tensor end their backward separately
            value.register_hook(end)
            return value

        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            begin()
            return tree_map(own, args)

        return hook

    @staticmethod
    def _after(begin: Callable[..., None], end: Callable[..., None]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            end()
            for value in tree_leaves(output):
                if isinstance(value, Tensor) and value.requires_grad:
                    # Tensor hooks run in order, and backward must enter a module before its submodule with the same
                    # output tensor. So the newest hook, which is the outer module's, goes first.
                    value.register_hook(begin)
                    hooks: dict[int, Any] = value._backward_hooks  # type: ignore[assignment]
                    latest, *earlier = reversed(hooks.items())
                    hooks.clear()
                    hooks.update([latest, *reversed(earlier)])

        return hook

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _numbers(tensor: Tensor) -> int:
    size: int = tensor.numel() * tensor.element_size()
    return size


def _dequantised(a: Tensor, b: Tensor, shape: Any, *rest: Any, **options: Any) -> int:
    """Return the workspace of gemm_4bit: the weight in the compute dtype (its fp32 absmax is already freed)."""
    size: int = math.prod(shape) * a.element_size()
    return size


def _gpu_workspaces() -> dict[Any, Callable[..., int]]:
    """Return, by operator, the bytes that GPU kernels allocate internally, where the trace cannot see them."""

    def flash_backward(dout: Tensor, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> int:
        # mha_bwd of FlashAttention-2 in torch: dq in fp32, row sums of the softmax, and dk and dv per query head.
        heads, kv_heads = q.shape[-2], k.shape[-2]
        rows = q.numel() // q.shape[-1]
        expanded = 2 * _numbers(k) * (heads // kv_heads) if heads != kv_heads else 0
        return rows * (-(-q.shape[-1] // 32) * 32) * 4 + rows * 4 + expanded

    found: dict[Any, Callable[..., int]] = {
        aten._flash_attention_backward: flash_backward,
        torch.ops.ptd.fp8_linear_input: lambda rows, row_scale, weight, **options: (
            _numbers(weight) + 4 * weight.shape[1]
        ),
    }
    found[torch.ops.ptd_kernels.shared_keys_backward] = _shared_keys_backward
    return found | _bitsandbytes_workspaces() | _everywhere()


def _shared_keys_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> int:
    """Return the bytes of the splits' partial sums: the rows are split until there are two programs per multiprocessor.

    With many keys there is one split, and the row sums of dout * out are stored.
    """
    splits = max(1, math.ceil(2 * MULTIPROCESSORS / (k.shape[1] * math.ceil(k.shape[2] / KEYS_PER_PROGRAM))))
    return 4 * (splits * (k.numel() + v.numel()) + q.numel() // q.shape[3])


def _cpu_workspaces() -> dict[Any, Callable[..., int]]:
    def adam_in_float32(name: str, gradient: Tensor, *rest: Any, **options: Any) -> int:
        # Both moments, the scaled gradient, the denominator and its square root.
        return 5 * 4 * gradient.numel()

    def in_float32(rows: Tensor, row_scale: Tensor, weight: Tensor, *rest: Any, **options: Any) -> int:
        # Both operands and the product in fp32.
        width = weight.shape[0] if rest else weight.shape[1]
        return 4 * (rows.numel() + weight.numel() + rows.shape[0] * width)

    fp8 = (torch.ops.ptd.fp8_linear, torch.ops.ptd.fp8_linear_input)
    adam = _of_bitsandbytes({"optimizer_update_8bit_blockwise": adam_in_float32})
    return dict.fromkeys(fp8, in_float32) | adam | _bitsandbytes_workspaces() | _everywhere()


def _everywhere() -> dict[Any, Callable[..., int]]:
    # exp(x - max) in addition to x
    return {aten.logsumexp: lambda x, *rest, **options: _numbers(x)}


def _of_bitsandbytes(found: dict[str, Callable[..., int]]) -> dict[Any, Callable[..., int]]:
    """Return the values by bitsandbytes operator instead of by name.

    An operator that is missing in a release is composed of other operators there.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    importlib.import_module("bitsandbytes")
    operators = torch.ops.bitsandbytes
    return {getattr(operators, name): value for name, value in found.items() if hasattr(operators, name)}


def _bitsandbytes_workspaces() -> dict[Any, Callable[..., int]]:
    return _of_bitsandbytes(
        {
            "gemm_4bit": _dequantised,
            # The int32 product before scaling.
            "int8_scaled_mm": lambda *args, out_val, **options: 4 * out_val.numel(),
        }
    )


def _flop_formulas() -> dict[Any, Callable[..., int]]:
    """Return FLOP formulas for operators that torch's flop_counter does not know or whose lengths it cannot read.

    They follow its conventions: 2 per term of an inner product, full attention (causal or not), and for packed rows
    each row with itself.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> int:
        batch, heads, rows, width = q.shape
        return 2 * batch * heads * rows * k.shape[2] * (width + v.shape[3])

    def attention_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> int:
        batch, heads, rows, width = q.shape
        return 2 * batch * heads * rows * k.shape[2] * (3 * width + 2 * v.shape[3])

    def flash(q: Tensor, k: Tensor, v: Tensor, *bounds: Any, **options: Any) -> int:
        cu_q, _, max_q, max_k = bounds[:4]
        terms: int = q.shape[-1] + v.shape[-1]
        return 2 * q.shape[-2] * _pairs(q, k, cu_q, max_q, max_k) * terms

    def flash_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *bounds: Any,
                       **options: Any) -> int:  # fmt: skip
        cu_q, _, max_q, max_k = bounds[:4]
        terms: int = 3 * q.shape[-1] + 2 * v.shape[-1]
        return 2 * q.shape[-2] * _pairs(q, k, cu_q, max_q, max_k) * terms

    def four_bit(a: Tensor, b: Tensor, shape: Any, *rest: Any, **options: Any) -> int:
        numbers: int = math.prod(shape)
        return 2 * (a.numel() // a.shape[-1]) * numbers

    def eight_bit(a: Tensor, b: Tensor, *rest: Any, **options: Any) -> int:
        return 2 * (a.numel() // a.shape[-1]) * b.numel()

    def grouped(a: Tensor, b: Tensor, *rest: Any, **options: Any) -> int:
        return 2 * a.shape[0] * b.shape[1] * b.shape[2]

    def fp8(rows: Tensor, row_scale: Tensor, weight: Tensor, *rest: Any, **options: Any) -> int:
        return 2 * rows.shape[0] * weight.numel()

    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.ptd.fp8_linear: fp8,
        torch.ops.ptd.fp8_linear_input: fp8,
        aten._grouped_mm: grouped,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        aten._flash_attention_forward: flash,
        aten._flash_attention_backward: flash_backward,
        torch.ops.ptd_kernels.shared_keys: attention,
        torch.ops.ptd_kernels.shared_keys_backward: attention_backward,
    }
    return formulas | _of_bitsandbytes({"gemm_4bit": four_bit, "int8_scaled_mm": eight_bit})


def _pairs(q: Tensor, k: Tensor, cu_q: Tensor | None, max_q: int, max_k: int) -> int:
    """Return the number of query-key pairs; q: ``[B, S, H, D]``, or packed ``[S, H, D]``, sequences of equal length."""
    return q.shape[0] * q.shape[1] * k.shape[1] if cu_q is None else (cu_q.numel() - 1) * max_q * max_k
