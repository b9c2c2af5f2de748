"""Whether a model computes the same with ptd's attention as with its own, tried on two short rows when ptd attaches.

Families differ in what they do with masks, positions and the boundaries of packed rows, and nothing in a model's class
says so. The rows run alone through the model as it came; what they give there has to come out again

- in a padded batch, with the last token of a row changed: no earlier token may notice (causal models);
- padded on the left, as generation has it;
- packed;
- with their first two tokens as soft tokens, and as a prefix of the keys and values that these two have.

Only as many layers run as there are kinds of layers (two at least), so that it costs little; under ZeRO-3 every rank
has to take part.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import DynamicCache, PreTrainedModel

from ptd.inject.attention import Call
from ptd.inject.probe import ordinary_tokens, packing_obstacle
from ptd.types import Batch, SoftTokens, UserError

if TYPE_CHECKING:
    from ptd.inject.attach import Attachment

SHARED = 2
"""First tokens that the rows have in common: they become the prompt."""
ALLOWED = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2}
"""How far a token's hidden state may be from what it was alone, of its size, after a few layers; half precision and
8 bits lose more than a hundredth of it to rounding."""
ALLOWED_ELSE = 0.1


@dataclass(frozen=True)
class Verdict:
    """What a model cannot do, each with the reason; None: it can.

    ``packed``: rows of a packed batch stay apart. ``left``: rows padded on the left are what they are alone.
    ``soft``: virtual tokens before the sequences. ``prefix``: keys and values in every layer.
    """

    packed: str | None = None
    left: str | None = None
    soft: str | None = None
    prefix: str | None = None


@dataclass(frozen=True)
class _Row:
    """A sequence (of an encoder-decoder: its encoder's, and a ``target``), and what the model makes of it alone."""

    tokens: list[int]
    target: list[int] | None = None


class SelfCheck:
    """`read_plain` with the model's own attention, then `run` with ptd's in place."""

    def __init__(self, attachment: Attachment, calls: list[Call]) -> None:
        self.attachment, self.model, self.calls = attachment, attachment.model, calls
        self.two = len(attachment.stacks) == 2
        self.causal = self.two or all(call.causal for call in calls)
        parameter = next(self.model.parameters())
        self.device, dtype = parameter.device, self.model.dtype
        quantised = getattr(self.model, "is_quantized", False)
        self.allowed = ALLOWED_ELSE if quantised else ALLOWED.get(dtype, ALLOWED_ELSE)
        self.blank = isinstance(parameter, FakeTensor)
        self.sharded = hasattr(parameter, "ds_id")
        # Of a model that is sharded, or whose layers are not in a list, all layers run.
        self.lists = [] if self.blank else _enough(self.model, calls)
        vocabulary = getattr(attachment.stacks[0].embeddings, "num_embeddings", self.model.config.vocab_size)
        t = ordinary_tokens(self.model.config.get_text_config(), vocabulary, 12)
        long, short, other = t[:5], [*t[:SHARED], t[5]], [*t[:4], t[6]]
        if self.two:
            self.rows = [_Row(long, t[7:11]), _Row(short, t[8:10]), _Row(long, [*t[7:10], t[11]])]
        else:
            self.rows = [_Row(long), _Row(short), _Row(other)]
        self.plain: list[Tensor] = []
        self.embedded: Tensor | None = None
        self.cached: list[tuple[Tensor, Tensor]] = []

    def read_plain(self) -> None:
        """What the model makes of each row alone. Raises `UserError` if it cannot run one."""
        if self.blank:
            return
        with self._quietly():
            try:
                with _shorter(self.lists):
                    self._read_plain()
            except Exception:  # a model may count its layers some other way
                if not self.lists:
                    raise
                self.lists = []
                self._read_plain()

    def _read_plain(self) -> None:
        seen: list[Tensor] = []
        embeddings: nn.Module = self.attachment.stacks[0].embeddings
        hook = embeddings.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            self.plain = [self._hidden(self.model, self._alone(row))[0] for row in self.rows[:2]]
        finally:
            hook.remove()
        self.embedded = seen[0][0, :SHARED].float() if seen and seen[0].dim() == 3 else None
        if self.causal and not self.two:
            self.cached = self._read_cache()

    def _read_cache(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the first tokens in every layer that runs; empty: it keeps none, or other ones."""
        cache = DynamicCache()
        options = {"past_key_values": cache, "use_cache": True}
        if not options.keys() <= set(inspect.signature(self.model.forward).parameters):
            return []
        tokens = torch.tensor([self.rows[0].tokens[:SHARED]], device=self.device)
        self.model(input_ids=tokens, **options)
        found = []
        for call, layer in zip(self.calls, cache.layers, strict=False):
            key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
            if not isinstance(key, Tensor) or not isinstance(value, Tensor) or not key.numel():
                return []
            if (*key.shape[1:], value.shape[-1]) != (call.kv_heads, SHARED, call.key_dim, call.value_dim):
                return []
            found.append((key[0].transpose(0, 1), value[0].transpose(0, 1)))
        return found

    def run(self) -> Verdict:
        """Raises `UserError` for a model that computes something else even in a padded batch."""
        with self._quietly(), _shorter(self.lists):
            packed = self._packing_obstacle()
            self.attachment.verdict = Verdict(packed)  # which decides how batches run
            if not self.blank:
                self._padded()
            if packed is None:
                packed = self._packed()
            if self.blank:
                return Verdict(packed)
            if packed is not None and self.attachment.packable:
                self.attachment.verdict = Verdict(packed)
                self._padded()
            return Verdict(packed, self._left(), self._soft(packed=packed is None), self._prefix())

    # ---- the passes

    def _padded(self) -> None:
        """Also finds what the model's own positions start from, where it takes positions."""
        reader = self.attachment.stacks[0]
        pad = getattr(self.model.config, "pad_token_id", None)
        tried = [reader.first_position]
        if reader.takes_positions and not self.two:
            tried += [0, 1, 2, *([pad + 1] if isinstance(pad, int) and pad >= 0 else [])]
        errors = []
        for first in dict.fromkeys(tried):
            reader.first_position = first
            try:
                errors.append(self._apart(self._run(self._batch(self.rows), learning=True)))
            except IndexError:  # there are no such positions
                errors.append(float("inf"))
            if errors[-1] <= self.allowed:
                return
        raise UserError(
            f"backbone.path: {type(self.model).__name__} does not compute with ptd's attention what it computes with "
            f"its own: two short rows come out {errors[0]:.0%} apart, so a prompt would be trained on another model. "
            "Use a backbone of another family"
        )

    def _packing_obstacle(self) -> str | None:
        if self.two or not self.attachment.stacks[0].takes_positions:
            return "it takes no positions that could start again in each row"
        if any(not call.causal and call.window is not None for call in self.calls):
            return "its layers look through a window both ways"
        for call in self.calls:
            obstacle = packing_obstacle(call)
            if obstacle is not None:
                return f"{type(call.module).__name__} {obstacle}"
        return None

    def _packed(self) -> str | None:
        try:
            hidden = self._run(self._batch(self.rows, packed=True))
        except (UserError, TypeError) as error:
            return str(error)
        return None if self.blank else self._said(self._apart(hidden), "of rows that are packed")

    def _left(self) -> str | None:
        if self.two or not self.causal:
            return None
        rows = self.rows[:2]
        width = len(rows[0].tokens)
        pads = [width - len(row.tokens) for row in rows]
        ids = [[row.tokens[0]] * pad + row.tokens for row, pad in zip(rows, pads, strict=True)]
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=self.device)
        inputs: dict[str, Any] = {"input_ids": torch.tensor(ids, device=self.device), "attention_mask": mask}
        if "position_ids" in inspect.signature(self.model.forward).parameters:  # as transformers' generate has them
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) + self.attachment.first_position
        hidden = self._hidden(self.model, inputs)
        return self._said(self._apart([hidden[row, pad:] for row, pad in enumerate(pads)]), "padded on the left")

    def _soft(self, *, packed: bool) -> str | None:
        if self.embedded is None:
            return "its embedding layer puts out something other than one vector per token"
        rows = [_Row(row.tokens[SHARED:], row.target) for row in self.rows]
        self.attachment.set(SoftTokens(self.embedded, in_front=True))
        try:
            layouts = [False, True] if packed else [False]
            errors = [self._apart(self._run(self._batch(rows, packed=each)), skip=SHARED) for each in layouts]
        except Exception as error:  # families do as they like with tokens they cannot look up
            return f"a pass with them ends in {type(error).__name__}: {error}"
        finally:
            self.attachment.set(None)
        return self._said(max(errors), "whose first tokens are given as embeddings")

    def _prefix(self) -> str | None:
        if not self.cached:  # nothing to compare with: an encoder's keys depend on what follows
            return None
        attachment, rows = self.attachment, [_Row(row.tokens[SHARED:]) for row in self.rows]
        attachment.shift(SHARED)
        for slot, (key, value) in zip(attachment.slots, self.cached, strict=False):
            slot.key, slot.value = key, value
        try:
            return self._said(
                self._apart(self._run(self._batch(rows)), skip=SHARED), "whose first tokens are given as a prefix"
            )
        finally:
            attachment.set(None)

    # ---- how they are run and compared

    def _batch(self, rows: list[_Row], *, packed: bool = False) -> Batch:
        """The rows as a run lays them out: padded on the right, or packed."""
        if self.two:
            return _laid_out([row.target or [] for row in rows], self.device, source=[row.tokens for row in rows])
        return _laid_out([row.tokens for row in rows], self.device, packed=packed)

    def _alone(self, row: _Row) -> dict[str, Any]:
        inputs = {"input_ids": torch.tensor([row.tokens], device=self.device)}
        if row.target is not None:
            inputs["decoder_input_ids"] = torch.tensor([row.target], device=self.device)
        return inputs

    def _run(self, batch: Batch, *, learning: bool = False) -> list[Tensor]:
        """The last hidden states of each row, ``[length, hidden]``.

        ``learning``: as in training, in a pass that records gradients, which shows masks that are learned through.
        """
        hidden = self._hidden(self.attachment.run, batch, learning=learning and not self.sharded)
        hidden = hidden.flatten(0, 1)
        starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
        return [hidden[start : start + length] for start, length in zip(starts, lengths, strict=True)]

    def _hidden(self, run: Callable[..., Any], inputs: Any, *, learning: bool = False) -> Tensor:
        """What the last stack puts out, in one pass."""
        seen: list[Tensor] = []
        hooks = [self.attachment.stacks[-1].module.register_forward_hook(lambda *given: seen.append(given[-1][0]))]
        if learning:
            embeddings: nn.Module = self.attachment.stacks[0].embeddings
            hooks.append(embeddings.register_forward_hook(lambda *given: given[-1].detach().requires_grad_() * 1))
        try:
            with torch.set_grad_enabled(learning):
                run(**inputs) if isinstance(inputs, dict) else run(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return seen[-1].detach().float()

    def _apart(self, found: list[Tensor], *, skip: int = 0) -> float:
        """The largest distance of a token from what the row is alone, of the tokens' mean size.

        The third row is the first with another last token, which in a causal model the others do not see.
        """
        wants = [*self.plain, self.plain[0][:-1]] if self.causal else self.plain
        errors = []
        for want, got in zip(wants, found, strict=False):
            want = want if self.two else want[skip:]
            apart = (got[: len(want)] - want).norm(dim=-1) / want.norm(dim=-1).mean()
            errors.append(apart.max().item() if bool(apart.isfinite().all()) else float("inf"))
        return max(errors)

    def _said(self, error: float, what: str) -> str | None:
        if error <= self.allowed:
            return None
        return f"short rows {what} come out {error:.0%} apart from what {type(self.model).__name__} makes of them alone"

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Without dropout."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True


def _laid_out(
    rows: list[list[int]], device: torch.device, *, packed: bool = False, source: list[list[int]] | None = None
) -> Batch:
    lengths = torch.tensor([len(row) for row in rows], device=device)
    longest = max(map(len, rows))
    if packed:
        ids = torch.tensor([sum(rows, [])], device=device)
        positions = torch.cat([torch.arange(len(row), device=device) for row in rows])[None]
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    else:
        ids = torch.tensor([[*row, *([row[0]] * (longest - len(row)))] for row in rows], device=device)
        positions, bounds = torch.arange(longest, device=device).expand(len(rows), -1), None
    return Batch(
        input_ids=ids,
        labels=torch.full_like(ids, -100),
        position_ids=positions,
        cu_seqlens=bounds,
        max_seqlen=longest,
        tokens=ids.numel(),
        supervised_tokens=0,
        lengths=lengths,
        rows=tuple(range(len(rows))),
        source=None if source is None else _laid_out(source, device),
    )


@dataclass(frozen=True)
class _Layers:
    """A list of layers in its parent, and how many of them are enough."""

    parent: nn.Module
    name: str
    enough: int


def _enough(model: PreTrainedModel, calls: list[Call]) -> list[_Layers]:
    """For each outermost list of layers with attention: up to where every kind of layer has come, and two at least."""
    call_of = {call.module: call for call in calls}
    found: list[_Layers] = []
    inside: set[nn.Module] = set()
    for parent in model.modules():
        for name, child in parent.named_children():
            if not isinstance(child, nn.ModuleList) or child in inside:
                continue
            kinds = [_kind(layer, call_of) for layer in child]
            if not all(attends for _, attends in kinds):
                continue
            inside |= set(child.modules())
            enough = max(2, 1 + max(kinds.index(kind) for kind in kinds))
            if enough < len(child):
                found.append(_Layers(parent, name, enough))
    return found


def _kind(layer: nn.Module, call_of: dict[nn.Module, Call]) -> tuple[Any, tuple[Any, ...]]:
    """What a layer consists of, and what its attention is like."""
    modules = list(layer.modules())
    attends = [call_of[module] for module in modules if module in call_of]
    rules = tuple((call.causal, call.window, call.kv_heads, call.key_dim, call.value_dim) for call in attends)
    return tuple(type(module) for module in modules), rules


@contextmanager
def _shorter(lists: list[_Layers]) -> Iterator[None]:
    """The model with only the first layers of each list."""
    whole = [getattr(each.parent, each.name) for each in lists]
    try:
        for each, layers in zip(lists, whole, strict=True):
            setattr(each.parent, each.name, nn.ModuleList(list(layers)[: each.enough]))
        yield
    finally:
        for each, layers in zip(lists, whole, strict=True):
            setattr(each.parent, each.name, layers)
