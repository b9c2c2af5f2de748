"""The tables of an inspection, which the terminal and the HTML page show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PageSection:
    """A part of the result: its explanation, its table, and the figures that may belong to it."""

    name: str
    title: str
    text: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    figures: tuple[str, ...] = ()


def headline(found: dict[str, Any]) -> str:
    """Return one line on the prompt that was inspected."""
    method = found["method"] or found["peft_type"] or "prompt"
    on = f", for {found['backbone']}" if found["backbone"] else ""
    count, numbers = found["num_virtual_tokens"], found["parameters"]
    return f"{method}: {count} virtual tokens, {numbers:,} numbers, {found['prompt']}{on}"


def sections(found: dict[str, Any]) -> list[PageSection]:
    """Return all parts that were measured."""
    parts = [_tensors(found)]
    if found["nearest"] is not None:
        parts.append(_nearest(found["nearest"]))
    if found["data"] is not None:
        parts = [_keep(found), _tokens(found), _attention(found), *parts]
    return parts


def _tensors(found: dict[str, Any]) -> PageSection:
    own = {layer["layer"]: layer["own_norms"] for layer in found.get("attention", ())}
    prefixed = any(each["part"] in next(iter(own.values()), {}) for each in found["tensors"])
    rows = []
    for each in found["tensors"]:
        text = [f"{own[each['layer']][each['part']]:#.3g}"] if prefixed else []
        figures = (f"{each['norm']:#.3g}", *text, f"{each['effective_rank']:.1f}", f"{each['rank_90']}")
        rows.append((each["layer"], each["part"], *figures))
    return PageSection(
        "prompt",
        "The prompt by itself",
        "Norm: Euclidean norm of a head's vector, mean over virtual tokens and heads. Effective rank: exp of the "
        "entropy of the singular values. 90 %: how many of the largest singular values hold 90 % of the energy. A rank "
        "far below the number of virtual tokens means that the tokens are redundant.",
        ("layer", "part", "norm", *(["norm in the text"] if prefixed else []), "effective rank", "90 %"),
        tuple(rows),
        ("norms", "ranks", "spectrum"),
    )


def _nearest(nearest: Sequence[dict[str, Any]]) -> PageSection:
    return PageSection(
        "nearest",
        "Nearest vocabulary tokens",
        "By cosine with the backbone's input embeddings. Cosines far below 1 mean that a virtual token is no word.",
        ("virtual token", "norm", "nearest (cosine)"),
        tuple(
            (
                str(each["token"]),
                f"{each['norm']:#.3g}",
                "   ".join(f"{near['token']!r} {near['cosine']:.2f}" for near in each["near"]),
            )
            for each in nearest
        ),
    )


def _attention(found: dict[str, Any]) -> PageSection:
    rows = []
    for layer in found["attention"]:
        cells = [layer["layer"]]
        for name in ("all", "supervised"):
            heads = layer[name]
            cells += ["–", "–"] if heads is None else [_percent(sum(heads) / len(heads)), _percent(max(heads))]
        rows.append(tuple(cells))
    return PageSection(
        "attention",
        "Share of attention on the prompt",
        "The part of a query's attention probability that goes to virtual tokens: mean over queries and heads, and "
        "mean over queries in the head with the largest share. –: the layer's keys include no virtual token, or its "
        "queries include no supervised position.",
        ("layer", "all own tokens", "top head", "supervised positions", "top head"),
        tuple(rows),
        ("attention", "attention_supervised"),
    )


def _tokens(found: dict[str, Any]) -> PageSection:
    ranked = sorted(found["tokens"], key=lambda each: each["rank"])
    return PageSection(
        "tokens",
        "Without each virtual token",
        "Change of the loss when no layer attends to the token and nothing else changes; the most useful token first. "
        "Attention: the token's share, mean over queries, heads and layers.",
        ("virtual token", "loss (nats)", "attention"),
        tuple((str(each["token"]), f"{each['loss_change']:+.4f}", _percent(each["attention"])) for each in ranked),
        ("tokens",),
    )


def _keep(found: dict[str, Any]) -> PageSection:
    loss, count = found["loss"], found["num_virtual_tokens"]
    if found["enough"] is None:
        verdict = "On these rows the prompt does not lower the loss."
    else:
        verdict = (
            f"The {found['enough']} most useful of {count} tokens keep 95 % of the prompt's gain in loss "
            f"({loss['none']:.4f} → {loss['whole']:.4f} nats)."
        )
        best = min(found["keep"], key=lambda point: point["loss"])
        if best["loss"] < loss["whole"] - 0.05 * (loss["none"] - loss["whole"]):
            verdict += f" With {best['tokens']} tokens the loss ({best['loss']:.4f}) is lower than with all tokens."
        if found["enough"] > 0.75 * count:
            verdict += " It may be worth trying more tokens."
        elif found["enough"] <= 0.5 * count:
            verdict += " Fewer tokens may be enough: tune again with that number and compare."
    return PageSection(
        "needed",
        "How many virtual tokens are needed",
        f"{verdict} Measured on {found['data']['rows']:,} of {found['data']['rows_in_file']:,} rows of "
        f"{found['data']['file']}, {loss['supervised_tokens']:,} supervised positions. The smaller prompts were not "
        "tuned again.",
        ("tokens kept", "loss (nats)"),
        tuple((str(point["tokens"]), f"{point['loss']:.4f}") for point in found["keep"]),
        ("keep",),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
