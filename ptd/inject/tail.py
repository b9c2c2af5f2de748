"""What runs behind a stack's last attention: at the positions that are read, and at no others.

Attention is the only place where tokens meet. Behind the last one, a token's hidden state leads to that token's output
alone, so wherever nobody reads it (prompts, padding) the last layer's MLP and output projection need not be computed;
their results there are zeros, and so are the gradients. The modules are found by watching the forward pass with which
the attention layers are found, and are hooked: no model code is touched.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import activation
from transformers import activations
from transformers.pytorch_utils import Conv1D

from ptd.inject.attention import probed


class Watch:
    """Sees which modules of a model run, in which order around the attention calls, while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._ran: Counter[nn.Module] = Counter()
        self._behind: dict[nn.Module, int] = {}  # module -> attention calls before it began
        self._fits: set[nn.Module] = set()
        self._last: tuple[nn.Linear, Tensor, Any] | None = None
        self._attended = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> Watch:
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
            # With the tensor itself: once freed, its memory may become that of the logits made from it.
            self._last = module, output, _identity(output)

    def behind_attention(self, members: set[nn.Module]) -> list[nn.Module]:
        """The largest modules among ``members`` that ran once, behind the last attention, with products in them, and
        that treat every position by itself."""
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

    def head_of(self, output: Any) -> nn.Linear | None:
        """The layer whose output the model put out as its logits, untouched."""
        logits = output.get("logits") if hasattr(output, "get") else None
        if logits is None or self._last is None or self._last[2] != _identity(logits):
            return None
        return self._last[0]


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Which memory it is, in what state (DeepSpeed's hooks hand on another view of it)."""
    return tensor.untyped_storage()._cdata, tensor._version, tensor.storage_offset(), tensor.shape, tensor.dtype


def _is_product(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _position_wise(module: nn.Module) -> bool:
    """Whether it is put together of products, norms over the last axis and activations only; no experts, no router."""
    children = list(module.children())
    if children:
        return not list(module.parameters(recurse=False)) and all(map(_position_wise, children))
    if _is_product(module) or isinstance(module, nn.Dropout | nn.Identity) or "Norm" in type(module).__name__:
        return not isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm)
    source = type(module).__module__
    return source in (activation.__name__, activations.__name__) and "oftmax" not in type(module).__name__


class Tail:
    """Hooks on these modules: each gets its input at the kept positions only, and puts out zeros elsewhere."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self._tokens: Tensor | None = None
        self._kept: Tensor | None = None
        self._shape: Any = None

    def begin(self, tokens: Tensor, kept: Tensor | None) -> None:
        """In the pass that begins now these ``tokens`` run, and of their flattened positions ``kept`` are read (None:
        all). A tensor, not its size: torch.compile would take a number for a constant."""
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
