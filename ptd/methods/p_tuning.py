"""P-tuning (Liu et al. 2021, GPT Understands, Too, https://arxiv.org/abs/2103.10385): virtual tokens inside a template.

``{v:n}`` in ``task.patterns`` or ``data.prompt_template`` stands for n virtual tokens. Each has a trained embedding
``e``. The backbone reads ``h`` ``[P, hidden]``: ``h = MLP([LSTM→(e); LSTM←(e)])``, the paper's prompt encoder, or
``h = MLP(e)``. The paper's anchor tokens need no code: they are literal words of the template, such as the question
mark of ``"{premise} {v:3} {hypothesis}? {v:3} {mask}"``.

Without ``{v:n}`` marks, the virtual tokens come before the sequence (in an encoder-decoder, before the encoder's
sequence). PEFT calls this P_TUNING and has the same network, module for module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from ptd.methods import Conditioner, TaskFacts, register
from ptd.methods.settings import VIRTUAL_TOKENS, check_positive, key
from ptd.methods.soft_prompts import embeddings_of_rows, units_of
from ptd.types import BackboneShape, PromptEncoder, SoftLayout, UserError, matrix_rates

HIDDEN_STATE = 0.045
"""Root mean square of the hidden states of an LSTM with torch's initial values, on standard normal embeddings: between
0.057 (width 128) and 0.041 (width 4096)."""
FEATURES = {"lstm": (HIDDEN_STATE, 0.02), "mlp": (1.0, 0.4, 0.16)}
"""Root mean square of the inputs of each linear layer of the MLP, after an LSTM and without one."""


@dataclass
class PTuningConfig:
    """Keys of ``method:`` for ``name: p_tuning``."""

    num_virtual_tokens: int | None = key(
        None, f"{VIRTUAL_TOKENS} before the text; default: as many as the `{{v:n}}` marks of the template"
    )
    encoder_reparameterization_type: Literal["lstm", "mlp"] = key(
        "lstm", "`lstm`: a bidirectional LSTM and an MLP; `mlp`: only an MLP"
    )
    encoder_hidden_size: int | None = key(
        None,
        "width of one direction of the LSTM, or of the MLP's hidden layers; the default makes a large network; "
        "default: the width of the input embeddings",
    )
    encoder_num_layers: int = key(2, "layers of the LSTM; without an LSTM, the MLP always has two hidden layers")
    init: Literal["rows", "random"] = key(
        "rows",
        "the initial values: `rows`: embeddings of tokens of training rows, to which the network adds; `random`: the "
        "output of the network with torch's initial values, in units of the backbone's embeddings",
    )

    def __post_init__(self) -> None:
        check_positive(self, "num_virtual_tokens", "encoder_hidden_size", "encoder_num_layers")
        if self.encoder_reparameterization_type == "mlp" and self.encoder_num_layers != 2:
            raise UserError(
                "method.encoder_num_layers: counts the layers of the LSTM and has no effect with "
                "encoder_reparameterization_type: mlp; remove it"
            )


class PTuningEncoder(PromptEncoder):
    """A prompt encoder whose flat output ``[P, hidden]`` is the input embeddings of the virtual tokens.

    Args:
        num_virtual_tokens: P.
        hidden_size: width of the backbone's input embeddings.
        encoder_hidden_size: width of the MLP's hidden layers, or of one direction of the LSTM.
        lstm_layers: layers of the bidirectional LSTM; 0: only the MLP.
        in_front: whether the virtual tokens come before every sequence, rather than at ``{v:n}`` marks inside it.
    """

    peft_type = "P_TUNING"

    def __init__(
        self,
        num_virtual_tokens: int,
        hidden_size: int,
        encoder_hidden_size: int,
        lstm_layers: int = 2,
        in_front: bool = False,
    ) -> None:
        super().__init__()
        self.layout = SoftLayout(hidden_size, in_front)
        self.embedding = nn.Parameter(torch.randn(num_virtual_tokens, hidden_size))
        self.lstm_head: nn.LSTM | None = None
        if lstm_layers:
            self.lstm_head = nn.LSTM(hidden_size, encoder_hidden_size, lstm_layers, bidirectional=True)
            widths = [2 * encoder_hidden_size, 2 * encoder_hidden_size, hidden_size]
        else:
            widths = [hidden_size, encoder_hidden_size, encoder_hidden_size, hidden_size]
        linear = [nn.Linear(width, following) for width, following in pairwise(widths)]
        modules = [module for layer in linear for module in (layer, nn.ReLU())]
        self.mlp_head = nn.Sequential(*modules[:-1])

    def network(self) -> Tensor:
        hidden = self.embedding if self.lstm_head is None else self.lstm_head(self.embedding)[0]
        z: Tensor = self.mlp_head(hidden)
        return z

    def last(self) -> nn.Linear:
        layer = self.mlp_head[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def width_rates(self) -> Mapping[str, float]:
        """Return 1 / (in · root mean square of the inputs) for every weight matrix.

        LSTM and ReLU give all rows much the same features, so a change of the weights changes all rows alike, and the
        factor √P of `matrix_rates` does not apply.
        """
        lstm = {} if self.lstm_head is None else matrix_rates(self.lstm_head, 1)
        sizes = FEATURES["mlp" if self.lstm_head is None else "lstm"]
        found = {f"lstm_head.{name}": rate / (1 if "ih_l0" in name else HIDDEN_STATE) for name, rate in lstm.items()}
        mlp = matrix_rates(self.mlp_head, 1)
        return found | {f"mlp_head.{name}": rate / size for (name, rate), size in zip(mlp.items(), sizes, strict=True)}


def check(config: PTuningConfig, facts: TaskFacts) -> None:
    """Raise `UserError` without virtual tokens, or if template and ``num_virtual_tokens`` disagree on their number."""
    marked, given = facts.virtual_tokens, config.num_virtual_tokens
    if not marked and given is None:
        if facts.kind in ("causal_lm", "seq2seq_lm"):
            example = 'data.prompt_template: "{v:10}{prompt}"'
        elif facts.kind == "classification":
            example = 'task.patterns: ["{v:3} {text} {v:3} {mask}"]'
        else:
            example = ""
        raise UserError(
            "method.name: p_tuning trains the virtual tokens of a template, but the template has none; "
            + (f"write them, for example {example}, or set " if example else "set ")
            + "method.num_virtual_tokens to put that many before the text"
        )
    if marked and given is not None and given != marked:
        raise UserError(
            f"method.num_virtual_tokens: got {given}, but the {{v:n}} marks of the template are {marked} virtual "
            "tokens; remove the key or the marks"
        )


def _from_nothing(config: PTuningConfig) -> PTuningConfig:
    return replace(config, init="random")


@register("p_tuning", config=PTuningConfig, check=check, sizes=_from_nothing, example={"num_virtual_tokens": 20})
def build(config: PTuningConfig, shape: BackboneShape, conditioner: Conditioner, facts: TaskFacts) -> PTuningEncoder:
    """Build the encoder for a backbone of ``shape``; raises `UserError` as `check` does."""
    check(config, facts)
    tokens = facts.virtual_tokens or config.num_virtual_tokens or 0
    encoder = PTuningEncoder(
        tokens,
        shape.input_size,
        config.encoder_hidden_size or shape.input_size,
        lstm_layers=config.encoder_num_layers if config.encoder_reparameterization_type == "lstm" else 0,
        in_front=not facts.virtual_tokens,
    )
    rows = embeddings_of_rows(tokens, conditioner)
    origin = rows[:tokens]
    if config.init == "rows":
        encoder.zero()
    else:
        origin = torch.zeros_like(origin)
    encoder.units = units_of(rows, origin)
    return encoder
