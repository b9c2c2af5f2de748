"""Run the modules after a stack's last attention only at the positions whose output is read.

Attention is the only place where tokens exchange information. After the last attention, a token's hidden state affects
only that token's output. At positions whose output is not read (prompts, padding), the last layer's MLP and output
projection are therefore not computed; their results there are zeros, and so are the gradients. `ModuleProbe` finds
these modules in the same forward pass that finds the attention layers, and `Tail` hooks them. No model code is changed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import activation
from transformers import activations
from transformers.pytorch_utils import Conv1D

from ptd.inject.attention import probed


class ModuleProbe:
    """Context manager that records which modules of a model run, and after how many attention calls each begins."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._ran: Counter[nn.Module] = Counter()
        self._behind: dict[nn.Module, int] = {}  # module -> attention calls before it began
        self._fits: set[nn.Module] = set()
        self._last: tuple[nn.Linear, Tensor, Any] | None = None
        self._attended = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> ModuleProbe:
        for module in self.model.modules():
            self._hooks.append(module.register_forward_pre_hook(self._before))
            self._hooks.append(module.register_forward_hook(self._after, with_kwargs=True))
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._ran[module] += 1
        probe = probed.get()
        self._attended = len(probe.calls) if probe is not None else 0
        self._behind[module] = self._attended

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        one = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        if one and output.ndim > 1 and output.shape[:-1] == args[0].shape[:-1]:
            self._fits.add(module)
        if type(module) is nn.Linear:
            # Keep the tensor itself: if it were freed, the logits made from it could reuse its memory.
            self._last = module, output, _identity(output)

    def behind_attention(self, members: set[nn.Module]) -> list[nn.Module]:
        """Return the largest modules among ``members`` that ran once, after the last attention.

        Only modules that contain a matrix product and process every position separately qualify.
        """
        attended = max(self._behind.values(), default=0)
        found = [
            module
            for module in self.model.modules()
            if module in members
            and self._behind.get(module) == attended
            and self._ran[module] == 1
            and module in self._fits
            and _position_wise(module)
            and any(_is_product(part) for part in module.modules())
        ]
        inner = {part for module in found for part in module.modules() if part is not module}
        return [module for module in found if module not in inner]

    def head_of(self, output: Any, stack: set[nn.Module]) -> nn.Linear | None:
        """Return the linear layer behind ``stack`` whose output the model returns unchanged as its logits, or None.

        In FSMT that layer is inside the decoder.
        """
        logits = output.get("logits") if hasattr(output, "get") else None
        if logits is None or self._last is None or self._last[2] != _identity(logits):
            return None
        return None if self._last[0] in stack else self._last[0]


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return what identifies a tensor's memory and version; DeepSpeed's hooks pass on another view of that memory."""
    return tensor.untyped_storage()._cdata, tensor._version, tensor.storage_offset(), tensor.shape, tensor.dtype


def _is_product(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _position_wise(module: nn.Module) -> bool:
    """Return whether the module consists only of matrix products, norms over the last axis, dropout and activations.

    Modules with experts or a router do not.
    """
    children = list(module.children())
    if children:
        return not list(module.parameters(recurse=False)) and all(map(_position_wise, children))
    if _is_product(module) or isinstance(module, nn.Dropout | nn.Identity) or "Norm" in type(module).__name__:
        return not isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm)
    source = type(module).__module__
    return source in (activation.__name__, activations.__name__) and "oftmax" not in type(module).__name__


class Tail:
    """Hooks on ``modules``: each module runs only on the kept positions, and its output is zero at all others."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self._tokens: Tensor | None = None
        self._kept: Tensor | None = None
        self._shape: Any = None

    def begin(self, tokens: Tensor, kept: Tensor | None) -> None:
        """Set the ``tokens`` of the pass that begins now, and which of their flattened positions are read (None: all).

        ``tokens`` is a tensor and not its size, because torch.compile would treat a number as a constant.
        """
        self._tokens = tokens
        self._kept = kept if kept is not None and len(kept) < tokens.numel() else None

    def hooks(self) -> list[Any]:
        return [
            handle
            for module in self.modules
            for handle in (
                module.register_forward_pre_hook(self._gather),
                module.register_forward_hook(self._scatter),
            )
        ]

    def _gather(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._shape = None
        if self._kept is None or self._tokens is None or args[0].shape[:-1].numel() != self._tokens.numel():
            return None
        self._shape = args[0].shape[:-1]
        kept = args[0].flatten(0, -2).index_select(0, self._kept)
        return (kept.view(*(1,) * (len(self._shape) - 1), *kept.shape),)

    def _scatter(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._shape is None or self._kept is None or self._tokens is None:
            return None
        everywhere = output.new_zeros(self._tokens.numel(), output.shape[-1])
        everywhere = everywhere.index_copy_(0, self._kept, output.flatten(0, -2))
        shape, self._shape = self._shape, None
        return everywhere.view(*shape, -1)
