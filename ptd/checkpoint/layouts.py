"""Write and read a prompt's layout (the entry ``prompt`` of ptd.json), and check that it fits a backbone."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

from ptd.types import AttentionKind, BackboneShape, EmptyLayout, LayerShape, PrefixLayout, SoftLayout

Layout = PrefixLayout | SoftLayout | EmptyLayout


def write_layout(layout: Layout, num_virtual_tokens: int) -> dict[str, Any]:
    """Return the layout as JSON values; `read_layout` reads them."""
    match layout:
        case PrefixLayout():
            layers = [[layer.kv_heads, layer.key_dim, layer.value_dim, layer.kind] for layer in layout.layers]
            return {"kind": "prefix_kv", "num_virtual_tokens": num_virtual_tokens, "layers": layers}
        case SoftLayout():
            settings = {"hidden_size": layout.hidden_size, "in_front": layout.in_front}
            return {"kind": "soft_tokens", "num_virtual_tokens": num_virtual_tokens, **settings}
    return {"kind": "none"}


def read_layout(prompt: Any) -> tuple[Layout, int]:
    """Return the layout and its number of virtual tokens. Raises `KeyError`, `TypeError` or `ValueError` if damaged."""
    if prompt["kind"] == "none":
        return EmptyLayout(), 0
    virtual = checked_size(prompt["num_virtual_tokens"])
    if prompt["kind"] == "soft_tokens":
        if not isinstance(prompt["in_front"], bool):
            raise TypeError(prompt)
        return SoftLayout(checked_size(prompt["hidden_size"]), prompt["in_front"]), virtual
    layers = [
        LayerShape(checked_size(heads), checked_size(key), checked_size(value), kind)
        for heads, key, value, kind in prompt["layers"]
    ]
    if prompt["kind"] != "prefix_kv" or any(layer.kind not in get_args(AttentionKind) for layer in layers):
        raise ValueError(prompt)
    return PrefixLayout(tuple(layers)), virtual


def checked_size(value: Any) -> int:
    """Return a size unchanged; raise `TypeError` or `ValueError` unless it is an integer above 0 and below 2³¹."""
    if type(value) is not int:
        raise TypeError(f"{value!r:.60} is not an integer")
    if not 0 < value < 2**31:
        raise ValueError(f"{value:.6g} is not a valid size")
    return value


def misfit(layout: Layout, shape: BackboneShape, *, kinds: bool) -> tuple[str, str] | None:
    """Describe what the prompt needs of a backbone and what this backbone has; return None if they agree.

    Without ``kinds`` (PEFT does not record them), a prefix fits any decoder or encoder with layers of its sizes.
    """
    match layout:
        case PrefixLayout():
            known = kinds or len({layer.kind for layer in shape.layers}) > 1
            if [_size(layer, known) for layer in layout.layers] != [_size(layer, known) for layer in shape.layers]:
                return _describe(layout.layers, known), _describe(shape.layers, known)
        case SoftLayout() if layout.hidden_size != shape.input_size:
            return f"input embeddings of size {layout.hidden_size}", f"input embeddings of size {shape.input_size}"
    return None


def _size(layer: LayerShape, kind: bool) -> str:
    head = f"{layer.key_dim}" if layer.key_dim == layer.value_dim else f"{layer.key_dim}/{layer.value_dim}"
    return f"{layer.kind + ' ' if kind else ''}layers of {layer.kv_heads} kv heads × {head}"


def _describe(layers: tuple[LayerShape, ...], kind: bool) -> str:
    sizes = Counter(_size(layer, kind) for layer in layers)
    return ", ".join(f"{count} {size}" for size, count in sizes.items())
