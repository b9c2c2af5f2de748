"""The encoders of all methods whose prompt is trained keys and values at every attention layer.

In the direct form, the flat prompt ``[P, W]`` is the parameter. In the re-parameterised form (Li & Liang 2021, §4.3,
https://aclanthology.org/2021.acl-long.353), ``prompt = W₂ · tanh(W₁ · E + b₁) + b₂`` with ``E`` ``[P, embedding]``,
``W₁`` ``[hidden, embedding]`` and ``W₂`` ``[W, hidden]``. ``W`` = Σ over layers of kv_heads · (key size + value size).
The columns are layer-major, keys before values, then kv head, then head dimension (PEFT's ``prompt_embeddings``
layout).

Both forms are trained in units of the keys and values that the backbone itself computes for text (`ptd.types.Units`):
``K = K₀ + s_K/2 · z`` and ``V = V₀ + 2 · s_V · z``, where ``s_K`` is the root mean square of a layer's keys, and
``s_V`` that of its values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from ptd.methods import Conditioner
from ptd.methods.settings import TextSettings, initial_text
from ptd.types import BackboneShape, LayerShape, PrefixLayout, PromptEncoder, Units, UserError, matrix_rates

MEASURED = 512
"""Tokens of text from which the sizes of keys and values are measured, as far as the backbone's context goes."""
KEYS, VALUES = 0.5, 2.0
"""The units of a layer's keys and values, as multiples of their root mean square. A key affects the attention of every
head that reads it; a value affects the layer's output only by the small share of attention that it gets. Measured on
two backbones: benchmarks/README.md, "One learning rate"."""
LAST, INSIDE = "transform.2.", 0.25
"""Name of an MLP's last layer, and the factor of the learning rate of everything before it. With features that change
more slowly than the last layer, runs on the quickstart's backbone end at a lower loss (same place)."""


