"""Check on two short rows, when ptd attaches, that a model computes the same with ptd's attention as with its own.

Families differ in how they treat masks, positions and the boundaries of packed rows, and a model's class does not tell
how. Each row first runs alone through the model with the family's own attention code. The same hidden states have to
result when the rows run

- in a padded batch, together with a row whose last token is changed: no earlier token may change (causal models);
- padded on the left, as in generation;
- packed;
- with their first two tokens as soft tokens, and with the keys and values of these two tokens as a prefix.

A model that keeps its own attention code is checked in the same way, but not packed, and also in two passes with a
cache, as in generation. The check is cheap, because only as many layers run as there are kinds of layers
(`ptd.inject.shortened`). Under ZeRO-3 every rank has to take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers import DynamicCache

from ptd.inject.attention import Call
from ptd.inject.kernel_check import check_kernels
from ptd.inject.model_cache import window_of
from ptd.inject.probe import RECURRENT, SOFTMAX, layer_types, ordinary_tokens, packing_obstacle
from ptd.inject.shortened import shorter, spared_modules
from ptd.types import IGNORE_INDEX, Batch, SoftTokens, UserError, is_partitioned, virtual_id

if TYPE_CHECKING:
    from ptd.inject.attach import Attachment

LONG, SHORT, SHARED = 6, 3, 2
"""Lengths of the rows in tokens, and how many first tokens the rows share: these become the prompt."""
TOKENS = 3 * LONG
"""Tokens of every pass, in any layout: half precision on a CPU generates code again for each number of tokens."""
ALLOWED = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2}
"""Largest allowed distance of a token's hidden state, after a few layers, from its value when the row runs alone, as a
fraction of the mean norm. Half precision and 8 bits lose more than 1 % to rounding."""
ALLOWED_ELSE = 0.1


@dataclass(frozen=True)
class Verdict:
    """For each capability, the reason why a model lacks it; None: the model has it.

    ``packed``: the rows of a packed batch stay separate. ``left``: rows padded on the left give the same result as
    alone. ``soft``: virtual tokens before the sequences. ``marks``: virtual tokens among those of a sequence.
    ``prefix``: keys and values in every layer.
    """

    packed: str | None = None
    left: str | None = None
    soft: str | None = None
    marks: str | None = None
    prefix: str | None = None


@dataclass(frozen=True)
class _Row:
    """Token ids of a sequence; for an encoder-decoder, the encoder's ``tokens`` and the decoder's ``target``."""

    tokens: list[int]
    target: list[int] | None = None


class SelfCheck:
    """Comparison of a model with itself: `read_plain` runs with the family's attention code, `run` with ptd's.

    ``calls``: the model's attention calls; none if it keeps its own attention code. ``no_prefix``: why the model's
    cache cannot hold a prefix.
    """

    def __init__(self, attachment: Attachment, calls: list[Call], no_prefix: str | None = None) -> None:
        self.attachment, self.model, self.calls, self.no_prefix = attachment, attachment.model, calls, no_prefix
        self.two = len(attachment.stacks) == 2
        self.own = not attachment.replaces_attention
        self.causal = self.two or all(call.causal for call in calls)  # of a model's own attention `read_plain` tells
        parameter = next(self.model.parameters())
        self.device, dtype = parameter.device, self.model.dtype
        quantised = any(weight.element_size() == 1 for weight in self.model.parameters())
        self.allowed = ALLOWED_ELSE if quantised else ALLOWED.get(dtype, ALLOWED_ELSE)
        self.blank = isinstance(parameter, FakeTensor)
        self.sharded = is_partitioned(parameter)
        self.spared = [] if self.blank else spared_modules(self.model, calls, attachment.head.module)
        text = self.model.config.get_text_config()
        vocabulary = getattr(attachment.stacks[0].embeddings, "num_embeddings", None) or text.vocab_size
        t = ordinary_tokens(text, vocabulary, 16)
        long, short = t[:LONG], [*t[:SHARED], *t[LONG : LONG + SHORT - SHARED]]
        if self.two:
            self.rows = [_Row(long, t[7:11]), _Row(short, t[8:10]), _Row(long, [*t[7:10], t[11]])]
        else:
            self.rows = [_Row(long), _Row(short), _Row([*long[:-1], t[12]])]
        pad = getattr(text, "pad_token_id", None)
        self.pad = pad if isinstance(pad, int) and 0 <= pad < vocabulary else 0
        self.plain: list[Tensor] = []
        self.embedded: Tensor | None = None
        self.cached: list[tuple[Tensor, Tensor]] = []

    def read_plain(self) -> None:
        """Record what the model computes for each row alone. Raises `UserError` if ptd cannot read its output."""
        if self.blank:
            return
        with self._quietly():
            try:
                with shorter(self.spared):
                    self._read_plain()
            except Exception:  # a model may count its layers elsewhere than in the shortened list
                if not self.spared:
                    raise
                self.spared = []
                self._read_plain()

    def _read_plain(self) -> None:
        seen: list[tuple[Tensor, Tensor]] = []
        embeddings: nn.Module = self.attachment.stacks[0].embeddings
        hook = embeddings.register_forward_hook(lambda module, args, output: seen.append((args[0], output.clone())))
        cache = DynamicCache()  # without a config, no layer drops keys outside its window
        caching = {"past_key_values": cache, "use_cache": True}
        caches = self.causal and not self.two and caching.keys() <= self.attachment.inputs.takes
        caches = caches and self.no_prefix is None
        try:
            try:
                first = self._hidden(self.model, self._alone(self.rows[0]) | (caching if caches else {}))[0]
            except Exception as error:  # MiniMax takes only a cache of its own class
                if not (self.own and caches):
                    raise
                self.no_prefix = f"a cache that is given to it raises {type(error).__name__}: {error}"
                seen.clear()
                first = self._hidden(self.model, self._alone(self.rows[0]))[0]
            self.plain = [first, self._hidden(self.model, self._alone(self.rows[1]))[0]]
            if self.own and not self.two:
                changed = self._hidden(self.model, self._alone(self.rows[2]))[0]
                moved = (changed[:-1] - self.plain[0][:-1]).norm(dim=-1).max() / self.plain[0].norm(dim=-1).mean()
                self.causal = bool(moved <= self.allowed)
        finally:
            hook.remove()
        self.embedded = self._embeddings_in(*seen[0]) if seen else None
        self.cached = self._cached(cache)

    def _embeddings_in(self, ids: Tensor, output: Tensor) -> Tensor | None:
        """Return the embeddings of the shared tokens, wherever they are in a batch; None if they are not vectors."""
        if output.shape[:-1] != ids.shape:
            return None
        return torch.stack([output[ids == token][0] for token in self.rows[0].tokens[:SHARED]]).float()

    def _cached(self, cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
        """Return the cached keys and values of the shared tokens in every layer that ran; empty if any are missing."""
        if not self.own:
            ran = set(self.model.modules())
            if len(cache.layers) != sum(call.module in ran for call in self.calls):  # some layers share their keys
                return []
        found = []
        for shape, layer in zip(self.attachment.layers, cache.layers, strict=False):
            key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
            if not isinstance(key, Tensor) or not isinstance(value, Tensor) or not key.numel():
                return []
            if (*key.shape[1:], value.shape[-1]) != (shape.kv_heads, LONG, shape.key_dim, shape.value_dim):
                return []
            found.append((key[0, :, :SHARED].transpose(0, 1), value[0, :, :SHARED].transpose(0, 1)))
        return found

    def run(self) -> Verdict:
        """Return the verdict. Raises `UserError` for a model whose results differ even in a padded batch, and for a GPU
        on which attention itself computes something else than it should."""
        if not self.blank and self.calls:
            check_kernels(self.calls, {slot.backend for slot in self.attachment.slots}, self.device, self.model.dtype)
        with self._quietly(), self.attachment.any_backend(), shorter(self.spared):
            packed = self._packing_obstacle()
            self.attachment.verdict = Verdict(packed)  # decides how batches run
            if self.blank:
                return Verdict(packed or self._packed(), prefix=self.no_prefix)
            self._padded()
            packed = packed or self._packed()
            soft, marks, prefix = self._soft(packed=False), self._marks(), self._prefix(packed=False)
            if self.own:
                prefix = prefix or self._continued()
                return Verdict(packed, self._left(prefix=prefix is None), soft, marks, prefix)
            if packed is None and soft is None:
                packed = self._soft(packed=True)
            if packed is None and prefix is None:
                packed = self._prefix(packed=True)
            if packed is not None and self.attachment.packable:
                self.attachment.verdict = Verdict(packed)
                self._padded()
            left = self._left(prefix=bool(self.cached) and prefix is None)
            return Verdict(packed, left, soft, marks, prefix)

    # ---- the passes

    def _padded(self) -> None:
        """Check a padded batch, and find the first position of a model that takes positions.

        Raises `UserError` if the results differ with every first position.
        """
        reader = self.attachment.stacks[0]
        tried = [reader.first_position]
        if reader.takes_positions and not self.two:
            tried += [0, self.pad + 1, 1, 2]
        errors = []
        for first in dict.fromkeys(tried):
            reader.first_position = first
            try:
                errors.append(self._apart(self._run(self._batch(self.rows), learning=True)))
            except IndexError:  # the model has no such positions
                errors.append(float("inf"))
            if errors[-1] <= self.allowed:
                return
        if self.own:
            raise UserError(
                f"backbone.path: {type(self.model).__name__} does not compute the same for a padded batch as for each "
                f"row alone: the hidden states of two short rows differ by {errors[0]:.1%}, so a prompt would be "
                "trained on a different model; use a backbone of another family"
            )
        raise UserError(
            f"backbone.path: {type(self.model).__name__} does not compute the same with ptd's attention as with its "
            f"own: the hidden states of two short rows differ by {errors[0]:.1%}, so a prompt would be trained on a "
            "different model; use a backbone of another family"
        )

    def _packing_obstacle(self) -> str | None:
        if self.own:
            return "it keeps its own attention code, which does not keep packed rows separate"
        if self.two or not self.attachment.stacks[0].takes_positions:
            return "it takes no position_ids that could restart in each row"
        if any(not call.causal and call.window is not None for call in self.calls):
            return "its layers attend through a window in both directions"
        for call in self.calls:
            obstacle = packing_obstacle(call)
            if obstacle is not None:
                return f"{type(call.module).__name__} {obstacle}"
        return None

    def _packed(self) -> str | None:
        with unset_fake_temporarily():  # the boundaries have values even if no other tensor has
            batch = self._batch(self.rows, packed=True)
        try:
            if self.blank:
                self.attachment.run(batch)
                return None
            return self._said(self._apart(self._run(batch)), "without a prompt", packed=True)
        except (UserError, TypeError) as error:
            return str(error)

    def _left(self, *, prefix: bool) -> str | None:
        if self.two or not self.causal:
            return None
        if self.own and (grouped := layer_types(self.model.config) - SOFTMAX - RECURRENT):
            return (
                f"its layers of type {', '.join(sorted(grouped))} group tokens by their place in the row, with padding"
            )
        if prefix and self.own and (window := window_of(self.model.config)) is not None:
            return f"its window of {window} tokens counts padding, and would hide the prefix from more tokens"
        skip = SHARED if prefix else 0
        rows = [row.tokens[skip:] for row in self.rows]
        pads = [LONG - len(row) for row in rows]
        ids = [[self.pad] * pad + row for row, pad in zip(rows, pads, strict=True)]
        mask = torch.tensor([[0] * pad + [1] * (LONG - pad) for pad in pads], device=self.device)
        inputs = self.attachment.generation_inputs(torch.tensor(ids, device=self.device), mask)
        with self._cached_as_prefix() if prefix else nullcontext():
            hidden = self._hidden(self.model, inputs)
        error = self._apart([hidden[row, pad:] for row, pad in enumerate(pads)], skip=skip)
        return self._said(error, "padded on the left")

    def _soft(self, *, packed: bool) -> str | None:
        rows = [_Row(row.tokens[SHARED:], row.target) for row in self.rows]
        batch = self._batch(rows, packed=packed, virtual=SHARED)
        return self._embedded("whose first tokens are given as embeddings", batch, in_front=True, packed=packed)

    def _marks(self) -> str | None:
        """Check virtual tokens in place of the rows' first tokens."""
        virtual = [virtual_id(number) for number in range(SHARED)]
        batch = self._batch([_Row([*virtual, *row.tokens[SHARED:]], row.target) for row in self.rows])
        return self._embedded("some of whose tokens are given as embeddings", batch, in_front=False)

    def _embedded(self, what: str, batch: Batch, *, in_front: bool, packed: bool = False) -> str | None:
        if self.embedded is None:
            return "its embedding layer does not output one vector per token"
        self.attachment.set(SoftTokens(self.embedded, in_front=in_front))
        try:
            hidden = self._run(batch)
        except Exception as error:  # families fail in different ways on tokens that are not in the vocabulary
            return f"a forward pass with them raises {type(error).__name__}: {error}"
        finally:
            self.attachment.set(None)
        return self._said(self._apart(hidden, skip=SHARED if in_front else 0), what, packed)

    def _prefix(self, *, packed: bool) -> str | None:
        if self.no_prefix is not None:
            return self.no_prefix
        if not self.cached:  # nothing to compare with: an encoder's keys depend on later tokens
            return "its cache was not filled by a pass over a few tokens" if self.own else None
        rows = [_Row(row.tokens[SHARED:]) for row in self.rows]
        try:
            with self._cached_as_prefix():
                hidden = self._run(self._batch(rows, packed=packed))
        except Exception as error:  # families fail in different ways on a cache that they have not made
            if not self.own:
                raise
            return f"a forward pass with a prefix in its cache raises {type(error).__name__}: {error}"
        return self._said(self._apart(hidden, skip=SHARED), "whose first tokens are given as a prefix", packed)

    def _continued(self) -> str | None:
        """Check generation with a prefix: the first row's tokens behind it in two passes, the second from the cache."""
        tokens, middle = self.rows[0].tokens[SHARED:], (LONG - SHARED) // 2
        found, cache = [], DynamicCache(config=self.model.config.get_text_config(decoder=True))
        with self._cached_as_prefix():
            for part in (slice(0, middle), slice(middle, len(tokens))):
                ids = torch.tensor([tokens[part]] * SHORT, device=self.device)
                mask = torch.ones(SHORT, part.stop, dtype=torch.long, device=self.device)
                inputs = self.attachment.generation_inputs(ids, mask)
                if "position_ids" in inputs:
                    inputs["position_ids"] = inputs["position_ids"][:, part]
                found.append(self._hidden(self.model, inputs | {"past_key_values": cache, "use_cache": True})[0])
        return self._said(self._apart([torch.cat(found)], skip=SHARED), "in two passes behind a prefix in its cache")

    @contextmanager
    def _cached_as_prefix(self) -> Iterator[None]:
        """Use the keys and values of the first tokens as the prompt, in the layers that run."""
        self.attachment.shift(SHARED)
        for slot, (key, value) in zip(self.attachment.slots, self.cached, strict=False):
            slot.hold(key, value)
        try:
            yield
        finally:
            self.attachment.set(None)

    # ---- how rows are run and compared

    def _batch(self, rows: list[_Row], *, packed: bool = False, virtual: int = 0) -> Batch:
        """Return the rows in the layout of a run: padded on the right, or packed together with one more row.

        ``virtual``: number of virtual tokens that will be inserted before each row.
        """
        tokens = [row.tokens for row in rows]
        if self.two:
            targets = [row.target or [] for row in rows]
            return _padded(targets, max(map(len, targets)), self.pad, self.device, source=tokens)
        if not packed:
            return _padded(tokens, LONG - virtual, self.pad, self.device)
        further = TOKENS - virtual - sum(len(row) + virtual for row in tokens)
        return _packed([*tokens, tokens[0][:1] * further], self.device)

    def _alone(self, row: _Row) -> dict[str, Any]:
        times = TOKENS // len(row.tokens)
        inputs: dict[str, Any] = {"input_ids": torch.tensor([row.tokens] * times, device=self.device)}
        if "use_cache" in self.attachment.inputs.takes:
            inputs["use_cache"] = False
        if row.target is not None:
            inputs["decoder_input_ids"] = torch.tensor([row.target] * times, device=self.device)
        return inputs

    def _run(self, batch: Batch, *, learning: bool = False) -> list[Tensor]:
        """Return the last hidden states of each row, ``[length, hidden]``.

        ``learning``: record gradients as in training, which reveals a mask that requires a gradient.
        """
        hidden = self._hidden(self.attachment.run, batch, learning=learning and not self.sharded)
        hidden = hidden.flatten(0, 1)
        starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
        return [hidden[start : start + length] for start, length in zip(starts, lengths, strict=True)]

    def _hidden(self, run: Callable[..., Any], inputs: Any, *, learning: bool = False) -> Tensor:
        """Return the last stack's hidden states from one pass. Raises `UserError` if the output lacks them."""
        seen: list[Tensor] = []
        stack = self.attachment.stacks[-1].module

        def see(module: nn.Module, args: Any, output: Any) -> None:
            if getattr(output, "last_hidden_state", None) is None:
                raise UserError(
                    f"backbone.path: the transformer in {type(self.model).__name__} ({type(stack).__name__}) returns "
                    "no last_hidden_state, which ptd reads; use a backbone of another family"
                )
            seen.append(output.last_hidden_state)

        hooks = [stack.register_forward_hook(see)]
        if learning:
            embeddings: nn.Module = self.attachment.stacks[0].embeddings
            hooks.append(embeddings.register_forward_hook(lambda *given: given[-1].detach().requires_grad_() * 1))
        try:
            with torch.set_grad_enabled(learning):
                output = run(**inputs) if isinstance(inputs, dict) else run(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        if output.get("logits") is None and output.get("last_hidden_state") is None:
            raise UserError(
                f"backbone.path: {type(self.model).__name__} returns neither logits nor a last_hidden_state; use a "
                "backbone of another family"
            )
        # Logits that are not a linear layer of these hidden states may come from others (ProphetNet's n-gram stream).
        read = output.get("logits") if self.own and self.attachment.head.module is None else None
        return (seen[-1] if read is None else read).detach().float()

    def _apart(self, found: list[Tensor], *, skip: int = 0) -> float:
        """Return the largest distance of a hidden state from its value when the row runs alone, over the mean norm.

        The third row is the first row with another last token, which in a causal model the other tokens do not see.
        """
        wants = [*self.plain, self.plain[0][:-1]] if self.causal else self.plain
        errors = []
        for want, got in zip(wants, found, strict=False):
            want = want if self.two else want[skip:]
            apart = (got[: len(want)] - want).norm(dim=-1) / want.norm(dim=-1).mean()
            errors.append(apart.max().item() if bool(apart.isfinite().all()) else float("inf"))
        return max(errors)

    def _said(self, error: float, what: str, packed: bool = False) -> str | None:
        if error <= self.allowed:
            return None
        how = f"the hidden states of short rows {what}{', in a packed batch,' * packed}"
        return f"{how} differ by {error:.1%} from those of the same rows alone in {type(self.model).__name__}"

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Run the model without dropout and without gradients."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True


def _padded(
    rows: list[list[int]], width: int, pad: int, device: torch.device, source: list[list[int]] | None = None
) -> Batch:
    ids = torch.tensor([[*row, *([pad] * (width - len(row)))] for row in rows], device=device)
    read = None if source is None else _padded(source, max(map(len, source)), pad, device)
    return _batch_of(rows, ids, torch.arange(width, device=device).expand(len(rows), -1), source=read)


def _packed(rows: list[list[int]], device: torch.device) -> Batch:
    ids = torch.tensor([[token for row in rows for token in row]], device=device)
    positions = torch.cat([torch.arange(len(row), device=device) for row in rows])[None]
    bounds = torch.tensor([0, *map(len, rows)], device=device).cumsum(0).to(torch.int32)
    return _batch_of(rows, ids, positions, bounds=bounds)


def _batch_of(
    rows: list[list[int]],
    ids: Tensor,
    positions: Tensor,
    *,
    bounds: Tensor | None = None,
    source: Batch | None = None,
) -> Batch:
    return Batch(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE_INDEX),
        position_ids=positions,
        cu_seqlens=bounds,
        max_seqlen=max(map(len, rows)),
        tokens=sum(map(len, rows)) + (0 if source is None else source.tokens),
        supervised_tokens=0,
        lengths=torch.tensor([len(row) for row in rows], device=ids.device),
        rows=tuple(range(len(rows))),
        source=source,
    )
