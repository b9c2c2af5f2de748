"""Prefix-tuning (Li & Liang 2021, https://aclanthology.org/2021.acl-long.353): trained keys and values at every layer.

Direct: the flat prompt ``[P, W]`` is the parameter. Re-parameterised (§4.3 of the paper, ``prefix_projection``):
``prompt = W₂ · tanh(W₁ · E + b₁) + b₂`` with ``E`` ``[P, embedding]``, ``W₁`` ``[hidden, embedding]``,
``W₂`` ``[W, hidden]``. ``W`` = Σ over layers of kv_heads · (key size + value size); columns are layer-major, keys
before values, then kv head, then head dimension (PEFT's ``prompt_embeddings`` layout).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from ptd.methods import Conditioner, register
from ptd.types import BackboneShape, LayerShape, PrefixKV, PromptEncoder, UserError


@dataclass
class PrefixConfig:
    """Keys of ``method:`` for ``name: prefix``."""

    num_virtual_tokens: int = 16
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None  # default: the backbone's hidden size
    embedding_size: int | None = None  # width of E; default: the backbone's hidden size
    init: Literal["random", "zero", "text"] = "random"
    init_text: str | None = None
    init_text_file: Path | None = None
    freeze_first_token: bool = False

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "encoder_hidden_size", "embedding_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"method.{name}: got {value}, but it has to be at least 1")
        given = [name for name in ("init_text", "init_text_file") if getattr(self, name) is not None]
        if self.init == "text" and len(given) != 1:
            raise UserError("method.init: text needs exactly one of method.init_text and method.init_text_file")
        if self.init != "text" and given:
            raise UserError(f"method.{given[0]}: is given, but method.init is {self.init!r}; set method.init: text")
        if not self.prefix_projection:
            for name in ("encoder_hidden_size", "embedding_size"):
                if getattr(self, name) is not None:
                    raise UserError(f"method.{name}: has no effect without method.prefix_projection: true; remove one")

    def text(self) -> str:
        """The text to initialise from; only with ``init: text``."""
        if self.init_text is not None:
            return self.init_text
        assert self.init_text_file is not None
        try:
            return self.init_text_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"method.init_text_file: cannot read {self.init_text_file}: {error}") from error


class PrefixEncoder(PromptEncoder):
    """Prompt encoder whose flat output ``[P, W]`` is the prefix of all layers.

    Args:
        layers: key/value geometry of each backbone layer.
        num_virtual_tokens: P.
        embedding_size: width of E; None for the direct form.
        encoder_hidden_size: width of the tanh layer; None for the direct form.
        freeze_first_token: keep the first virtual token as initialised (an attention sink; Eyuboglu et al. 2025).
    """

    def __init__(
        self,
        layers: tuple[LayerShape, ...],
        num_virtual_tokens: int,
        embedding_size: int | None = None,
        encoder_hidden_size: int | None = None,
        freeze_first_token: bool = False,
    ) -> None:
        super().__init__()
        self.layers = layers
        width = sum(layer.numel for layer in layers)
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

    def state(self, flat: Tensor) -> PrefixKV:
        """Views of ``flat`` ``[P, W]`` as the keys and values of each layer; no copy."""
        return PrefixKV.from_flat(flat, self.layers)

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


@register("prefix", config=PrefixConfig)
def build(config: PrefixConfig, shape: BackboneShape, conditioner: Conditioner) -> PrefixEncoder:
    """Build and initialise the encoder for a backbone of ``shape``."""
    projection = config.prefix_projection
    encoder = PrefixEncoder(
        shape.layers,
        config.num_virtual_tokens,
        embedding_size=(config.embedding_size or shape.hidden_size) if projection else None,
        encoder_hidden_size=(config.encoder_hidden_size or shape.hidden_size) if projection else None,
        freeze_first_token=config.freeze_first_token,
    )
    if config.init == "zero":
        encoder.fit(torch.zeros_like(encoder()))
    elif config.init == "text":
        target = conditioner.text_kv(config.text(), config.num_virtual_tokens)
        if target.shape[1] != sum(layer.numel for layer in shape.layers):
            raise UserError(
                "method.init: text is not possible with this backbone: it caches something else than the keys and "
                "values its attention reads (multi-head latent attention does); use random or zero"
            )
        left = encoder.fit(target)
        if left > 1e-4:
            warnings.warn(
                f"method.encoder_hidden_size={config.encoder_hidden_size or shape.hidden_size} is too small to "
                f"reproduce the text's {config.num_virtual_tokens} keys and values: {left:.1%} relative error is left; "
                f"use at least {config.num_virtual_tokens}",
                stacklevel=2,
            )
    return encoder