class PrefixEncoder(PromptEncoder):
    """A prompt encoder whose flat output ``[P, W]`` is the prefix of all ``layers``, from one embedding and one MLP.

    Args:
        layers: key/value geometry of each backbone layer.
        num_virtual_tokens: P.
        embedding_size: width of E; None for the direct form.
        encoder_hidden_size: width of the tanh layer; None for the direct form.
    """

    layout: PrefixLayout

    def __init__(
        self,
        layers: tuple[LayerShape, ...],
        num_virtual_tokens: int,
        embedding_size: int | None = None,
        encoder_hidden_size: int | None = None,
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

    def network(self) -> Tensor:
        return self.embedding if self.transform is None else self.transform(self.embedding)

    def forward(self) -> Tensor:
        """Return the flat prompt ``[P, W]``."""
        flat = super().forward()
        return flat if self.first_token is None else torch.cat([self.first_token, flat[1:]])

    def last(self) -> nn.Linear | None:
        layer = None if self.transform is None else self.transform[-1]
        assert layer is None or isinstance(layer, nn.Linear)
        return layer

    @torch.no_grad()
    def freeze_first_token(self) -> None:
        """Exclude the first virtual token, an attention sink, from training (Eyuboglu et al. 2025)."""
        self.first_token = self()[:1].clone()

    def width_rates(self) -> Mapping[str, float]:
        if self.transform is None:
            return {}
        rates = {f"transform.{name}": rate for name, rate in matrix_rates(self.transform, len(self.embedding)).items()}
        inside = [name for name, _ in self.named_parameters() if not name.startswith(LAST)]
        return rates | {name: INSIDE * rates.get(name, 1.0) for name in inside}

    def tensor_parallel_plan(self) -> Mapping[str, Any]:
        """Split the hidden layer over ranks: W₁ by rows, W₂ by columns.

        The forward and backward passes then exchange only ``[P, W]`` and ``[P, embedding]``. With W₂ split by rows,
        ranks would also sum the hidden layer's gradient ``[P, hidden]``, which grows with ``encoder_hidden_size``.
        """
        if self.transform is None:
            return {}
        # The hidden layer stays a DTensor: DTensor would assume that a plain local shard is evenly sized.
        return {
            "transform.0": ColwiseParallel(use_local_output=False),
            "transform.2": RowwiseParallel(output_layouts=Replicate()),
        }


class SeparatePrefixEncoder(PromptEncoder):
    """The prefix of layers of several kinds (encoder, decoder, cross), each kind with its own embedding and MLP.

    Li & Liang 2021, §4: an encoder-decoder reads ``z = [Prefix; x; Prefix′; y]``. ``parts`` holds one `PrefixEncoder`
    per kind, all with the same arguments. The columns of the flat output ``[P, W]`` are in the order of ``layers``.
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

    def network(self) -> Tensor:
        layers = self.layout.layers
        blocks = {
            kind: iter(part().split([layer.numel for layer in layers if layer.kind == kind], dim=1))
            for kind, part in self.parts.items()
        }
        return torch.cat([next(blocks[layer.kind]) for layer in layers], dim=1)

    def zero(self) -> None:
        """Make the output zero by changing only the last layer of each kind's network."""
        for _, part in self._encoders():
            part.zero()

    @torch.no_grad()
    def freeze_first_token(self) -> None:
        """Exclude the first virtual token from training, in the prefix of every kind."""
        for _, part in self._encoders():
            part.freeze_first_token()

    def width_rates(self) -> Mapping[str, float]:
        return {
            f"parts.{kind}.{name}": rate for kind, part in self._encoders() for name, rate in part.width_rates().items()
        }

    def tensor_parallel_plan(self) -> Mapping[str, Any]:
        return {
            f"parts.{kind}.{name}": style
            for kind, part in self._encoders()
            for name, style in part.tensor_parallel_plan().items()
        }

    def _encoders(self) -> Sequence[tuple[str, PrefixEncoder]]:
        return [(kind, part) for kind, part in self.parts.items() if isinstance(part, PrefixEncoder)]


def prefix_encoder(
    layers: tuple[LayerShape, ...],
    num_virtual_tokens: int,
    embedding_size: int | None = None,
    encoder_hidden_size: int | None = None,
) -> PrefixEncoder | SeparatePrefixEncoder:
    """Return the encoder of a prefix for ``layers``, without units; arguments as for `PrefixEncoder`.

    It is a `SeparatePrefixEncoder` only if layers of several kinds would otherwise share an MLP.
    """
    separate = encoder_hidden_size is not None and len({layer.kind for layer in layers}) > 1
    build = SeparatePrefixEncoder if separate else PrefixEncoder
    return build(layers, num_virtual_tokens, embedding_size=embedding_size, encoder_hidden_size=encoder_hidden_size)


def started(
    encoder: PrefixEncoder | SeparatePrefixEncoder,
    config: TextSettings,
    shape: BackboneShape,
    conditioner: Conditioner,
) -> PrefixEncoder | SeparatePrefixEncoder:
    """Initialise the encoder, give it units of the backbone's own keys and values, and return it.

    ``config.init`` chooses the initial prompt. With ``rows``, ``chunks`` and ``text`` it is the keys and values that
    the backbone computes for P tokens of such text; with ``zero`` it is zero; with ``random`` it is the output of the
    network as torch initialises it, in units. Raises `UserError` for a ``text`` of fewer than P tokens.
    """
    init, tokens = config.init, encoder.network().shape[0]
    if init == "text":
        start = [_first(conditioner.token_ids(initial_text(config), special=True), tokens)]
    else:
        start = conditioner.chunks(tokens) if init == "chunks" else conditioner.rows(tokens)
    # Later tokens do not change a decoder's keys and values for the first P tokens.
    behind = conditioner.rows(max(0, min(MEASURED, shape.context or MEASURED) - tokens))
    read = [(first + rest)[: shape.context] for first, rest in zip(start * len(behind), behind, strict=False)]
    states = conditioner.keys_and_values(read)
    origin = states[torch.arange(tokens) % len(states)]  # a later check refuses prompts longer than the context
    if init in ("random", "zero"):
        origin = torch.zeros_like(origin)
    sizes, steps = sizes_of(states, encoder.layout)
    encoder.units = Units(origin.clone(), sizes * steps)
    if init != "random":
        encoder.zero()
    elif isinstance(encoder, PrefixEncoder) and encoder.transform is None:
        with torch.no_grad():
            encoder.embedding.div_(steps)
    return encoder


def sizes_of(states: Tensor, layout: PrefixLayout) -> tuple[Tensor, Tensor]:
    """Return per column ``[W]`` the root mean square over ``states`` ``[S, W]`` of its layer's keys, or values.

    Also return ``[W]``, the unit as a multiple of it: `KEYS` for columns of keys and `VALUES` for columns of values.
    """
    seen = layout.state(states)
    parts = [part for pair in zip(seen.keys, seen.values, strict=True) for part in pair]
    sizes = [part.square().mean().sqrt().expand(part[0].numel()) for part in parts]
    steps = [torch.full((part[0].numel(),), (KEYS, VALUES)[index % 2]) for index, part in enumerate(parts)]
    return torch.cat(sizes).clamp(min=torch.finfo(torch.float32).tiny), torch.cat(steps)


def _first(ids: list[int], count: int) -> list[int]:
    if len(ids) < count:
        raise UserError(
            f"method.init_text: the text has {len(ids)} tokens, fewer than method.num_virtual_tokens={count}; give a "
            f"longer text or set num_virtual_tokens to at most {len(ids)}"
        )
    return ids[:count]


def _peft_type(layers: tuple[LayerShape, ...]) -> str | None:
    """Return PEFT's name if all layers are of one kind: PEFT has no prefix for an encoder or for cross-attention."""
    return "PREFIX_TUNING" if len({layer.kind for layer in layers}) == 1 else None
