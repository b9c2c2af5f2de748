"""Compare ptd with `sheet.plain` on one family and kind of output: every method in every layout.

The methods are none (of a body: head), prefix, prompt (virtual tokens before the others) and marks (virtual tokens
among the others). The layouts are packed, padded, generated and checkpointed (the gradient, with gradient
checkpointing). A cell is *right* if

- outputs, loss and gradient are within 1e-4 (in units of the right values' root mean square) of those of plain
  transformers on each row by itself,
- a change of a row's last token changes no earlier output, and
- greedy decoding of a batch has the logits of an argmax loop without a cache.

A cell is *refused* if ptd says why it cannot run it; otherwise it is *wrong* or *crashed*.
"""

from __future__ import annotations

import inspect
import sysconfig
from collections.abc import Callable
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_MAPPING

from ptd.backbone.load import checkpoint_layers
from ptd.inject import check_supported
from ptd.types import SoftTokens, UserError
from sheet.attached import Attached
from sheet.cases import P, Rows, distance, draw_prefix, draw_rows, draw_soft, loss_of, misses
from sheet.configs import PAD, base, part, tiny_model
from sheet.plain import SHOWS, NoReference, Plain

INSTALLED = sysconfig.get_path("purelib") + "/"
"""The folder of the installed packages, which is removed from reasons."""
CLOSE = 1e-4
"""The largest difference that counts as right, in units of the right values' root mean square (fp32)."""


def record(method: str, layout: str, outcome: str, reason: str = "", **figures: Any) -> dict[str, Any]:
    found = {"method": method, "layout": layout, "outcome": outcome}
    if reason:
        found["reason"] = " ".join(reason.split()).replace(INSTALLED, "")[:500]
    return found | {name: value for name, value in figures.items() if value is not None}


def measure(model_type: str, kind: str) -> list[dict[str, Any]]:
    """Return the records of all methods and layouts; one record (``*``) if the model cannot be compared."""
    try:
        if kind == "body" and (reason := _no_text(model_type)):
            return [record("*", "*", "no text", reason)]
        model = tiny_model(model_type, kind)
    except Exception as error:
        return [record("*", "*", "not built", f"{type(error).__name__}: {error}")]
    config = model.config
    two = kind == "seq2seq_lm" and config.is_encoder_decoder
    if kind == "masked_lm" and config.is_encoder_decoder:
        return [record("*", "*", "no task", "an encoder-decoder, which runs as seq2seq_lm")]
    try:
        check_supported(type(model), config)
    except UserError as error:
        return [record(*cell, "refused", f"attach: {error}") for cell in cells(kind, two)]
    model = part(model, kind)
    start = getattr(config, "decoder_start_token_id", None)
    rows = draw_rows(two, start if start is not None else PAD)
    try:
        plain = Plain(model, rows)
    except NoReference as error:
        return [record("*", "*", "not built", str(error))]
    except Exception as error:
        return _without_plain(model, rows, kind, f"{type(error).__name__}: {error}")
    if not all(bool(output.isfinite().all()) for output in plain.without):
        return [record("*", "*", "not built", "its plain outputs are not finite")]
    return Comparison(model, plain, rows, kind).records()


def _without_plain(model: Any, rows: Rows, kind: str, why: str) -> list[dict[str, Any]]:
    """Return the records of a model that transformers itself cannot run on a text (it needs an image, say).

    ptd has to refuse such a model.
    """
    where = "attach"
    try:
        attached = Attached(model, kind != "body")
        where = "run"
        attached.outputs(rows, "padded")
    except Exception as error:
        outcome, reason = _failure(error, where)
        reason = f"{reason} [transformers alone: {why}]"
        return [record(*cell, outcome, reason) for cell in cells(kind, rows.sources is not None)]
    return [record("*", "*", "not built", f"its plain forward pass: {why}")]


def cells(kind: str, encoder_decoder: bool) -> list[tuple[str, str]]:
    """Return the (method, layout) pairs of a kind of output."""
    layouts = ["padded"] if encoder_decoder else ["packed", "padded"]
    layouts += ["generated"] if kind in ("causal_lm", "seq2seq_lm") else []
    layouts += ["checkpointed"]
    return [
        (method, layout)
        for method in ("head" if kind == "body" else "none", "prefix", "prompt", "marks")
        for layout in layouts
        if layout != "checkpointed" or method not in ("head", "none")  # nothing in front of the layers to learn
    ]


