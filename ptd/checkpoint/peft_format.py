"""PEFT's words for a prompt: what its adapter format can say, written and read.

``adapter_model.safetensors`` holds one tensor, ``prompt_embeddings``:

===============================  =======================================================================
PREFIX_TUNING, CARTRIDGE         ``[P, L·2·token_dim]``: columns layer-major, keys before values, then kv
                                 head, then head dimension; ``token_dim`` = kv heads × head dimension
PROMPT_TUNING, P_TUNING          ``[P · num_transformer_submodules, hidden]``: what a re-parameterisation
                                 put out, never its parameters
===============================  =======================================================================
"""

from __future__ import annotations

from typing import Any

from ptd.checkpoint.layouts import Layout, whole
from ptd.types import EmptyLayout, LayerShape, PrefixLayout, SoftLayout, UserError

PREFIX_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
SOFT_TYPES = ("PROMPT_TUNING", "P_TUNING")
ENCODER_DECODER = "SEQ_2_SEQ_LM"
WITH_HEAD = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token_classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question_answering"),
}
"""PEFT's task types that train a head of one of transformers' classes; ptd's kind of that task."""
MOST_LAYERS = 10_000
"""Far more than any backbone has, and few enough to be listed."""
PEFT_FORMAT = "0.21.2"
"""The PEFT version whose format is written and tested."""


def obstacle(layout: Layout, peft_type: str | None, task_type: str | None) -> str | None:
    """Why PEFT's format cannot hold such a prompt; None if it can."""
    if isinstance(layout, EmptyLayout):
        return "it has no prompt, and PEFT has no type for such an adapter"
    if isinstance(layout, SoftLayout) and not layout.in_front:
        return "its virtual tokens stand at marks inside the text, and PEFT puts them in front only"
    if isinstance(layout, PrefixLayout) and len({layer.kind for layer in layout.layers}) > 1:
        return (
            "it is a prefix over an encoder-decoder, to which PEFT gives no encoder and no cross-attention prefix, and "
            "layers of the decoder share theirs"
        )
    if isinstance(layout, PrefixLayout) and not _uniform(layout):
        return "the backbone's layers differ in their key/value sizes, and PEFT's prefix format cannot hold that"
    if peft_type not in (PREFIX_TYPES if isinstance(layout, PrefixLayout) else SOFT_TYPES):
        return "PEFT has no type for its method"
    if task_type is None:
        return "it has no task type, and PEFT ignores prompts without one"
    return None


def write_config(layout: Layout, num_virtual_tokens: int, peft_type: str | None) -> dict[str, Any]:
    """The fields of ``adapter_config.json`` that describe a prompt `obstacle` has nothing against."""
    config: dict[str, Any] = {
        "inference_mode": True,
        "peft_version": PEFT_FORMAT,
        "num_virtual_tokens": num_virtual_tokens,
        # 1 for encoder-decoders too: of the two sets PEFT makes by default, it uses the encoder's alone.
        "num_transformer_submodules": 1,
    }
    if isinstance(layout, PrefixLayout):
        first = layout.layers[0]
        width = first.kv_heads * first.key_dim
        config |= {"token_dim": width, "num_attention_heads": first.kv_heads, "num_layers": len(layout.layers)}
        if peft_type == "PREFIX_TUNING":
            config |= {"encoder_hidden_size": width, "prefix_projection": False}
    else:
        # PEFT takes the numbers of heads and layers, which input embeddings do not have, from the backbone.
        config["token_dim"] = layout.width
        if peft_type == "PROMPT_TUNING":
            config["prompt_tuning_init"] = "RANDOM"
        else:
            config["encoder_hidden_size"] = layout.width
    return config


def read_config(config: dict[str, Any]) -> tuple[Layout, int]:
    """The layout that ``adapter_config.json`` describes and its number of virtual tokens.

    A prefix's layers are given as a decoder's: PEFT does not say what they are.

    Raises `UserError` for an adapter that is no prompt, or a prompt that PEFT itself gets wrong; `KeyError`,
    `TypeError`, `ValueError` or `ZeroDivisionError` for a damaged configuration.
    """
    kind = config.get("peft_type")
    if kind not in PREFIX_TYPES + SOFT_TYPES:
        supported = ", ".join(PREFIX_TYPES + SOFT_TYPES)
        raise UserError(f"it is a PEFT adapter of type {kind}; supported: {supported}")
    if config.get("task_type") in WITH_HEAD:
        head, task = WITH_HEAD[config["task_type"]]
        raise UserError(
            f"it is a PEFT adapter of task type {config['task_type']}: beside the prompt PEFT trains the head of "
            f"transformers' {head}, which ptd's backbones do not have, and the prompt answers nothing without it; use "
            f"the adapter with PEFT, or train anew with task.kind: {task} and method.name: p_tuning_v2"
        )
    virtual, width = whole(config["num_virtual_tokens"]), whole(config["token_dim"])
    if kind in SOFT_TYPES:
        return SoftLayout(width), virtual
    if config.get("task_type") == ENCODER_DECODER:
        raise UserError(
            f"it is a {kind} adapter of an encoder-decoder, to which PEFT gives no encoder and no cross-attention "
            "prefix, and layers of the decoder share theirs by mistake; tune a prefix with ptd instead"
        )
    heads, layers = whole(config["num_attention_heads"]), whole(config["num_layers"])
    if layers > MOST_LAYERS or width % heads:
        raise ValueError(f"{layers} layers with {width} numbers for {heads} heads")
    layer = LayerShape(heads, width // heads, width // heads)
    return PrefixLayout((layer,) * layers), virtual


def stored_rows(config: dict[str, Any]) -> int:
    """Rows of ``prompt_embeddings``: P, or 2 P for an encoder-decoder whose second half PEFT stores and never uses.

    Raises as `read_config` does.
    """
    virtual = whole(config["num_virtual_tokens"])
    if config["peft_type"] in PREFIX_TYPES:
        return virtual
    encoder_decoder = config.get("task_type") == ENCODER_DECODER
    submodules = config.get("num_transformer_submodules")
    submodules = 1 + encoder_decoder if submodules is None else whole(submodules)
    if not 1 <= submodules <= 1 + encoder_decoder:
        raise ValueError(f"num_transformer_submodules {submodules} with task_type {config.get('task_type')}")
    return virtual * submodules


def _uniform(layout: PrefixLayout) -> bool:
    first = layout.layers[0]
    return first.key_dim == first.value_dim and all(layer == first for layer in layout.layers)
