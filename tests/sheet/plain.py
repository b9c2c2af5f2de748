"""The right values, computed by transformers without ptd: each row by itself, without padding, packing or a cache.

A soft prompt is concatenated before the embeddings (``inputs_embeds``). A prefix is concatenated before the keys and
values that the model passes to `sheet.attention.attend`. Two checks show that this function is the family's own
attention: without a prefix it must equal "eager" attention; with one, its distance from a cache filled with the prefix
is recorded.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ptd.types import virtual_id
from sheet.attention import NAME, Pass, running
from sheet.cases import NEW_TOKENS, P, Rows, Written, distance, generated
from sheet.configs import FIRST_WORD, PAD

SAME = 1e-5
SHOWS = 1e-2
"""The least effect that a change must have, in units of the root mean square, for the test to notice such a fault."""


class NoReference(Exception):
    """The right value cannot be computed with transformers alone."""


def _overlaid(embedded: Tensor, soft: Tensor, marked: Tensor) -> Tensor:
    """Return ``embedded`` ``[1, S, hidden]`` with the embeddings ``soft`` where ``marked`` ``[S]`` has virtual ids."""
    if embedded.shape[1] != len(marked) or not len(soft):  # the decoder's embeddings, or no virtual tokens
        return embedded
    number = (virtual_id(0) - marked).clamp(min=0)
    return torch.where((marked < 0)[:, None], soft[number], embedded)


def _shift(side: nn.Module, count: int) -> Any:
    """Shift one side of an encoder-decoder to the positions after the prefix; return the hook, to be removed later."""
    positions = {"position_ids": P + torch.arange(count)[None]}
    return side.register_forward_pre_hook(lambda module, args, given: (args, {**given, **positions}), with_kwargs=True)


class Plain:
    """A copy of the model that computes the right values."""

    def __init__(self, model: PreTrainedModel, rows: Rows) -> None:
        self.model = copy.deepcopy(model)
        self.rows = rows
        self.by_cache = False
        self._switch("eager")
        with torch.no_grad():
            self.without = [self.run(row) for row in range(len(rows.ids))]
        self.causal = self._is_causal()
        self._check_that_tokens_meet()
        self.first_position = self._first_position()
        self.by_embeddings = self._takes_embeddings()
        self.why_no_prefix = ""
        self.shapes: list[tuple[int, int, int]] = []
        try:
            self._check_attend()
        except NoReference as reason:
            self.why_no_prefix = str(reason)

    def run(self, row: int, *, rows: Rows | None = None, ids: Tensor | None = None, soft: Tensor | None = None,
            prefix: list[tuple[Tensor, Tensor]] | None = None, by_cache: bool | None = None) -> Tensor:  # fmt: skip
        """Return the outputs at the row's own tokens (or at ``ids`` in their place), ``[S, width]``.

        ``soft`` is placed before the row, or at the row's marks if it has any.
        """
        rows = rows or self.rows
        by_cache = self.by_cache if by_cache is None else by_cache
        ids = rows.ids[row] if ids is None else ids
        inputs: dict[str, Any] = {}
        takes = inspect.signature(self.model.forward).parameters
        read = ids if rows.sources is None else rows.sources[row]
        front = 0 if soft is None or bool((read < 0).any()) else len(soft)
        if rows.sources is not None:
            inputs["decoder_input_ids"] = ids[None]
        if "attention_mask" in takes:
            inputs["attention_mask"] = torch.ones(1, front + len(read), dtype=torch.long)
        inputs |= self._uncached()
        hooks = []
        if soft is None:
            inputs["input_ids"] = read[None]
        else:
            marked = torch.cat([virtual_id(0) - torch.arange(front), read])
            tokens = torch.where(marked < 0, self._stand_in(), marked)
            if self.by_embeddings:
                inputs["inputs_embeds"] = _overlaid(self.embed(tokens)[None], soft, marked)
            else:
                inputs["input_ids"] = tokens[None]
                embeddings = self.model.get_input_embeddings()
                hooks = [embeddings.register_forward_hook(lambda *given: _overlaid(given[-1], soft, marked))]
        if prefix is not None and by_cache:
            inputs |= self._cache(prefix)
            inputs["attention_mask"] = torch.ones(1, P + len(read), dtype=torch.long)
        elif prefix is not None and rows.sources is not None:
            hooks = [
                _shift(side, len(tokens))
                for side, tokens in ((self.model.get_encoder(), read), (self.model.get_decoder(), ids))
                if "position_ids" in inspect.signature(side.forward).parameters
            ]
        elif prefix is not None and self.first_position is not None:
            inputs["position_ids"] = self.first_position + P + torch.arange(len(read))[None]
        try:
            with self._pass(None if by_cache else prefix):
                output = self.model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        logits = output.get("logits")
        found = (output.last_hidden_state if logits is None else logits)[0]
        return found if rows.sources is not None else found[front:]

    def _uncached(self) -> dict[str, Any]:
        return {"use_cache": False} if "use_cache" in inspect.signature(self.model.forward).parameters else {}

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def _stand_in(self) -> int:
        """Return the id to pass with a virtual token's embedding, for families that look up several embeddings per
        token: the id that they use with an image's embedding."""
        return PAD if "gemma4" in self.model.config.model_type else 0

    @torch.no_grad()
    def greedy(self, row: int, rows: Rows, eos: int | None, **prompt: Any) -> Written:
        """Decode by argmax without a cache, and never choose ``eos`` or the padding token."""
        ids = rows.ids[row] if rows.sources is None else rows.ids[row][:1]
        chosen: list[int] = []
        logits: list[Tensor] = []
        for _ in range(NEW_TOKENS):
            logits.append(self.run(row, rows=rows, ids=ids, **prompt)[-1])
            allowed = logits[-1].clone()
            allowed[PAD] = -torch.inf
            if eos is not None:
                allowed[eos] = -torch.inf
            chosen.append(int(allowed.argmax()))
            ids = torch.cat([ids, torch.tensor(chosen[-1:])])
        return Written(chosen, torch.stack(logits))

    def generated(self, eos: int | None) -> list[Written]:
        """Return what transformers alone writes for the first two rows in one batch."""
        self._switch("eager")
        try:
            return generated(self.model, self.rows, [0, 1], eos)
        finally:
            if not self.why_no_prefix and not self.by_cache:
                self._switch(NAME)

    def _switch(self, name: str) -> bool:
        if not type(self.model)._can_set_attn_implementation() and name == NAME:
            return False
        try:
            self.model.set_attn_implementation(name)
        except (ValueError, ImportError):
            return False
        return True

    @contextmanager
    def _pass(self, prefix: list[tuple[Tensor, Tensor]] | None) -> Iterator[Pass]:
        now = Pass(prefix)
        token = running.set(now)
        try:
            yield now
        finally:
            running.reset(token)
        self._last = now

    @torch.no_grad()
    def _is_causal(self) -> bool:
        changed = self.rows.changed_last()
        row = max(range(len(self.rows.ids)), key=lambda number: len(self.rows.ids[number]))
        moved = self.run(row, ids=changed.ids[row])
        return distance(moved[:-1], self.without[row][:-1]) < SAME

    @torch.no_grad()
    def _check_that_tokens_meet(self) -> None:
        ids = self.rows.ids[1].clone()
        ids[-2 if self.causal else -1] = FIRST_WORD + (ids[0] - FIRST_WORD + 3) % 50
        place = -1 if self.causal else 0
        moved = distance(self.run(1, ids=ids)[place], self.without[1][place])
        if moved < SHOWS:
            raise NoReference(f"its tokens hardly see each other: another neighbour moves an output by {moved:.1g}")

    @torch.no_grad()
    def _takes_embeddings(self) -> bool:
        """Return whether a row's embeddings in place of its ids give the same outputs."""
        try:
            own = self.embed(self.rows.ids[0])
            self._by_embeddings(0.5 * own)  # embeddings of no token: gemma4 looks up the id of each embedding
            return distance(self._by_embeddings(own[:0]), self.without[0]) < SAME
        except Exception:
            return False

    def _by_embeddings(self, soft: Tensor) -> Tensor:
        self.by_embeddings = True
        return self.run(0, soft=soft)

    @torch.no_grad()
    def _first_position(self) -> int | None:
        """Return the first of the family's own positions; None if it takes no positions."""
        if self.rows.sources is not None:
            return None
        ids = self.rows.ids[0]
        for first in range(6):
            positions = first + torch.arange(len(ids))[None]
            try:
                output = self.model(input_ids=ids[None], position_ids=positions, **self._uncached())
            except Exception:
                return None
            logits = output.get("logits")
            found = (output.last_hidden_state if logits is None else logits)[0]
            if distance(found, self.without[0]) < SAME:
                return first
        return None

    @torch.no_grad()
    def _check_attend(self) -> None:
        if not self._switch(NAME):
            raise NoReference("the family does not use AttentionInterface")
        try:
            for row, want in enumerate(self.without):
                error = distance(self.run(row), want)
                if error > SAME:
                    raise NoReference(f"the textbook formula differs from eager attention by {error:.1g}")
        except NoReference:
            self._switch("eager")
            raise
        except Exception as error:
            self._switch("eager")
            raise NoReference(f"under another attention: {type(error).__name__}: {error}") from error
        self.shapes = self._last.shapes
        self.modules = self._last.modules
        if not self.shapes:
            self._switch("eager")
            raise NoReference("no layer calls the attention interface")

    @torch.no_grad()
    def give_prefix_by_cache(self) -> None:
        """From now on compute with the family's own attention, and put a prefix into a cache that it reads."""
        self._switch("eager")
        self.by_cache, self.why_no_prefix, self.shapes = True, "", []
        ids = self.rows.ids[0]
        try:
            found = self.model(input_ids=ids[None], use_cache=True).past_key_values
            found = getattr(found, "self_attention_cache", found)
            self.shapes = [(each.keys.shape[1], each.keys.shape[3], each.values.shape[3]) for each in found.layers]
        except Exception as error:
            self.why_no_prefix = f"no cache can be filled: {type(error).__name__}: {error}"

    def _cache(self, prefix: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        cache = DynamicCache()
        if self.by_cache:
            for index, (key, value) in enumerate(prefix):
                cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], index)
            return {"past_key_values": cache, "use_cache": True}
        for module, (key, value) in zip(self.modules, prefix, strict=True):
            index = getattr(module, "layer_idx", None)
            if index is None:
                raise NoReference("its layers have no number in a cache")
            cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], index)
        return {"past_key_values": cache, "use_cache": True}

    def prefix_by_cache(self, prefix: list[tuple[Tensor, Tensor]], window: int | None) -> float | None:
        """Return how far `attend` with a prefix is from a cache filled with it; None if that cache cannot be used."""
        row = min(range(len(self.rows.ids)), key=lambda number: len(self.rows.ids[number]))
        if not self.causal or self.rows.sources is not None:
            return None
        if window is not None and len(self.rows.ids[row]) + P > window:
            return None
        try:
            with torch.no_grad():
                return distance(self.run(row, prefix=prefix, by_cache=True), self.run(row, prefix=prefix))
        except Exception:
            return None