class Comparison:
    """The comparison of ptd with plain transformers on one model."""

    def __init__(self, model: Any, plain: Plain, rows: Rows, kind: str) -> None:
        self.model, self.plain, self.rows, self.kind = model, plain, rows, kind
        self.language_model = kind != "body"
        self.cells = cells(kind, rows.sources is not None)
        self.generates = "generated" in {layout for _, layout in self.cells}
        self.facts = {"causal": plain.causal, "first_position": plain.first_position}

    def records(self) -> list[dict[str, Any]]:
        try:
            attached = Attached(self.model, self.language_model)
        except Exception as error:
            return [record(method, layout, *_failure(error, "attach")) for method, layout in self.cells]
        attachment = attached.attachment
        self.facts |= {"way": "attention" if attachment.replaces_attention else "cache" if attachment.layers else "own"}
        self.facts |= {"one_length": attachment.verdict.left is not None}
        if not attachment.replaces_attention:
            self.plain.give_prefix_by_cache()
        found, known = [], {}
        for method in dict(self.cells):
            places = [layout for name, layout in self.cells if name == method]
            refused = self._refusal(attached, method)
            if refused is not None:
                found += [record(method, layout, "refused", f"run: {refused}") for layout in places]
                continue
            try:
                known[method] = self._right(method, attached)
            except NoReference as error:
                found += [record(method, layout, "no reference", str(error)) for layout in places]
                continue
            found += [
                self._cell(attached, method, layout, *known[method]) for layout in places if layout != "checkpointed"
            ]
        return found + self._checkpointed(attached, known)

    def _refusal(self, attached: Attached, method: str) -> UserError | None:
        """Return ptd's refusal of a method on this model, before any row runs."""
        attachment = attached.attachment
        try:
            if method == "prefix":
                attachment.shape.prefix_layers()
            elif method in ("prompt", "marks"):
                attachment.set(SoftTokens(torch.zeros(P, attachment.shape.input_size), method == "prompt"))
        except UserError as error:
            return error
        finally:
            attachment.set(None)
        return None

    def _checkpointed(self, attached: Attached, known: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the cells with gradient checkpointing, which stays on."""
        methods = [method for method, layout in self.cells if layout == "checkpointed" and method in known]
        try:
            checkpoint_layers(self.model)
        except Exception as error:
            return [record(method, "checkpointed", *_failure(error, "run")) for method in methods]
        for stack in attached.attachment.stacks:  # a run checkpoints the layers before ptd hooks them
            stack.unhook()
            stack.hook()
        return [self._cell(attached, method, "checkpointed", *known[method]) for method in methods]

    def _right(self, method: str, attached: Attached) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the prompt and the right values: outputs of each row, loss, gradient of the loss, tokens written."""
        plain = self.plain
        prompt: dict[str, Any] = {}
        rows = self.rows.marked() if method == "marks" else self.rows
        right: dict[str, Any] = {"rows": rows, "in_front": method != "marks"}
        if method == "prefix":
            if plain.why_no_prefix:
                raise NoReference(plain.why_no_prefix)
            prompt = {"prefix": draw_prefix(plain.shapes)}
            if not plain.by_cache:
                right["by_cache"] = plain.prefix_by_cache(prompt["prefix"], _window(self.model.config))
        elif method in ("prompt", "marks"):
            prompt = {"soft": draw_soft(attached.attachment.shape.input_size)}
        leaves = _leaves(prompt)
        for leaf in leaves:
            leaf.requires_grad_(True)
        try:
            outputs = [plain.run(row, rows=rows, **prompt) for row in range(len(rows.ids))]
        except Exception as error:
            raise NoReference(f"{type(error).__name__}: {error}") from error
        if leaves and not outputs[0].requires_grad:
            raise NoReference("the prompt does not reach the outputs")
        if leaves:
            moved = max(distance(*pair) for pair in zip(outputs, plain.without, strict=True))
            if moved < SHOWS:
                raise NoReference(f"the prompt moves the outputs by {moved:.1g} only")
        loss = sum((loss_of(row, output, self.language_model) for row, output in enumerate(outputs)), torch.zeros(()))
        right |= {"outputs": [output.detach() for output in outputs], "loss": loss.detach()}
        if leaves:
            right["gradient"] = _flat(torch.autograd.grad(loss, leaves, materialize_grads=True))
        for leaf in leaves:
            leaf.requires_grad_(False)
        if self.generates and (plain.causal or rows.sources is not None):
            right["written"] = [plain.greedy(row, rows, _eos(self.model), **prompt) for row in (0, 1)]
        return prompt, right

    def _cell(
        self, attached: Attached, method: str, layout: str, prompt: dict[str, Any], right: dict[str, Any]
    ) -> dict[str, Any]:
        figures = {**(self.facts if not prompt else {}), "by_cache": right.get("by_cache")}
        if layout == "packed" and not attached.attachment.packable:
            return record(method, layout, "runs padded")
        if layout == "generated" and "written" not in right:
            return record(method, layout, "no reference", "it looks both ways: what it reads changes with each token")
        try:
            attached.give(prompt, in_front=right["in_front"])
            compare: Callable[..., dict[str, Any]] = self._written if layout == "generated" else self._values
            as_run = layout if layout != "checkpointed" else "packed" if attached.attachment.packable else "padded"
            figures |= compare(attached, as_run, prompt, right)
        except Exception as error:
            return record(method, layout, *_failure(error, "run"), **figures)
        finally:
            attached.give({})
        wrong = figures.pop("wrong", "")
        return record(method, layout, "wrong" if wrong else "right", wrong, **figures)

    def _values(self, attached: Attached, layout: str, prompt: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
        got = attached.outputs(right["rows"], layout)
        errors = [distance(*pair) for pair in zip(got, right["outputs"], strict=True)]
        wrong = []
        if not max(errors) < CLOSE:
            wrong.append(f"outputs differ by {', '.join(f'{error:.2g}' for error in errors)} (rows)")
        if self.plain.causal:
            moved = attached.outputs(right["rows"].changed_last(), layout)
            future = max(distance(new[:-1], old[:-1]) for new, old in zip(moved, got, strict=True))
            if not future < CLOSE:
                wrong.append(f"another last token moves earlier outputs by {future:.2g}")
        leaves = _leaves(prompt)
        for leaf in leaves:
            leaf.requires_grad_(True)
        attached.give(prompt, in_front=right["in_front"])
        with torch.set_grad_enabled(bool(leaves)):
            loss = attached.loss(right["rows"], layout)
        errors.append(distance(loss.detach(), right["loss"]))
        if not errors[-1] < CLOSE:
            wrong.append(f"the loss differs by {errors[-1]:.2g}")
        if leaves:
            gradient = _flat(torch.autograd.grad(loss, leaves, materialize_grads=True))
            errors.append(distance(gradient, right["gradient"]))
            if not errors[-1] < CLOSE:
                wrong.append(f"the gradient differs by {errors[-1]:.2g}")
        for leaf in leaves:
            leaf.requires_grad_(False)
        return {"error": max(errors), "wrong": "; ".join(wrong)}

    def _written(
        self, attached: Attached, layout: str, prompt: dict[str, Any], right: dict[str, Any]
    ) -> dict[str, Any]:
        got = attached.generated(right["rows"], [0, 1], _eos(self.model))
        wrong = misses(got, right["written"], CLOSE)
        if wrong and not prompt:
            try:
                plain = self.plain.generated(_eos(self.model))
                wrong += "; transformers alone: " + (
                    "wrong, too" if misses(plain, right["written"], CLOSE) else "right"
                )
            except Exception as error:
                wrong += f"; transformers alone: {type(error).__name__}"
        return {"wrong": wrong}


def _failure(error: Exception, where: str) -> tuple[str, str]:
    if isinstance(error, UserError):
        return "refused", f"{where}: {error}"
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    place = "" if last is None else f" ({last.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{last.tb_lineno})"
    return "crashed", f"{where}: {type(error).__name__}: {error}"[:250] + place


def _leaves(prompt: dict[str, Any]) -> list[torch.Tensor]:
    if "soft" in prompt:
        return [prompt["soft"]]
    return [tensor for pair in prompt.get("prefix", ()) for tensor in pair]


def _flat(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _eos(model: Any) -> int | None:
    eos = model.generation_config.eos_token_id
    return eos[0] if isinstance(eos, list) else eos


def _window(config: Any) -> int | None:
    text = vars(config.get_text_config())
    windows = [text.get(name) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return min((window for window in windows if isinstance(window, int)), default=None)


def _no_text(model_type: str) -> str:
    model_class = MODEL_MAPPING[CONFIG_MAPPING[base(model_type)]]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    takes = inspect.signature(model_class.forward).parameters
    return "" if "input_ids" in takes else f"{model_class.__name__} takes {', '.join(list(takes)[1:4])}"
