"""Trained keys and values at every attention layer: the encoders of all methods that put a prompt there.

Direct: the flat prompt ``[P, W]`` is the parameter. Re-parameterised (Li & Liang 2021, §4.3,
https://aclanthology.org/2021.acl-long.353): ``prompt = W₂ · tanh(W₁ · E + b₁) + b₂`` with ``E`` ``[P, embedding]``,
``W₁`` ``[hidden, embedding]``, ``W₂`` ``[W, hidden]``. ``W`` = Σ over layers of kv_heads · (key size + value size);
columns are layer-major, keys before values, then kv head, then head dimension (PEFT's ``prompt_embeddings`` layout).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from ptd.types import LayerShape, PrefixLayout, PromptEncoder


class PrefixEncoder(PromptEncoder):
    """Prompt encoder whose flat output ``[P, W]`` is the prefix of all ``layers``, from one embedding and one MLP.

    Args:
        layers: key/value geometry of each backbone layer.
        num_virtual_tokens: P.
        embedding_size: width of E; None for the direct form.
        encoder_hidden_size: width of the tanh layer; None for the direct form.
        freeze_first_token: keep the first virtual token as initialised (an attention sink; Eyuboglu et al. 2025).
    """

    layout: PrefixLayout

    def __init__(
        self,
        layers: tuple[LayerShape, ...],
        num_virtual_tokens: int,
        embedding_size: int | None = None,
        encoder_hidden_size: int | None = None,
        freeze_first_token: bool = False,
    ) -> None:
        super().__init__()
        self.layout = PrefixLayout(layers)
        self.peft_type = _peft_type(layers)
        width = self.layout.width
        self.transform: nn.Sequential | None = None
        if encoder_hidden_size is not None:
            assert embedding_size is not None
            self.transform = nn.Sequential(
                nn.Linear(embedding_size, encoder_hidden_size), nn.Tanh(), nn.Linear(encoder_hidden_size, width)
            )
        self.embedding = nn.Parameter(
            torch.randn(num_virtual_tokens, width if embedding_size is None else embedding_size)
        )
        self.first_token: Tensor | None
        self.register_buffer("first_token", None)
        if freeze_first_token:
            with torch.no_grad():
                self.first_token = self()[:1].clone()

    def forward(self) -> Tensor:
        """The flat prompt ``[P, W]``."""
        flat = self.embedding if self.transform is None else self.transform(self.embedding)
        return flat if self.first_token is None else torch.cat([self.first_token, flat[1:]])

    def tensor_parallel_plan(self) -> Mapping[str, Any]:
        """Split the hidden layer over ranks: W₁ by rows, W₂ by columns.

        Both directions then exchange `[P, W]` and `[P, embedding]` only: splitting W₂ by rows instead would
        have to sum the hidden layer's gradient ``[P, hidden]`` and grow with ``encoder_hidden_size``.
        """
        if self.transform is None:
            return {}
        # The hidden layer travels as a DTensor: a plain shard would be taken for one of even size.
        return {
            "transform.0": ColwiseParallel(use_local_output=False),
            "transform.2": RowwiseParallel(output_layouts=Replicate()),
        }

    @torch.no_grad()
    def fit(self, target: Tensor) -> float:
        """Make the output equal ``target`` ``[P, W]`` by the last layer alone; returns the relative RMS error left.

        Exact (up to rounding) whenever ``encoder_hidden_size >= P - 1``: the minimum-norm least-squares solution of
        ``(tanh(W₁E + b₁) − mean) W₂ᵀ = target − mean`` (means over virtual tokens; ``b₂`` joins them), solved in fp64.
        """
        if self.first_token is not None:
            self.first_token.copy_(target[:1])
        if self.transform is None:
            self.embedding.copy_(target)
            return 0.0
        hidden = self.transform[:-1](self.embedding).double()
        last = self.transform[-1]
        assert isinstance(last, nn.Linear)
        hidden_mean, target_mean = hidden.mean(0), target.double().mean(0)
        solution = torch.linalg.lstsq(hidden - hidden_mean, target.double() - target_mean, driver="gelsd").solution
        last.weight.copy_(solution.T)
        last.bias.copy_(target_mean - hidden_mean @ solution)
        return float((self() - target).norm() / target.norm())


class SeparatePrefixEncoder(PromptEncoder):
    """The prefix of layers of several kinds (encoder, decoder, cross), each kind with its own embedding and MLP.

    Li & Liang 2021, §4: an encoder-decoder reads ``z = [Prefix; x; Prefix′; y]``. ``parts`` holds a `PrefixEncoder` a
    kind, whose arguments are the same; the flat output ``[P, W]`` has the columns of ``layers`` in their order.
    """

    layout: PrefixLayout

    def __init__(self, layers: tuple[LayerShape, ...], num_virtual_tokens: int, **sizes: Any) -> None:
        super().__init__()
        self.layout = PrefixLayout(layers)
        self.peft_type = _peft_type(layers)
        self.parts = nn.ModuleDict(
            {
                kind: PrefixEncoder(tuple(layer for layer in layers if layer.kind == kind), num_virtual_tokens, **sizes)
                for kind in dict.fromkeys(layer.kind for layer in layers)
            }
        )

    def forward(self) -> Tensor:
        """The flat prompt ``[P, W]``."""
        layers = self.layout.layers
        blocks = {
            kind: iter(part().split([layer.numel for layer in layers if layer.kind == kind], dim=1))
            for kind, part in self.parts.items()
        }
        return torch.cat([next(blocks[layer.kind]) for layer in layers], dim=1)

    def tensor_parallel_plan(self) -> Mapping[str, Any]:
        return {
            f"parts.{kind}.{name}": style
            for kind, part in self._encoders()
            for name, style in part.tensor_parallel_plan().items()
        }

    def fit(self, target: Tensor) -> float:
        """As `PrefixEncoder.fit`, each kind by itself."""
        layers = self.layout.layers
        blocks = target.split([layer.numel for layer in layers], dim=1)
        for kind, part in self._encoders():
            part.fit(torch.cat([block for block, layer in zip(blocks, layers, strict=True) if layer.kind == kind], 1))
        with torch.no_grad():
            return float((self() - target).norm() / target.norm())

    def _encoders(self) -> Sequence[tuple[str, PrefixEncoder]]:
        return [(kind, part) for kind, part in self.parts.items() if isinstance(part, PrefixEncoder)]


def prefix_encoder(
    layers: tuple[LayerShape, ...],
    num_virtual_tokens: int,
    embedding_size: int | None = None,
    encoder_hidden_size: int | None = None,
    freeze_first_token: bool = False,
) -> PrefixEncoder | SeparatePrefixEncoder:
    """The encoder of a prefix for ``layers``; arguments as for `PrefixEncoder`.

    Only where an MLP would be shared by layers of several kinds is there anything to separate.
    """
    separate = encoder_hidden_size is not None and len({layer.kind for layer in layers}) > 1
    build = SeparatePrefixEncoder if separate else PrefixEncoder
    return build(
        layers,
        num_virtual_tokens,
        embedding_size=embedding_size,
        encoder_hidden_size=encoder_hidden_size,
        freeze_first_token=freeze_first_token,
    )


def _peft_type(layers: tuple[LayerShape, ...]) -> str | None:
    """PEFT has a prefix for one stack: to an encoder-decoder it gives none for the encoder and for cross-attention."""
    return "PREFIX_TUNING" if len({layer.kind for layer in layers}) == 1 else None
