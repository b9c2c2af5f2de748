"""Write and read a prompt in PEFT's adapter format, and say which prompts the format cannot hold.

``adapter_model.safetensors`` holds one tensor, ``prompt_embeddings``:

===============================  =======================================================================
PREFIX_TUNING, CARTRIDGE         ``[P, L·2·token_dim]``: columns by layer, then keys before values, then kv
                                 head, then head dimension; ``token_dim`` = kv heads × head dimension
PROMPT_TUNING, P_TUNING          ``[P · num_transformer_submodules, hidden]``: the output of a
                                 re-parameterisation, never its parameters
===============================  =======================================================================
"""

from __future__ import annotations

from typing import Any

from ptd.checkpoint.layouts import Layout, checked_size
from ptd.types import EmptyLayout, LayerShape, PrefixLayout, SoftLayout, UserError

PREFIX_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
SOFT_TYPES = ("PROMPT_TUNING", "P_TUNING")
ENCODER_DECODER = "SEQ_2_SEQ_LM"
WITH_HEAD = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token_classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question_answering"),
}
"""PEFT's task types that train a head: the transformers class with that head, and ptd's kind of the task."""
MOST_LAYERS = 10_000
"""More layers than any backbone has, and few enough to be listed in memory."""
PEFT_FORMAT = "0.21.2"
"""The PEFT version whose format ptd writes and tests."""


def obstacle(layout: Layout, peft_type: str | None, task_type: str | None) -> str | None:
    """Return why PEFT's format cannot hold such a prompt; None if it can."""
    if isinstance(layout, EmptyLayout):
        return "it has no prompt, and PEFT has no type of adapter without one"
    if isinstance(layout, SoftLayout) and not layout.in_front:
        return "its virtual tokens stand at marks inside the text, but PEFT puts them only before the text"
    if isinstance(layout, PrefixLayout) and len({layer.kind for layer in layout.layers}) > 1:
        return (
            "it is a prefix over an encoder-decoder: PEFT has no prefix for the encoder or for cross-attention, and "
            "its decoder layers share one prefix"
        )
    if isinstance(layout, PrefixLayout) and not _uniform(layout):
        return "the backbone's layers differ in their key/value sizes, and PEFT's prefix format cannot hold that"
    if peft_type not in (PREFIX_TYPES if isinstance(layout, PrefixLayout) else SOFT_TYPES):
        return "PEFT has no type for its method"
    if task_type is None:
        return "it has no task type, and PEFT ignores prompts without one"
    return None


def write_config(layout: Layout, num_virtual_tokens: int, peft_type: str | None) -> dict[str, Any]:
    """Return the fields of ``adapter_config.json`` that describe the prompt, for which `obstacle` must be None."""
    config: dict[str, Any] = {
        "inference_mode": True,
        "peft_version": PEFT_FORMAT,
        "num_virtual_tokens": num_virtual_tokens,
        # 1 for encoder-decoders too: by default PEFT makes two sets of virtual tokens but uses only the encoder's.
        "num_transformer_submodules": 1,
    }
    if isinstance(layout, PrefixLayout):
        first = layout.layers[0]
        width = first.kv_heads * first.key_dim
        config |= {"token_dim": width, "num_attention_heads": first.kv_heads, "num_layers": len(layout.layers)}
        if peft_type == "PREFIX_TUNING":
            config |= {"encoder_hidden_size": width, "prefix_projection": False}
    else:
        # PEFT reads the numbers of heads and layers, which input embeddings do not have, from the backbone.
        config["token_dim"] = layout.width
        if peft_type == "PROMPT_TUNING":
            config["prompt_tuning_init"] = "RANDOM"
        else:
            config["encoder_hidden_size"] = layout.width
    return config


def read_config(config: dict[str, Any]) -> tuple[Layout, int]:
    """Return the layout that ``adapter_config.json`` describes, and its number of virtual tokens.

    The layers of a prefix are returned as decoder layers, because PEFT does not record their kind.

    Raises `UserError` for an adapter that is not a prompt or a prompt that PEFT itself computes wrongly, and
    `KeyError`, `TypeError`, `ValueError` or `ZeroDivisionError` for a damaged configuration.
    """
    kind = config.get("peft_type")
    if kind not in PREFIX_TYPES + SOFT_TYPES:
        supported = ", ".join(PREFIX_TYPES + SOFT_TYPES)
        raise UserError(f"it is a PEFT adapter of type {kind}; ptd reads the types {supported}")
    if config.get("task_type") in WITH_HEAD:
        head, task = WITH_HEAD[config["task_type"]]
        raise UserError(
            f"it is a PEFT adapter of task type {config['task_type']}: PEFT trained the head of transformers' {head} "
            "together with the prompt; ptd's backbones do not have that head, and the prompt is useless without it; "
            f"use the adapter with PEFT, or train again with task.kind: {task} and method.name: p_tuning_v2"
        )
    virtual, width = checked_size(config["num_virtual_tokens"]), checked_size(config["token_dim"])
    if kind in SOFT_TYPES:
        return SoftLayout(width), virtual
    if config.get("task_type") == ENCODER_DECODER:
        raise UserError(
            f"it is a {kind} adapter of an encoder-decoder: PEFT has no prefix for the encoder or for cross-attention, "
            "and its decoder layers share one prefix by mistake; tune a prefix with ptd instead"
        )
    heads, layers = checked_size(config["num_attention_heads"]), checked_size(config["num_layers"])
    if layers > MOST_LAYERS or width % heads:
        raise ValueError(f"num_layers {layers} and token_dim {width} do not fit num_attention_heads {heads}")
    layer = LayerShape(heads, width // heads, width // heads)
    return PrefixLayout((layer,) * layers), virtual


def stored_rows(config: dict[str, Any]) -> int:
    """Return the rows of ``prompt_embeddings``: P, or 2 P for an encoder-decoder, whose second half PEFT never uses.

    Raises the same errors as `read_config`.
    """
    virtual = checked_size(config["num_virtual_tokens"])
    if config["peft_type"] in PREFIX_TYPES:
        return virtual
    encoder_decoder = config.get("task_type") == ENCODER_DECODER
    submodules = config.get("num_transformer_submodules")
    submodules = 1 + encoder_decoder if submodules is None else checked_size(submodules)
    if not 1 <= submodules <= 1 + encoder_decoder:
        raise ValueError(f"num_transformer_submodules {submodules} with task_type {config.get('task_type')}")
    return virtual * submodules


def _uniform(layout: PrefixLayout) -> bool:
    first = layout.layers[0]
    return first.key_dim == first.value_dim and all(layer == first for layer in layout.layers)
